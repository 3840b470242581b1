"""What the link to the cloud is worth now, estimated from the queries themselves. No clock inside: times are passed in,
so that live agents and replays run the same code."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from .window import Window

_MAX_BITS_PER_MS = 1e6  # 1 Gbit/s: faster than any link whose transmission time could matter here
_MIN_BITS_PER_MS = 1.0
_SILENCE_MS = 1000.0
"""After a loss, with nothing on its way and nothing heard for this long, a query is worth its bytes: it finds out
whether the outage has ended. Without it a link that was bad once would never be asked again."""


@dataclass(frozen=True)
class _OnItsWay:
    sent_ms: float
    size_bytes: int


class LinkEstimator:
    """Bandwidth and round trip from (bytes, transit time) pairs, and the queue at the link.

    A query's transit is its total time less what the cloud spent. The link is a queue, first in, first out: it carries
    a query's bytes when it is sent or when those before it have been carried, whichever is later, and half a round trip
    stands before and behind. So the link was busy with a query for `transit - round trip`, and for no longer than since
    the answer before. The bandwidth is all bytes of the window over all the time the link was busy with them (a
    harmonic mean, robust to bursts); the round trip is the smallest transit less its own transmission. Queries of one
    size that never wait for each other cannot tell the two apart: then the round trip holds most of the transit, and
    the sum is right all the same.

    Args:
        window: answered queries remembered.
        initial_bandwidth_kbps, initial_rtt_ms: believed before the first answer.

    Attributes:
        cloud_ms: mean time a query spends in the cloud, queue and compute.
    """

    def __init__(self, window: int = 30, initial_bandwidth_kbps: float = 5000.0, initial_rtt_ms: float = 50.0) -> None:
        # Bytes that the link carried, and two bounds of how long it took for them alone: the transit, with the round trip and
        # what it waited for, and the gap since the bytes before arrived. Last, whether they were lost.
        self._carried = Window(window, 4)
        self._server: deque[float] = deque(maxlen=window)
        self._pending: dict[int, _OnItsWay] = {}
        self._initial_rtt_ms = initial_rtt_ms
        self._initial_bits_per_ms = initial_bandwidth_kbps
        self._heard_ms = 0.0
        self._lossy = False
        self._arrived_ms = float("-inf")  # the latest answer, less what the cloud spent on it
        self.rtt_ms = initial_rtt_ms
        self.bits_per_ms = initial_bandwidth_kbps  # 1 bit/ms is 1 kbit/s
        self.cloud_ms = 0.0

    @property
    def bandwidth_mbps(self) -> float:
        return self.bits_per_ms / 1e3

    @property
    def pending(self) -> int:
        return len(self._pending)

    def sent(self, query: int, size_bytes: int, now_ms: float) -> None:
        self._pending[query] = _OnItsWay(now_ms, size_bytes)

    def answered(self, query: int, now_ms: float, server_ms: float) -> float:
        """Takes an answer in; returns its transit in ms (0 for a query it does not know)."""
        known = self._pending.pop(query, None)
        if known is None:
            return 0.0
        self._server.append(server_ms)
        self.cloud_ms = sum(self._server) / len(self._server)
        return self._carry(known, now_ms, server_ms, lost=False)

    def lost(self, query: int, now_ms: float) -> None:
        """A query that met its deadline: the link carried its bytes in that time at the best."""
        known = self._pending.pop(query, None)
        if known is not None:
            self._carry(known, now_ms, 0.0, lost=True)

    def dropped(self, query: int) -> None:
        """A query that failed for another reason than time: it says nothing of the link."""
        self._pending.pop(query, None)

    def transit_ms(self, size_bytes: int) -> float:
        """Of one query on an idle link."""
        return self.rtt_ms + size_bytes * 8 / self.bits_per_ms

    def predict_ms(self, size_bytes: int, now_ms: float) -> float:
        """Transit of a query sent now: behind what is on its way, and not before an outage under way has ended."""
        if not self._pending:
            if now_ms - self._heard_ms > _SILENCE_MS and self._lossy:
                unheard = self._initial_rtt_ms + size_bytes * 8 / self._initial_bits_per_ms
                return min(self.transit_ms(size_bytes), unheard)
            return self.transit_ms(size_bytes)
        free_ms, oldest_due_ms = self._arrived_ms - self.rtt_ms, None
        for query in self._pending.values():
            free_ms = max(free_ms, query.sent_ms) + query.size_bytes * 8 / self.bits_per_ms
            oldest_due_ms = oldest_due_ms or free_ms + self.rtt_ms + self.cloud_ms
        overdue_ms = now_ms - (oldest_due_ms or now_ms)  # an outage lasts as long again as it has lasted
        return max(free_ms - now_ms, 0.0) + max(overdue_ms, 0.0) + self.transit_ms(size_bytes)

    def _carry(self, query: _OnItsWay, now_ms: float, server_ms: float, lost: bool) -> float:
        self._heard_ms = now_ms
        arrived_ms = max(now_ms - server_ms, query.sent_ms + 0.01)
        gap_ms = max(arrived_ms - self._arrived_ms, 0.0)
        self._arrived_ms = max(arrived_ms, self._arrived_ms)
        self._carried.add(query.size_bytes, arrived_ms - query.sent_ms, gap_ms, lost)
        self._estimate()
        return arrived_ms - query.sent_ms

    def _estimate(self) -> None:
        size_bytes, transit_ms, gap_ms, lost = self._carried.columns
        self._lossy = bool(lost.any())  # asked for every frame
        bits = 8.0 * float(size_bytes.sum())
        self.rtt_ms = float(transit_ms.min())
        self.bits_per_ms = _rate(bits, float(np.minimum(transit_ms - self.rtt_ms, gap_ms).sum()))
        # Once: a further round would take more of the transmission out of the round trip, and the mean jitter too.
        self.rtt_ms = max(float((transit_ms - size_bytes * (8 / self.bits_per_ms)).min()), 0.0)
        self.bits_per_ms = _rate(bits, float(np.minimum(transit_ms - self.rtt_ms, gap_ms).sum()))


def _rate(bits: float, busy_ms: float) -> float:
    return min(max(bits / max(busy_ms, 1e-6), _MIN_BITS_PER_MS), _MAX_BITS_PER_MS)
