"""From rates to opportunities and back: the integral decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edgefm.deploy.traces import PACKET_MBIT, Trace, rates, synthetic_trace
from edgefm.deploy.traces.lines import TraceLines
from edgefm.deploy.traces.rates import rates_of_trace, trace_of_rates
from edgefm.models.errors import ConfigError, TraceError
from hypothesis import assume, example, given
from hypothesis import strategies as st

RATE = st.one_of(st.just(0.0), st.floats(1e-3, 300.0))
STEPS = st.lists(st.tuples(st.floats(1e-4, 3.0), RATE), min_size=1, max_size=12)


def made(edges_s, mbit_per_s) -> Trace:
    numbers = np.arange(1, len(mbit_per_s) + 1)
    return trace_of_rates(TraceLines(Path("made")), np.array(edges_s, float), np.array(mbit_per_s, float), numbers)


def integral_packets(edges_s: np.ndarray, mbit_per_s: np.ndarray, at_ms: np.ndarray) -> np.ndarray:
    """By definition: the time that each rate has held, times the rate."""
    held_s = np.clip(at_ms[:, None] / 1000, edges_s[:-1], edges_s[1:]) - edges_s[:-1]  # (T, N)
    return held_s @ mbit_per_s / PACKET_MBIT


@given(STEPS)
@example([(1.5, 215.4488515531813)])
def test_opportunities_follow_the_integral_and_never_run_ahead(steps) -> None:
    lengths_s, mbit_per_s = (np.array(column) for column in zip(*steps, strict=True))
    edges_s = np.concatenate([[0.0], np.cumsum(lengths_s)])
    assume(lengths_s @ mbit_per_s / PACKET_MBIT > 1.01)
    trace = made(edges_s, mbit_per_s)
    assert trace.period_ms == max(1, int(np.ceil(edges_s[-1] * 1000 - 1e-6)))
    at_ms = np.unique(np.linspace(0, trace.period_ms, 400).astype(int))
    counted = np.array([trace.opportunities_by(int(at)) for at in at_ms[:-1]])  # the end is the next period's start
    allowed = integral_packets(edges_s, mbit_per_s, at_ms[:-1])
    rounding = (
        1e-5 + 1e-6 * mbit_per_s.max() / 1000 / PACKET_MBIT
    )  # times are rounded up but for a millionth of a millisecond
    assert (counted <= allowed + rounding).all()
    moved = np.append(trace.opportunities_ms[:-1], 0).max()  # after it only the last one, which waits for the end
    behind = allowed - counted
    assert (behind[at_ms[:-1] < moved] < 1 + 1e-5).all()
    assert (behind < 2 + 1e-5).all()
    assert trace.opportunities_ms.size == pytest.approx(integral_packets(edges_s, mbit_per_s, at_ms[-1:])[0], abs=1)


def test_an_even_rate_gives_even_opportunities() -> None:
    assert made([0, 0.01], [PACKET_MBIT / 0.002]).opportunities_ms.tolist() == [2, 4, 6, 8, 10]
    assert made([7, 7.01], [PACKET_MBIT / 0.002]).opportunities_ms.tolist() == [2, 4, 6, 8, 10]
    assert made([0, 0.003], [PACKET_MBIT / 0.0005]).opportunities_ms.tolist() == [1, 1, 2, 2, 3, 3]


def test_a_link_that_is_down_at_the_end_is_down_until_the_end() -> None:
    trace = made([0, 0.01, 5], [PACKET_MBIT / 0.002, 0])
    assert trace.opportunities_ms.tolist() == [2, 4, 6, 8, 5000]


def test_blocks_of_opportunities_join(monkeypatch) -> None:
    edges_s, mbit_per_s = [0, 0.7, 1.1, 3], [3.3, 0.0, 17.1]
    at_once = made(edges_s, mbit_per_s).opportunities_ms
    monkeypatch.setattr(rates, "_AT_ONCE", 7)
    assert np.array_equal(made(edges_s, mbit_per_s).opportunities_ms, at_once)


def test_too_many_opportunities_and_none_name_the_line() -> None:
    with pytest.raises(TraceError, match=r"made: line 2: more than 50,000,000 packets .* by here; split the trace"):
        made([0, 1, 10_000, 10_001], [1, 1000, 1])
    with pytest.raises(TraceError, match=r"in 2 s the rates let no packet of 1500 bytes pass; is their unit right"):
        made([0, 1, 2], [0, 0.001])


@given(
    st.lists(st.integers(0, 5000), min_size=1, max_size=60).map(sorted).filter(lambda times: times[-1] > 0),
    st.integers(1, 700),
)
def test_windows_count_what_the_trace_counts(times: list[int], window_ms: int) -> None:
    trace = Trace("made", np.array(times))
    edges_ms, mbit_per_s = rates_of_trace(trace, window_ms)
    assert edges_ms[0] == 0 and edges_ms[-1] == trace.period_ms and (np.diff(edges_ms)[:-1] == window_ms).all()
    packets = np.cumsum(mbit_per_s * np.diff(edges_ms) / 1000 / PACKET_MBIT)
    before_end = [trace.opportunities_by(int(edge)) for edge in edges_ms[1:-1]]
    assert packets.tolist() == pytest.approx([*before_end, len(times)])


@given(st.integers(0, 30), st.integers(20, 3000))
def test_rates_of_a_trace_give_its_integral_back(seed: int, window_ms: int) -> None:
    trace = synthetic_trace(seed, duration_s=5)
    edges_ms, mbit_per_s = rates_of_trace(trace, window_ms)
    again = made(edges_ms / 1000, mbit_per_s)
    assert again.period_ms == trace.period_ms and again.opportunities_ms.size == trace.opportunities_ms.size
    for edge in edges_ms[1:-1].tolist():
        assert again.opportunities_by(edge) == trace.opportunities_by(edge)


def test_impossible_windows_are_refused() -> None:
    trace = Trace("made", np.array([0, 10**15]))
    for window_ms in (0, -1, 1):
        with pytest.raises(ConfigError, match="choose longer ones"):
            rates_of_trace(trace, window_ms)
