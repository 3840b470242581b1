"""Between rates that hold for a while and opportunities to deliver 1500 bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...models.errors import ConfigError
from .lines import TraceLines
from .trace import LARGEST_MS, MOST_OPPORTUNITIES, PACKET_MBIT, Trace

RATE_UNITS = {  # in Mbit/s
    "bit/s": 1e-6,
    "kbit/s": 1e-3,
    "Mbit/s": 1.0,
    "Gbit/s": 1e3,
    "B/s": 8e-6,
    "kB/s": 8e-3,
    "MB/s": 8.0,
    "GB/s": 8e3,
}
_FASTEST_MBIT_PER_S = 1e6
_AT_ONCE = 1_000_000
_ROUNDING = 1e-6  # packets or ms: what sums of decimal fractions may be off by


class RateRows:
    """The rows of a file of rates: time and rate, checked as they come."""

    def __init__(self, lines: TraceLines) -> None:
        self.lines = lines
        self.times_s: list[float] = []
        self.mbit_per_s: list[float] = []
        self.numbers: list[int] = []

    def add(self, time_s: float, rate: float, unit: str = "Mbit/s") -> None:
        """The row in the line read last. Raises TraceError for a time that goes back and a rate that cannot be."""
        if rate < 0:
            raise self.lines.error(f"a rate of {rate:g} {unit} is negative; a link that is down has 0")
        mbit_per_s = rate * RATE_UNITS[unit]
        if mbit_per_s > _FASTEST_MBIT_PER_S:
            raise self.lines.error(
                f"a rate of {rate:g} {unit} is over {_FASTEST_MBIT_PER_S:,.0f} Mbit/s; is the unit right?"
            )
        if self.times_s and time_s < self.times_s[-1]:
            back_s = self.times_s[-1] - time_s
            raise self.lines.error(f"the time goes back by {back_s:g} s; sort the rows, or split the trace here")
        if self.times_s and (time_s - self.times_s[0]) * 1000 > LARGEST_MS:
            raise self.lines.error(f"the trace would last more than {LARGEST_MS} ms; is the unit of the time right?")
        self.times_s.append(time_s)
        self.mbit_per_s.append(mbit_per_s)
        self.numbers.append(self.lines.number)

    def require_duration(self) -> None:
        """Raises TraceError unless two rows have different times."""
        if not self.times_s:
            raise self.lines.error("the trace has no row; it needs at least two")
        if self.times_s[-1] == self.times_s[0]:
            raise self.lines.error("all rows have one time; a trace needs at least two")


def trace_of_rates(
    lines: TraceLines, edges_s: NDArray[np.float64], mbit_per_s: NDArray[np.float64], numbers: NDArray[np.int64]
) -> Trace:
    """Opportunities from rates, by their integral; the trace takes the file's name.

    Opportunity k (from 1) comes at the first whole millisecond by which the rates have let k packets pass. So at every
    whole millisecond the trace has delivered what the rates allow, rounded down to a packet. The last opportunity alone
    comes later: at the end, because a trace starts again after its last opportunity, and a link that is down at its end
    would lose that.

    Args:
        edges_s: (N+1,) sorted; rate i holds from edge i to edge i+1.
        mbit_per_s: (N,)
        numbers: (N,) the line that each rate stands in, for errors.

    Raises:
        TraceError: less than one packet in all, or more than `MOST_OPPORTUNITIES`.
    """
    at_ms = (edges_s - edges_s[0]) * 1000  # (N+1,)
    packets_per_ms = mbit_per_s / (PACKET_MBIT * 1000)  # (N,)
    allowed = np.concatenate([[0.0], np.cumsum(np.diff(at_ms) * packets_per_ms)])  # (N+1,) packets: the integral
    if allowed[-1] >= MOST_OPPORTUNITIES + 1:
        number = int(numbers[int(np.argmax(allowed >= MOST_OPPORTUNITIES + 1)) - 1])
        raise lines.error(f"more than {MOST_OPPORTUNITIES:,} packets of 1500 bytes by here; split the trace", number)
    count = int(allowed[-1] + _ROUNDING)
    if count == 0:
        raise lines.error(f"in {at_ms[-1] / 1000:g} s the rates let no packet of 1500 bytes pass; is their unit right?")
    times_ms = np.empty(count, dtype=np.int64)
    for start in range(0, count, _AT_ONCE):
        block = times_ms[start : start + _AT_ONCE]
        order = start + 1.0 + np.arange(block.size)
        held = np.searchsorted(allowed, order - _ROUNDING) - 1  # whose rate completes the packet
        passed_ms = at_ms[held] + (order - allowed[held]) / packets_per_ms[held]
        block[:] = np.ceil(np.minimum(passed_ms, at_ms[held + 1]) - _ROUNDING)
    np.maximum.accumulate(times_ms, out=times_ms)
    times_ms[-1] = max(1, int(np.ceil(at_ms[-1] - _ROUNDING)))
    return Trace(lines.path.name, times_ms)


def rates_of_trace(trace: Trace, window_ms: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Edges in ms (N+1,) and the mean rate between them in Mbit/s (N,); the last window ends with the trace.

    A window has the opportunities after its start and up to its end, the first also those at 0 ms: what
    `Trace.opportunities_by` has counted at every edge.

    Raises:
        ConfigError: windows under 1 ms, or more than `MOST_OPPORTUNITIES` of them.
    """
    if window_ms < 1 or trace.period_ms / window_ms > MOST_OPPORTUNITIES:
        raise ConfigError(f"{trace.duration_s:g} s cannot be cut into windows of {window_ms} ms; choose longer ones")
    count = -(-trace.period_ms // window_ms)
    edges_ms = np.minimum(np.arange(count + 1) * window_ms, trace.period_ms)
    delivered = np.bincount(np.maximum(trace.opportunities_ms - 1, 0) // window_ms, minlength=count)
    return edges_ms, delivered * (PACKET_MBIT * 1000) / np.diff(edges_ms)
