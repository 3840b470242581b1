"""A trace checks itself, and its integral and times agree."""

from __future__ import annotations

import numpy as np
import pytest
from edgefm.deploy.traces import Trace, synthetic_trace, with_outage
from edgefm.models.errors import TraceError


@pytest.mark.parametrize("times", [[], [-1, 4], [4, 3], [0, 0], [[1, 2]]])
def test_a_trace_checks_itself(times: list[int]) -> None:
    with pytest.raises(TraceError):
        Trace("made", np.array(times, dtype=np.int64))


def test_integral_and_times_agree_across_the_wrap() -> None:
    trace = Trace("made", np.array([0, 2, 2, 5], dtype=np.int64))
    assert [trace.time_of(index) for index in range(9)] == [0, 2, 2, 5, 5, 7, 7, 10, 10]
    for elapsed_ms in (-1, 0, 1.9, 2, 4.99, 5, 6, 7, 9.5, 10, 5000):
        count = trace.opportunities_by(elapsed_ms)
        assert trace.time_of(count) > elapsed_ms
        assert count == 0 or trace.time_of(count - 1) <= elapsed_ms


def test_a_trace_cannot_be_changed() -> None:
    times = np.array([1, 2], dtype=np.int64)
    trace = Trace("made", times)
    times[0] = 2
    assert trace.opportunities_ms.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        trace.opportunities_ms[0] = 2


def test_an_outage_silences_its_stretch_of_every_period_and_nothing_else():
    trace = synthetic_trace(3)
    cut = with_outage(trace, 20.0, 4.0)
    assert cut.period_ms == trace.period_ms
    for start_s, end_s, same in ((0, 20, True), (20, 24, False), (24, 60, True), (80, 84, False)):
        before, after = (
            t.opportunities_by(end_s * 1000 - 1) - t.opportunities_by(start_s * 1000 - 1) for t in (trace, cut)
        )
        assert before > 0 and after == (before if same else 0)
    with pytest.raises(TraceError, match="does not fit"):
        with_outage(trace, 58.0, 4.0)
