"""A TCP proxy that makes loopback behave like the link of a bandwidth trace.

Each direction is one queue, first in first out, shared by all connections, as at the bottleneck of a mobile link. An
opportunity of the trace carries up to 1500 bytes of payload from the head of the queue, across chunks and connections;
one that finds the queue empty is lost. What was carried arrives after the propagation delay. A connection may have
32 KiB waiting in a queue; past that its socket is not read, so a bulk transfer cannot put more than that ahead of
another connection's short message.

An outage stalls what waits. With `reset_after_ms` it also breaks: once data has waited that long and nothing was carried,
every connection is reset and what waited is lost, as where a device gets a new address or a middlebox forgets it.

Not shaped: TCP's and IP's headers, and the handshake (the connection to the target is opened at once).
"""

from __future__ import annotations

import asyncio
import logging
import select
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import closing, suppress

from ..models.errors import ConfigError
from .link_queue import LinkQueue, Pipe
from .traces import Trace

_log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
_ACCEPT_RETRY_S = 0.1
_UNREAD_READS = 64
_WATCH_S = 0.02
_LINGER_NOT = struct.pack("ii", 1, 0)  # close() with a reset


class LinkShaper:
    """A TCP proxy in front of (`target_host`, `target_port`): `uplink` is client to target, `downlink` the way back.

    `propagation_ms` is one way, added in both directions. Runs in the event loop that calls `start`. Raises ConfigError
    for a negative propagation, and from `start` when it cannot listen. A target that refuses, resets or does not accept
    within 10 s shows to the client as a closed connection. `reset_after_ms`: of an outage; None: outages reset nothing.
    """

    def __init__(
        self,
        listen_host: str,
        target_host: str,
        target_port: int,
        uplink: Trace,
        downlink: Trace,
        propagation_ms: float,
        *,
        listen_port: int = 0,
        reset_after_ms: float | None = None,
    ) -> None:
        if not 0 <= propagation_ms < float("inf"):
            raise ConfigError(f"propagation_ms is {propagation_ms}; it must be 0 or more")
        if reset_after_ms is not None and not 0 < reset_after_ms < float("inf"):
            raise ConfigError(f"reset_after_ms is {reset_after_ms}; it must be above 0")
        self._listen_at = (listen_host, listen_port)
        self._target_at = (target_host, target_port)
        self._propagation_ms = propagation_ms
        self._clock_ms: Callable[[], float] = lambda: 0.0
        self._up = LinkQueue(uplink, self.elapsed_ms)
        self._down = LinkQueue(downlink, self.elapsed_ms)
        self._reset_after_ms = reset_after_ms
        self._tasks: set[asyncio.Task[None]] = set()
        self._relays: dict[asyncio.Task[None], list[socket.socket]] = {}  # both ends of each connection
        self._listener: socket.socket | None = None

    @property
    def bytes_up(self) -> int:
        """Payload bytes that the uplink has carried."""
        return self._up.carried_bytes

    @property
    def bytes_down(self) -> int:
        """Payload bytes that the downlink has carried."""
        return self._down.carried_bytes

    @property
    def waiting_up(self) -> int:
        """Payload bytes now waiting for the uplink: 32 KiB a connection at most."""
        return self._up.waiting_bytes

    @property
    def waiting_down(self) -> int:
        """Payload bytes now waiting for the downlink: 32 KiB a connection at most."""
        return self._down.waiting_bytes

    def elapsed_ms(self) -> float:
        """Where the link stands on its traces: milliseconds since `start` (0 before it)."""
        return self._clock_ms()

    async def start(self) -> int:
        """Listens, starts the traces at 0 ms, and returns the port."""
        host, port = self._listen_at
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            raise ConfigError(f"the link shaper cannot listen on {host} port {port}: {error}") from error
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        self._clock_ms = lambda: (loop.time() - start_s) * 1000
        self._listener = listener
        for queue in (self._up, self._down):
            self._tasks.add(asyncio.create_task(queue.run()))
        if self._reset_after_ms is not None:
            self._tasks.add(asyncio.create_task(self._break_in_outages(self._reset_after_ms)))
        loop.add_reader(listener, self._accept, listener)
        return int(listener.getsockname()[1])

    async def close(self) -> None:
        """Stops listening and closes every connection at once; what is under way is lost. Safe to call twice."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        tasks = [*self._tasks, *self._relays]
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            client, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # out of file descriptors: the client waits until some are free
            _log.warning("event=accept_failed error=%s", error)
            loop.remove_reader(listener)
            loop.call_later(_ACCEPT_RETRY_S, self._accept_again, listener)
            return
        client.setblocking(False)
        ends = [client]
        task = loop.create_task(self._relay(ends))
        self._relays[task] = ends
        task.add_done_callback(self._ended)  # also when cancelled before its first step

    def _ended(self, relay: asyncio.Task[None]) -> None:
        for end in self._relays.pop(relay):
            _hang_up(end)

    async def _break_in_outages(self, reset_after_ms: float) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            for queue in (self._up, self._down):
                if queue.stalled_ms < reset_after_ms:
                    continue
                _log.info("event=connections_reset connections=%d", len(self._relays))
                queue.clear()
                for relay, ends in self._relays.items():
                    for end in ends:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
                    relay.cancel()

    def _accept_again(self, listener: socket.socket) -> None:
        if self._listener is listener:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    async def _relay(self, ends: list[socket.socket]) -> None:
        """Connects the client, the one end that there is, to the target, the other one."""
        try:
            ends.append(await self._dial())
        except OSError as error:
            _log.info("event=target_unreachable target=%s:%d error=%s", *self._target_at, error)
            return
        await self._carry(*ends)

    async def _dial(self) -> socket.socket:
        """A connection to the target, by the first of its addresses that accepts. Raises OSError."""
        loop = asyncio.get_running_loop()
        failure = OSError("the target's name has no address")
        addresses = await loop.getaddrinfo(*self._target_at, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in addresses:
            target = socket.socket(family, kind, protocol)
            target.setblocking(False)
            # Not asyncio.wait_for: until Python 3.12 it can swallow the cancellation that `close` sends.
            connecting = asyncio.ensure_future(loop.sock_connect(target, address))
            connected = False
            try:
                await asyncio.wait({connecting}, timeout=CONNECT_TIMEOUT_S)
                if not connecting.done():
                    raise TimeoutError(f"no answer within {CONNECT_TIMEOUT_S:g} s")
                connecting.result()
                connected = True
                return target
            except OSError as error:
                failure = error
            finally:
                if not connected:
                    connecting.cancel()
                    await asyncio.gather(connecting, return_exceptions=True)
                    target.close()
        raise failure

    async def _carry(self, client: socket.socket, target: socket.socket) -> None:
        """Carries both directions until both have ended, or until either side is reset."""
        for end in (client, target):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pipes = (
            Pipe(client, target, self._up, self._propagation_ms),
            Pipe(target, client, self._down, self._propagation_ms),
        )
        readers = [asyncio.create_task(pipe.read()) for pipe in pipes]
        deliveries = [asyncio.create_task(pipe.deliver()) for pipe in pipes]
        pending, whole = set(deliveries), True
        try:
            while pending and whole:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                whole = all(task.result() for task in done)
        finally:
            for pipe in pipes:
                pipe.close()
            for task in (*readers, *deliveries):
                task.cancel()
            await asyncio.gather(*readers, *deliveries, return_exceptions=True)


def _hang_up(end: socket.socket) -> None:
    """Closes with an end of stream, unless a reset is asked for by the socket's linger option. Unread bytes would turn the end
    into a reset, so they are read and dropped first."""
    with suppress(OSError):
        if end.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER):
            end.close()
            return
        end.shutdown(socket.SHUT_WR)
        for _ in range(_UNREAD_READS):
            if not end.recv(1 << 16):
                break
    end.close()


class _FineSelector(selectors.DefaultSelector):
    """Waits to the microsecond, where the system's epoll rounds up to whole milliseconds."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0:
            select.select([self.fileno()], [], [], timeout)  # an epoll can be waited for like a file
            timeout = 0
        return super().select(timeout)


