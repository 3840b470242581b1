"""One direction of a shaped link: the queue that a trace drains, and the pipes that fill it and empty it.

Time is the event loop's. The loop wakes late by a millisecond or so; on waking, the queue is served by every
opportunity since, at its own time in the trace, so that lateness never adds up. Data that a sender already had ready
when the limit stopped it counts as there from the moment it got room.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .traces import PACKET_BYTES, Trace

QUEUE_LIMIT_BYTES = 32 * 1024


@dataclass
class _Chunk:
    pipe: Pipe
    data: memoryview
    since_ms: float  # opportunities before this moment are not for this chunk


class LinkQueue:
    """One direction of the link: the queue that all connections share, and the trace that drains it."""

    def __init__(self, trace: Trace, clock_ms: Callable[[], float]) -> None:
        self.clock_ms = clock_ms
        self.carried_bytes = 0
        self.waiting_bytes = 0
        self._trace = trace
        self._next = 0  # index of the first opportunity neither used nor lost
        self._carried_ms = 0.0  # when it carried last
        self._queue: deque[_Chunk] = deque()
        self._filled = asyncio.Event()

    def put(self, chunk: _Chunk) -> None:
        self._queue.append(chunk)
        self.waiting_bytes += len(chunk.data)
        self._filled.set()

    @property
    def stalled_ms(self) -> float:
        """For how long what waits at the head has waited while nothing was carried; 0 where nothing waits."""
        return self.clock_ms() - max(self._queue[0].since_ms, self._carried_ms) if self._queue else 0.0

    def clear(self) -> None:
        """Drops what waits."""
        self._queue.clear()
        self.waiting_bytes = 0

    async def run(self) -> None:
        while True:
            next_ms = self._serve(self.clock_ms())
            if next_ms is None:
                self._filled.clear()
                await self._filled.wait()
            else:
                await asyncio.sleep((next_ms - self.clock_ms()) / 1000)

    def _serve(self, now_ms: float) -> int | None:
        """Uses the opportunities up to now; returns the time of the next usable one, None when nothing waits."""
        while self._queue:
            at_ms = self._trace.time_of(self._next)
            since_ms = self._queue[0].since_ms
            if at_ms < since_ms:
                self._next = self._trace.opportunities_by(since_ms)
                continue
            if at_ms > now_ms:
                return at_ms
            self._next += 1
            self._carry_packet(at_ms)
        return None

    def _carry_packet(self, at_ms: int) -> None:
        room, self._carried_ms = PACKET_BYTES, float(at_ms)
        while room and self._queue and self._queue[0].since_ms <= at_ms:
            chunk = self._queue[0]
            piece = chunk.data[:room]
            if len(piece) == len(chunk.data):
                self._queue.popleft()
            else:
                chunk.data = chunk.data[room:]
            room -= len(piece)
            self.waiting_bytes -= len(piece)
            self.carried_bytes += len(piece)
            chunk.pipe.carried(piece, at_ms)


class Pipe:
    """One direction of one connection: reads its source into the queue, delivers to its sink what was carried."""

    def __init__(self, source: socket.socket, sink: socket.socket, link: LinkQueue, propagation_ms: float) -> None:
        self._source, self._sink, self._link = source, sink, link
        self._propagation_ms = propagation_ms
        self._waiting_bytes = 0
        self._room_since_ms = 0.0  # when the limit last stopped holding the source back
        self._sink_full = False
        self._may_read = asyncio.Event()
        self._may_read.set()
        self._ended = False  # the source has no more
        self._broken = False  # ... because it was reset
        self._closed = False
        self._out: deque[tuple[float, memoryview]] = deque()  # (arrival_ms, payload)
        self._due = asyncio.Event()
        self._end_ms: float | None = None  # when the end of the stream arrives

    async def read(self) -> None:
        """Queues the source's bytes until its end, never more than the limit at a time."""
        loop = asyncio.get_running_loop()
        while True:
            held_back = not self._may_read.is_set()
            await self._may_read.wait()
            room = QUEUE_LIMIT_BYTES - self._waiting_bytes
            try:
                try:
                    data = self._source.recv(room)
                    since_ms = self._room_since_ms if held_back else self._link.clock_ms()
                except (BlockingIOError, InterruptedError):
                    data = await loop.sock_recv(self._source, room)
                    since_ms = self._link.clock_ms()
            except OSError:
                data, since_ms, self._broken = b"", self._link.clock_ms(), True
            if not data:
                self._ended = True
                self._schedule_end(since_ms)
                return
            self._waiting_bytes += len(data)
            self._set_may_read()
            self._link.put(_Chunk(self, memoryview(data), since_ms))

    def carried(self, piece: memoryview, at_ms: float) -> None:
        """Called by the link: `piece` left the queue at `at_ms`."""
        if self._waiting_bytes == QUEUE_LIMIT_BYTES:
            self._room_since_ms = at_ms
        self._waiting_bytes -= len(piece)
        self._set_may_read()
        if not self._closed:
            self._out.append((at_ms + self._propagation_ms, piece))
            self._due.set()
        if self._ended:
            self._schedule_end(at_ms)

    async def deliver(self) -> bool:
        """Writes to the sink as data arrives, then its end (half-close). False when either side was reset."""
        try:
            while await self._arrival():
                now_ms = self._link.clock_ms()
                arrived: list[memoryview] = []
                while self._out and self._out[0][0] <= now_ms:
                    arrived.append(self._out.popleft()[1])
                await self._write(b"".join(arrived))
            self._sink.shutdown(socket.SHUT_WR)
        except OSError:
            return False
        return not self._broken

    def close(self) -> None:
        """Gives up: what still waits in the queue crosses the link, as packets under way do, and is dropped."""
        self._closed = True
        self._out.clear()

    async def _arrival(self) -> bool:
        """Waits until the next payload arrives; False when the end of the stream has."""
        while not self._out and self._end_ms is None:
            self._due.clear()
            await self._due.wait()
        arrival_ms = self._out[0][0] if self._out else self._end_ms or 0.0
        while (left_ms := arrival_ms - self._link.clock_ms()) > 0:
            await asyncio.sleep(left_ms / 1000)
        return bool(self._out)

    async def _write(self, data: bytes) -> None:
        try:
            sent = self._sink.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        if sent == len(data):
            return
        self._sink_full = True
        self._set_may_read()
        await asyncio.get_running_loop().sock_sendall(self._sink, memoryview(data)[sent:])
        self._sink_full = False
        self._room_since_ms = self._link.clock_ms()
        self._set_may_read()

    def _schedule_end(self, since_ms: float) -> None:
        if self._waiting_bytes == 0:
            self._end_ms = since_ms + self._propagation_ms
            self._due.set()

    def _set_may_read(self) -> None:
        if self._waiting_bytes < QUEUE_LIMIT_BYTES and not self._sink_full:
            self._may_read.set()
        else:
            self._may_read.clear()
