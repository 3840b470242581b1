"""What the link to the cloud is worth now, estimated from the queries themselves. No clock inside: times are passed in,
so that live agents and replays run the same code."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_MAX_BITS_PER_MS = 1e6  # 1 Gbit/s: faster than any link whose transmission time could matter here
_MIN_BITS_PER_MS = 1.0
_SILENCE_MS = 1000.0
"""With nothing on its way and nothing heard for this long, a query is worth its bytes: it finds out whether an outage
has ended. Without it a link that was bad once would never be asked again."""


@dataclass
class _OnItsWay:
    sent_ms: float
    bytes_ahead: int  # its own included
    size_bytes: int


class LinkEstimator:
    """Bandwidth and round trip from (bytes, transit time) pairs, and the queue at the link.

    A query's transit is its total time less what the cloud spent: `round trip + bytes * 8 / bandwidth`, where the bytes
    are its own and those sent before it that were still on their way. The round trip is the smallest transit of the
    window; the bandwidth is all bytes over all the time beyond it (a harmonic mean, robust to bursts).

    Args:
        window: answered queries remembered.
        initial_bandwidth_kbps, initial_rtt_ms: believed before the first answer.
    """

    def __init__(self, window: int = 30, initial_bandwidth_kbps: float = 5000.0, initial_rtt_ms: float = 50.0) -> None:
        self._transits: deque[tuple[int, float]] = deque(maxlen=window)
        self._server: deque[float] = deque(maxlen=window)
        self._pending: dict[int, _OnItsWay] = {}
        self._pending_bytes = 0
        self._initial_rtt_ms = initial_rtt_ms
        self._initial_bits_per_ms = initial_bandwidth_kbps
        self._heard_ms = 0.0
        self.rtt_ms = initial_rtt_ms
        self.bits_per_ms = initial_bandwidth_kbps  # 1 bit/ms is 1 kbit/s

    @property
    def bandwidth_mbps(self) -> float:
        return self.bits_per_ms / 1e3

    @property
    def cloud_ms(self) -> float:
        """Mean time a query spends in the cloud: queue and compute."""
        return sum(self._server) / len(self._server) if self._server else 0.0

    @property
    def pending(self) -> int:
        return len(self._pending)

    def sent(self, query: int, size_bytes: int, now_ms: float) -> None:
        self._pending_bytes += size_bytes
        self._pending[query] = _OnItsWay(now_ms, self._pending_bytes, size_bytes)

    def answered(self, query: int, now_ms: float, server_ms: float) -> float:
        """Takes an answer in; returns its transit in ms (0 for a query it does not know)."""
        known = self._forget(query)
        if known is None:
            return 0.0
        transit_ms = max(now_ms - known.sent_ms - server_ms, 0.01)
        self._heard_ms = now_ms
        self._transits.append((known.bytes_ahead, transit_ms))
        self._server.append(server_ms)
        self._estimate()
        return transit_ms

    def lost(self, query: int, now_ms: float) -> None:
        """A query that met its deadline or died: the link carried its bytes in that time at the best."""
        known = self._forget(query)
        if known is not None and now_ms > known.sent_ms:
            self._heard_ms = now_ms
            self._transits.append((known.bytes_ahead, now_ms - known.sent_ms))
            self._estimate()

    def transit_ms(self, size_bytes: int) -> float:
        """Of one query on an idle link."""
        return self.rtt_ms + size_bytes * 8 / self.bits_per_ms

    def predict_ms(self, size_bytes: int, now_ms: float) -> float:
        """Of a query sent now: behind what is on its way, and not before an outage under way has ended."""
        queued = self.rtt_ms + (self._pending_bytes + size_bytes) * 8 / self.bits_per_ms
        if not self._pending:
            if now_ms - self._heard_ms > _SILENCE_MS:
                return min(queued, self._initial_rtt_ms + size_bytes * 8 / self._initial_bits_per_ms)
            return queued
        oldest = next(iter(self._pending.values()))
        overdue = (now_ms - oldest.sent_ms) - (self.rtt_ms + oldest.bytes_ahead * 8 / self.bits_per_ms + self.cloud_ms)
        return queued + max(overdue, 0.0)

    def _forget(self, query: int) -> _OnItsWay | None:
        known = self._pending.pop(query, None)
        if known is not None:
            self._pending_bytes -= known.size_bytes
        return known

    def _estimate(self) -> None:
        self.rtt_ms = min(transit for _, transit in self._transits)
        beyond = sum(transit - self.rtt_ms for _, transit in self._transits)
        bits = 8 * sum(size for size, _ in self._transits)
        self.bits_per_ms = min(max(bits / max(beyond, 1e-6), _MIN_BITS_PER_MS), _MAX_BITS_PER_MS)