def fine_event_loop() -> asyncio.AbstractEventLoop:
    """An event loop whose timers are late by tens of microseconds instead of up to a millisecond."""
    return asyncio.SelectorEventLoop(_FineSelector() if hasattr(select, "epoll") else None)


class ShaperThread:
    """Runs a LinkShaper in a background thread with an event loop of its own; it is running once constructed.

        with ShaperThread(LinkShaper("127.0.0.1", "127.0.0.1", port, up, down, propagation_ms=20)) as link:
            connect_to(link.port)

    Raises what `LinkShaper.start` raises. `close` (or leaving the `with`) stops it and waits for the thread.
    """

    def __init__(self, shaper: LinkShaper) -> None:
        self._shaper = shaper
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self.port = 0
        self._thread = threading.Thread(target=self._run, name="link-shaper", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def __enter__(self) -> ShaperThread:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def bytes_up(self) -> int:
        """Payload bytes that the uplink has carried."""
        return self._shaper.bytes_up

    @property
    def bytes_down(self) -> int:
        """Payload bytes that the downlink has carried."""
        return self._shaper.bytes_down

    def close(self) -> None:
        if self._loop is not None and self._stop is not None:
            with suppress(RuntimeError):  # the loop is closed already
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        with closing(fine_event_loop()) as loop:
            loop.run_until_complete(self._main())

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            self.port = await self._shaper.start()
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._started.set()
        await self._stop.wait()
        await self._shaper.close()
