"""Made links: constant rates, and the statistics of the synthetic ones."""

from __future__ import annotations

import numpy as np
import pytest
from edgefm.deploy.traces import LTE_DOWN, LTE_UP, PACKET_BYTES, Trace, constant_trace, synthetic_trace
from edgefm.models.errors import TraceError


@pytest.mark.parametrize("rate", [0.1, 1.0, 7.3, 20.0, 100.0])
def test_constant_trace_holds_its_rate_and_never_exceeds_it(rate: float) -> None:
    trace = constant_trace(rate)
    assert trace.mean_mbit_per_s == pytest.approx(rate, abs=0.002)
    for elapsed_ms in (1, 10, 123, 999, 6000, 6001, 20000):
        allowed_bits = trace.mean_mbit_per_s * 1e3 * elapsed_ms
        bits = trace.opportunities_by(elapsed_ms) * PACKET_BYTES * 8
        assert allowed_bits * (1 + 1e-9) >= bits > allowed_bits - (rate * 1e3 + 12000)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_constant_trace_refuses_impossible_rates(rate: float) -> None:
    with pytest.raises(TraceError):
        constant_trace(rate)


def outages(trace: Trace) -> int:
    return int((np.diff(trace.opportunities_ms, prepend=0) >= 50).sum())


def test_synthetic_link_has_the_documented_statistics() -> None:
    for states, mean, spread, named in ((LTE_DOWN, 20.6, 1.6, 19.1), (LTE_UP, 8.2, 0.6, 7.6)):
        made = [synthetic_trace(seed, states=states) for seed in range(100)]
        rates = np.array([trace.mean_mbit_per_s for trace in made])
        assert rates.mean() == pytest.approx(mean, abs=0.05)
        assert rates.std() == pytest.approx(spread, abs=0.05)
        assert made[7].mean_mbit_per_s == pytest.approx(named, abs=0.05)
        assert np.mean([outages(trace) for trace in made]) == pytest.approx(4.5, abs=0.05)
        assert max(trace.longest_outage_ms for trace in made) <= 443
        assert {trace.duration_s for trace in made} == {60.0}


def test_synthetic_link_is_its_seed_and_both_directions_share_outages() -> None:
    down, up = synthetic_trace(7), synthetic_trace(7, states=LTE_UP)
    assert np.array_equal(down.opportunities_ms, synthetic_trace(7).opportunities_ms)
    assert not np.array_equal(down.opportunities_ms, synthetic_trace(8).opportunities_ms)
    assert (down.longest_outage_ms, outages(down)) == (343, 5)
    assert (up.longest_outage_ms, outages(up)) == (344, 5)
    starts = [trace.opportunities_ms[np.flatnonzero(np.diff(trace.opportunities_ms) >= 50)] for trace in (down, up)]
    assert np.allclose(starts[0], starts[1], atol=20)


def test_synthetic_trace_refuses_what_makes_no_link() -> None:
    with pytest.raises(TraceError):
        synthetic_trace(0, duration_s=0)
    with pytest.raises(TraceError):
        synthetic_trace(0, states=LTE_DOWN[:1])
