"""A link shaper before a target of the test's, both on real sockets in the test's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from edgefm.deploy.shaper import LinkShaper
from edgefm.deploy.traces import Trace, constant_trace

HOST = "127.0.0.1"
FAST = constant_trace(400.0)
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="session")
def run() -> Callable[[Coroutine[Any, Any, None]], None]:
    """Runs a test in a loop of its own, within 5 s; whatever the loop had to report about stray tasks fails it."""

    def within_5_s(main: Coroutine[Any, Any, None]) -> None:
        reports: list[dict[str, Any]] = []

        async def watched() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, report: reports.append(report))
            await asyncio.wait_for(main, 5.0)

        asyncio.run(watched())
        assert not reports

    return within_5_s


@asynccontextmanager
async def _shaped(
    handler: Handler,
    up: Trace = FAST,
    down: Trace = FAST,
    propagation_ms: float = 0.0,
    rcvbuf: int | None = None,
    reset_after_ms: float | None = None,
) -> AsyncIterator[tuple[LinkShaper, int]]:
    listener = socket.create_server((HOST, 0))
    if rcvbuf is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)

    serving: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        with contextlib.suppress(ConnectionError):
            await handler(reader, writer)
        await _hang_up(writer)

    server = await asyncio.start_server(serve, sock=listener)
    shaper = LinkShaper(
        HOST, "localhost", listener.getsockname()[1], up, down, propagation_ms, reset_after_ms=reset_after_ms
    )
    port = await shaper.start()
    try:
        yield shaper, port
    finally:
        await shaper.close()
        server.close()
        await asyncio.gather(*serving)  # the target sees its connections end


@pytest.fixture(scope="session")
def shaped() -> Callable[..., AbstractAsyncContextManager[tuple[LinkShaper, int]]]:
    """Starts a target with that handler and a shaper before it; gives the shaper and its port."""
    return _shaped


async def _hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@pytest.fixture(scope="session")
def hang_up() -> Callable[[asyncio.StreamWriter], Awaitable[None]]:
    return _hang_up
