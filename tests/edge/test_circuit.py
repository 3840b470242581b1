from __future__ import annotations

import pytest
from edgefm.edge.circuit import Backoff, CircuitBreaker
from hypothesis import given
from hypothesis import strategies as st


def test_pauses_double_up_to_the_longest_and_begin_anew():
    backoff = Backoff(1, first_s=1.0, longest_s=6.0)
    pauses = [backoff.next_s() for _ in range(6)]
    for pause, whole in zip(pauses, [1, 2, 4, 6, 6, 6], strict=True):
        assert whole / 2 <= pause <= whole
    backoff.reset()
    assert backoff.next_s() <= 1.0


def test_equal_seeds_pause_alike_and_others_do_not():
    def pauses(seed: str) -> list[float]:
        backoff = Backoff(seed)
        return [backoff.next_s() for _ in range(5)]

    assert pauses("camera-1") == pauses("camera-1") != pauses("camera-2")


def breaker() -> CircuitBreaker:
    return CircuitBreaker(Backoff(0, first_s=1.0, longest_s=8.0))


def opened_at(circuit: CircuitBreaker, now_s: float) -> float:
    """When it is half-open after a failure at that time."""
    circuit.failed(now_s)
    times = [now_s + step / 1000 for step in range(10_000)]
    return next(time for time in times if circuit.state(time) == "half-open")


def test_closed_open_half_open_closed():
    circuit = breaker()
    assert circuit.state(0.0) == "closed" and circuit.allows(0.0)
    retry_s = opened_at(circuit, 10.0)
    assert 10.5 <= retry_s <= 11.0
    assert circuit.state(retry_s - 0.01) == "open" and not circuit.allows(retry_s - 0.01)
    assert circuit.allows(retry_s)
    circuit.began(retry_s)
    assert not circuit.allows(retry_s)  # one probe
    circuit.succeeded()
    assert circuit.state(retry_s) == "closed" and circuit.allows(retry_s)


@pytest.mark.parametrize("end", [CircuitBreaker.failed, CircuitBreaker.timed_out])
def test_a_probe_in_vain_opens_it_for_longer(end):
    circuit = breaker()
    now_s, pauses = 0.0, []
    circuit.failed(now_s)
    for _ in range(4):
        now_s += 100.0
        circuit.began(now_s)
        end(circuit, now_s)
        assert not circuit.allows(now_s)
        pauses.append(next(step / 100 for step in range(2000) if circuit.allows(now_s + step / 100)))
    assert pauses == sorted(pauses) and pauses[0] <= 2.0 and 4.0 <= pauses[-1] <= 8.01


def test_many_calls_that_fail_together_are_one_failure():
    circuit = breaker()
    for _ in range(30):
        circuit.failed(10.0)
    assert circuit.state(11.0) == "half-open"


def test_a_missed_deadline_is_a_failure_of_a_probe_only():
    circuit = breaker()
    for _ in range(10):
        circuit.timed_out(5.0)
    assert circuit.state(5.0) == "closed"


def test_a_late_answer_closes_it():
    circuit = breaker()
    circuit.failed(0.0)
    circuit.succeeded()
    assert circuit.allows(0.0)


def test_what_the_cloud_has_asked_for_outlasts_answers_to_others():
    circuit = breaker()
    circuit.hold(30.0)
    circuit.hold(20.0)
    circuit.succeeded()
    assert not circuit.allows(29.9) and circuit.state(29.9) == "open"
    assert circuit.state(30.0) == "closed" and circuit.allows(30.0)


EVENTS = st.lists(st.tuples(st.sampled_from(["failed", "timed_out", "succeeded", "began", "hold"]), st.floats(0, 3)))


@given(EVENTS)
def test_whatever_happens_it_asks_again_in_the_end(events):
    """Nobody waits for ever: once the pause is over and no probe is out, a call may go."""
    circuit, now_s = breaker(), 0.0
    for name, step_s in events:
        now_s += step_s
        if name == "succeeded":
            circuit.succeeded()
        elif name == "hold":
            circuit.hold(now_s + step_s)
        elif name != "began" or circuit.allows(now_s):
            getattr(circuit, name)(now_s)
    circuit.timed_out(now_s)  # of the probe, if one is out: every query has a deadline
    assert circuit.allows(now_s + 8.0)
