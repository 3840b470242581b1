"""One direction of a link in virtual time: when does what is sent now get through?"""

from __future__ import annotations

from ..traces import PACKET_BYTES, Trace


class VirtualLink:
    """The queue of `edgefm.deploy.link_queue` without sockets: first in, first out, drained by a trace.

    An opportunity carries up to 1500 bytes of what waits when it comes, across messages; one that finds nothing is lost.
    Messages must be sent in order of time.

    Attributes:
        carried_bytes: of all messages sent so far.
    """

    def __init__(self, trace: Trace, begin_ms: float = 0.0) -> None:
        """`begin_ms`: where on the trace the clock's zero stands."""
        self._times, self._period_ms = trace.opportunities_ms, trace.period_ms
        self._begin_ms = begin_ms
        self._next = 0  # first opportunity neither used nor lost
        self._room = 0  # bytes that the one before it has left
        self._free_ms = -1.0  # when that one comes
        self.carried_bytes = 0

    def send(self, size_bytes: int, now_ms: float) -> float:
        """When the last byte of a message sent now leaves the link, in ms."""
        now_ms += self._begin_ms
        self.carried_bytes += size_bytes
        if now_ms > self._free_ms:
            self._next, self._room = self._opportunities_by(now_ms), 0
        size_bytes -= self._room
        packets = -(-size_bytes // PACKET_BYTES)
        if packets > 0:
            self._next += packets
            self._free_ms = self._time_of(self._next - 1)
        self._room = packets * PACKET_BYTES - size_bytes
        return self._free_ms - self._begin_ms

    def _opportunities_by(self, now_ms: float) -> int:
        """`Trace.opportunities_by`, without looking at the trace anew for each of a million messages."""
        cycles, rest_ms = divmod(int(now_ms), self._period_ms)
        return cycles * self._times.size + int(self._times.searchsorted(rest_ms, "right"))

    def _time_of(self, index: int) -> float:
        cycles, place = divmod(index, self._times.size)
        return float(cycles * self._period_ms + self._times.item(place))
