"""One direction of a link: when it may deliver.

A trace is a list of millisecond timestamps, each an opportunity to deliver one packet of up to 1500 bytes; a timestamp
given k times is k packets. At its last timestamp the trace starts again from zero (Netravali et al., "Mahimahi:
Accurate Record-and-Replay for HTTP", USENIX ATC 2015, section 4, LinkShell).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...models.errors import TraceError

PACKET_BYTES = 1500
PACKET_MBIT = PACKET_BYTES * 8 / 1e6
MOST_OPPORTUNITIES = 50_000_000
"""Of a trace that is read: 0.4 GB of memory (1.3 GB while it is read), 100 minutes at 100 Mbit/s."""
LARGEST_MS = 10**15


@dataclass(frozen=True, eq=False)
class Trace:
    """One direction of a link.

    `opportunities_ms`: (N,) sorted int64, milliseconds from the trace's start, each one chance to deliver 1500 bytes.
    Raises TraceError for none at all, negative or unsorted ones, or a last one at zero.
    """

    name: str
    opportunities_ms: NDArray[np.int64]

    def __post_init__(self) -> None:
        times = np.array(self.opportunities_ms, dtype=np.int64)
        times.setflags(write=False)
        object.__setattr__(self, "opportunities_ms", times)
        if times.ndim != 1 or times.size == 0:
            raise TraceError(f"trace {self.name}: no delivery opportunity in it")
        if times[0] < 0 or bool(np.any(np.diff(times) < 0)):
            raise TraceError(f"trace {self.name}: timestamps must be sorted and not negative")
        if times[-1] == 0:
            raise TraceError(f"trace {self.name}: the last timestamp is 0 ms; a trace must last at least 1 ms")

    @property
    def period_ms(self) -> int:
        """The trace starts again after this many milliseconds: its last timestamp."""
        return int(self.opportunities_ms[-1])

    @property
    def duration_s(self) -> float:
        return self.period_ms / 1000

    @property
    def mean_mbit_per_s(self) -> float:
        return self.opportunities_ms.size * PACKET_MBIT / self.duration_s

    @property
    def longest_outage_ms(self) -> int:
        """The longest wait between one opportunity and the next, the wrap at the end included."""
        return int(np.diff(self.opportunities_ms, prepend=0).max())

    def opportunities_by(self, elapsed_ms: float) -> int:
        """How many opportunities fall in [0, elapsed_ms], wraps included: the trace's integral, in packets."""
        if elapsed_ms < 0:
            return 0
        cycles, rest_ms = divmod(int(elapsed_ms), self.period_ms)  # whole ms: a float would have the array converted
        return cycles * self.opportunities_ms.size + int(self.opportunities_ms.searchsorted(rest_ms, side="right"))

    def time_of(self, index: int) -> int:
        """When opportunity `index` (from 0, counted on through the wraps) comes, in ms from the start."""
        cycles, place = divmod(index, self.opportunities_ms.size)
        return cycles * self.period_ms + int(self.opportunities_ms[place])


def with_outage(trace: Trace, start_s: float, length_s: float) -> Trace:
    """The same link, but nothing gets through for `length_s` seconds from `start_s` on in every period.

    Raises TraceError when the outage does not end before the period does.
    """
    start_ms, end_ms = start_s * 1000, (start_s + length_s) * 1000
    if not 0 <= start_ms <= end_ms < trace.period_ms:
        raise TraceError(f"an outage of {length_s} s from {start_s} s on does not fit into {trace.duration_s} s")
    times = trace.opportunities_ms
    return Trace(f"{trace.name}-outage", times[(times < start_ms) | (times >= end_ms)])
