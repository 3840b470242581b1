"""What a trace is like: its rate in windows, and when nothing gets through."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...models.errors import ConfigError
from .rates import rates_of_trace
from .trace import Trace

WINDOW_MS = 500
OUTAGE_MS = 200
PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class TraceSummary:
    """Figures of a whole trace.

    Attributes:
        percentiles_mbit_per_s: of the rate in windows of `window_ms`; a shorter one at the end does not count.
        outages: gaps of `outage_ms` or more between one opportunity and the next, the wrap at the trace's end included.
        outage_share: of the time, in [0, 1].
    """

    name: str
    duration_s: float
    opportunities: int
    mean_mbit_per_s: float
    window_ms: int
    percentiles_mbit_per_s: dict[int, float]
    outage_ms: int
    outages: int
    longest_outage_ms: int
    outage_share: float


def summarize_trace(trace: Trace, window_ms: int = WINDOW_MS, outage_ms: int = OUTAGE_MS) -> TraceSummary:
    """Raises ConfigError for windows or outages that cannot be."""
    _, mbit_per_s = rates_of_trace(trace, window_ms)
    whole = mbit_per_s[: trace.period_ms // window_ms] if trace.period_ms >= window_ms else mbit_per_s
    starts_ms, ends_ms = outages(trace, outage_ms)
    lengths_ms = ends_ms - starts_ms
    return TraceSummary(
        name=trace.name,
        duration_s=trace.duration_s,
        opportunities=trace.opportunities_ms.size,
        mean_mbit_per_s=trace.mean_mbit_per_s,
        window_ms=window_ms,
        percentiles_mbit_per_s=dict(zip(PERCENTILES, np.percentile(whole, PERCENTILES).tolist(), strict=True)),
        outage_ms=outage_ms,
        outages=lengths_ms.size,
        longest_outage_ms=int(lengths_ms.max(initial=0)),
        outage_share=float(lengths_ms.sum() / trace.period_ms),
    )


def outages(trace: Trace, outage_ms: int = OUTAGE_MS) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and ends (N,), (N,), in ms, of gaps of `outage_ms` or more. Raises ConfigError under 1 ms."""
    if outage_ms < 1:
        raise ConfigError(f"an outage lasts at least 1 ms, got {outage_ms}")
    before_ms = np.concatenate([[0], trace.opportunities_ms[:-1]])
    long = trace.opportunities_ms - before_ms >= outage_ms
    return before_ms[long], trace.opportunities_ms[long]
