"""Percentiles and outages against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from edgefm.deploy.traces import Trace, constant_trace, outages, summarize_trace, synthetic_trace, with_outage
from edgefm.models.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st

TIMES = st.lists(st.integers(0, 5000), min_size=1, max_size=60).map(sorted).filter(lambda times: times[-1] > 0)


def test_a_link_of_two_rates() -> None:
    times_ms = [*range(2, 1001, 2), *range(1001, 2001)]  # 6 Mbit/s for a second, then 12
    summary = summarize_trace(Trace("made", np.array(times_ms)), window_ms=100)
    assert (summary.name, summary.duration_s, summary.opportunities) == ("made", 2.0, 1500)
    assert summary.mean_mbit_per_s == pytest.approx(9)
    assert summary.percentiles_mbit_per_s == pytest.approx({5: 6, 25: 6, 50: 9, 75: 12, 95: 12})
    assert (summary.window_ms, summary.outage_ms) == (100, 200)
    assert (summary.outages, summary.longest_outage_ms, summary.outage_share) == (0, 0, 0.0)


def test_a_short_window_at_the_end_does_not_count() -> None:
    trace = Trace("made", np.array([*range(1, 101), 101]))
    assert set(summarize_trace(trace, window_ms=100).percentiles_mbit_per_s.values()) == {12.0}
    assert summarize_trace(trace, window_ms=1000).percentiles_mbit_per_s[50] == pytest.approx(12)


def test_an_outage_that_was_made_is_found() -> None:
    summary = summarize_trace(with_outage(constant_trace(12), 2.0, 1.5))
    assert (summary.outages, summary.longest_outage_ms) == (1, 1501)
    assert summary.outage_share == pytest.approx(0.25, abs=0.001)
    named = summarize_trace(synthetic_trace(7), outage_ms=50)
    assert (named.outages, named.longest_outage_ms) == (5, 343)


@given(TIMES, st.integers(1, 600))
def test_outages_are_all_long_gaps_and_no_others(times: list[int], outage_ms: int) -> None:
    trace = Trace("made", np.array(times))
    starts_ms, ends_ms = (edges.tolist() for edges in outages(trace, outage_ms))
    silent = [(start, end) for start, end in zip([0, *times], times, strict=False) if end - start >= outage_ms]
    assert list(zip(starts_ms, ends_ms, strict=True)) == silent
    summary = summarize_trace(trace, outage_ms=outage_ms)
    assert summary.outages == len(silent)
    assert 0 <= summary.outage_share <= 1
    assert summary.longest_outage_ms == (trace.longest_outage_ms if silent else 0)


@given(TIMES, st.integers(1, 600))
def test_percentiles_rise_within_what_the_windows_had(times: list[int], window_ms: int) -> None:
    percentiles = list(summarize_trace(Trace("made", np.array(times)), window_ms).percentiles_mbit_per_s.values())
    assert percentiles == sorted(percentiles)
    assert percentiles[0] >= 0 and percentiles[-1] <= len(times) * 12 / min(window_ms, times[-1]) + 1e-9


def test_impossible_outages_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 ms, got 0"):
        summarize_trace(synthetic_trace(7), outage_ms=0)
