from __future__ import annotations

import time

import pytest
from edgefm.models.clock import CLOCK_SET_S, SteadyClock

YEARS_S = 10 * 365 * 86_400.0


@pytest.fixture
def wall(monkeypatch):
    """Sets the wall clock; the others go on."""
    return lambda at_s: monkeypatch.setattr(time, "time", lambda: at_s)


def test_it_begins_at_the_wall_clock_and_then_goes_its_own_way(wall):
    wall(CLOCK_SET_S + YEARS_S)
    clock = SteadyClock(newest_s=CLOCK_SET_S + 3 * YEARS_S)  # the clock was ahead then; now it is believed
    before = clock.now_s()
    for at_s in (CLOCK_SET_S + 2 * YEARS_S, 0.0, CLOCK_SET_S):
        wall(at_s)
        after = clock.now_s()
        assert before <= after < CLOCK_SET_S + YEARS_S + 60
        before = after


def test_a_clock_that_was_never_set_goes_on_from_what_is_known(wall):
    wall(5.0)
    assert 5.0 <= SteadyClock().now_s() < 65.0
    assert CLOCK_SET_S + 7 <= SteadyClock(newest_s=CLOCK_SET_S + 7).now_s() < CLOCK_SET_S + 67
