"""The link shaper on real sockets: capacity, delay, order, limits, and every way a connection ends."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import numpy as np
import pytest
from edgefm.deploy.link_queue import QUEUE_LIMIT_BYTES
from edgefm.deploy.shaper import LinkShaper, ShaperThread
from edgefm.deploy.traces import PACKET_BYTES, Trace, constant_trace, synthetic_trace, with_outage
from edgefm.models.errors import ConfigError

HOST = "127.0.0.1"
FAST = constant_trace(400.0)
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a test in a loop of its own, within 5 s; whatever the loop had to report about stray tasks fails it."""
    reports: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, report: reports.append(report))
        await asyncio.wait_for(main, 5.0)

    asyncio.run(watched())
    assert not reports


@asynccontextmanager
async def shaped(
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
        await hang_up(writer)

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


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


async def pour(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(bytes(1 << 16))
            await writer.drain()


class Counter:
    """A target that counts what it is sent."""

    def __init__(self) -> None:
        self.received = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 18):
            self.received += len(data)


def capacity(trace: Trace, from_ms: float, to_ms: float) -> int:
    return (trace.opportunities_by(to_ms) - trace.opportunities_by(from_ms)) * PACKET_BYTES


@pytest.mark.parametrize(
    ("up", "down", "share"),
    [
        (constant_trace(20.0), constant_trace(5.0), 0.93),
        (constant_trace(100.0), constant_trace(1.0), 0.8),
        (synthetic_trace(7), constant_trace(5.0), 0.93),
    ],
)
def test_each_direction_delivers_its_capacity_and_never_more(up: Trace, down: Trace, share: float) -> None:
    async def main() -> None:
        sent_up = Counter()

        async def both_ways(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            pouring = asyncio.create_task(pour(writer))
            await sent_up(reader, writer)
            await pouring

        async with shaped(both_ways, up, down) as (shaper, port):
            began_ms = shaper.elapsed_ms()
            reader, writer = await asyncio.open_connection(HOST, port)
            sent_down = Counter()
            tasks = [asyncio.create_task(pour(writer)), asyncio.create_task(sent_down(reader, writer))]
            now_ms, got = began_ms, (0, 0)
            while now_ms < began_ms + 1000:
                await asyncio.sleep(0.1)
                got = sent_up.received, sent_down.received
                carried = shaper.bytes_up, shaper.bytes_down
                now_ms = shaper.elapsed_ms()
                for trace, received, passed in zip((up, down), got, carried, strict=True):
                    assert received <= passed <= capacity(trace, began_ms, now_ms)
            for trace, received in zip((up, down), got, strict=True):
                assert received >= share * capacity(trace, began_ms, now_ms)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            writer.transport.abort()

    run(main())


def test_a_loop_that_wakes_late_catches_up() -> None:
    link = constant_trace(20.0)

    async def main() -> None:
        counter = Counter()
        async with shaped(counter, up=link) as (shaper, port):
            _, writer = await asyncio.open_connection(HOST, port)
            pouring = asyncio.create_task(pour(writer))
            began_ms = shaper.elapsed_ms()
            while shaper.elapsed_ms() < began_ms + 600:
                time.sleep(0.03)  # 75 kB pass on the trace meanwhile, twice what the queue may hold
                await asyncio.sleep(0.005)
            received, now_ms = counter.received, shaper.elapsed_ms()
            assert 0.85 * capacity(link, began_ms, now_ms) <= received <= capacity(link, began_ms, now_ms)
            pouring.cancel()
            writer.transport.abort()

    run(main())


def test_opportunities_nobody_used_are_lost() -> None:
    link = constant_trace(4.0)

    async def main() -> None:
        async with shaped(echo, up=link) as (shaper, port):
            reader, writer = await asyncio.open_connection(HOST, port)
            for _ in range(2):
                await asyncio.sleep(0.2)  # 67 opportunities pass
                began_ms = shaper.elapsed_ms()
                writer.write(bytes(30_000))
                await reader.readexactly(30_000)
                now_ms = shaper.elapsed_ms()
                assert capacity(link, began_ms, now_ms) >= 30_000
                assert now_ms - began_ms >= 19 * 3.0
            await hang_up(writer)

    run(main())


def test_propagation_delay_is_added_each_way() -> None:
    async def main() -> None:
        async with shaped(echo, propagation_ms=40.0) as (_, port):
            reader, writer = await asyncio.open_connection(HOST, port)
            round_trips_ms: list[float] = []
            for _ in range(5):
                began = time.perf_counter()
                writer.write(b"ping")
                assert await reader.readexactly(4) == b"ping"
                round_trips_ms.append((time.perf_counter() - began) * 1000)
            assert min(round_trips_ms) >= 80.0
            assert min(round_trips_ms) < 95.0
            await hang_up(writer)

    run(main())


def test_the_trace_starts_again_at_its_end() -> None:
    link = Trace("burst", np.array([*range(1, 21), 100], dtype=np.int64))

    async def main() -> None:
        async with shaped(echo, up=link) as (shaper, port):
            reader, writer = await asyncio.open_connection(HOST, port)
            began_ms = shaper.elapsed_ms()
            writer.write(bytes(60 * PACKET_BYTES))
            await reader.readexactly(60 * PACKET_BYTES)
            now_ms = shaper.elapsed_ms()
            due_ms = link.time_of(link.opportunities_by(began_ms) + 59)
            assert due_ms >= 2 * link.period_ms
            assert due_ms <= now_ms < due_ms + 2 * link.period_ms
            await hang_up(writer)

    run(main())


def test_two_connections_keep_their_bytes_and_their_order() -> None:
    draw = random.Random(11)
    payloads = [draw.randbytes(150_000), draw.randbytes(97_531)]

    async def main() -> None:
        async with shaped(echo, constant_trace(30.0), constant_trace(20.0), propagation_ms=5.0) as (shaper, port):

            async def exchange(payload: bytes, seed: int) -> bytes:
                sizes = random.Random(seed)
                reader, writer = await asyncio.open_connection(HOST, port)

                async def send() -> None:
                    sent = 0
                    while sent < len(payload):
                        size = sizes.randint(1, 5000)
                        writer.write(payload[sent : sent + size])
                        await writer.drain()
                        sent += size
                    writer.write_eof()

                sending = asyncio.create_task(send())
                answer = await reader.read(-1)
                await sending
                await hang_up(writer)
                return answer

            answers = await asyncio.gather(*(exchange(payload, seed) for seed, payload in enumerate(payloads)))
            assert answers == payloads
            assert shaper.bytes_up == shaper.bytes_down == sum(map(len, payloads))
            assert shaper.waiting_up == shaper.waiting_down == 0

    run(main())


def test_one_queue_serves_connections_first_in_first_out() -> None:
    arrivals: list[str] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrivals.append((await reader.read(-1))[-5:].decode())

    async def main() -> None:
        async with shaped(note, up=constant_trace(1.0)) as (shaper, port):
            writers = [(await asyncio.open_connection(HOST, port))[1] for _ in range(2)]
            writers[0].write(bytes(9_000) + b"first")  # 7 packets: 84 ms
            writers[0].write_eof()
            while shaper.waiting_up == 0:
                await asyncio.sleep(0.001)
            writers[1].write(b"later")
            writers[1].write_eof()
            while shaper.bytes_up < 1500:
                await asyncio.sleep(0.001)
            assert shaper.waiting_up > PACKET_BYTES  # the second came while most of the first was waiting
            while len(arrivals) < 2:
                await asyncio.sleep(0.005)
            for writer in writers:
                await hang_up(writer)
        assert arrivals == ["first", "later"]

    run(main())


def test_half_close_arrives_after_the_queued_data_and_leaves_the_way_back_open() -> None:
    async def answer_at_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.read(-1)
        writer.write(len(request).to_bytes(4, "big") + bytes(20_000))
        await writer.drain()

    async def main() -> None:
        async with shaped(answer_at_the_end, constant_trace(10.0), constant_trace(10.0), 10.0) as (shaper, port):
            reader, writer = await asyncio.open_connection(HOST, port)
            began_ms = shaper.elapsed_ms()
            writer.write(bytes(50_000))
            writer.write_eof()
            answer = await reader.read(-1)
            assert int.from_bytes(answer[:4], "big") == 50_000
            assert len(answer) == 20_004
            assert shaper.elapsed_ms() - began_ms >= 33 * 1.2 + 13 * 1.2 + 20
            await hang_up(writer)

    run(main())


def dead_port() -> int:
    with socket.create_server((HOST, 0)) as taken:
        return int(taken.getsockname()[1])


def test_a_dead_target_shows_as_a_closed_connection() -> None:
    async def main() -> None:
        shaper = LinkShaper(HOST, HOST, dead_port(), FAST, FAST, 0.0)
        port = await shaper.start()
        for _ in range(3):
            reader, writer = await asyncio.open_connection(HOST, port)
            assert await reader.read(-1) == b""
            await hang_up(writer)
        assert shaper.bytes_up == shaper.bytes_down == 0
        await shaper.close()

    run(main())


def reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    writer.transport.abort()


def test_a_reset_at_either_end_closes_the_other() -> None:
    ends: list[bytes] = []

    async def target(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.read(5)
        if request == b"reset":
            reset(writer)
        else:
            ends.append(await reader.read(-1))

    async def main() -> None:
        async with shaped(target) as (_, port):
            tasks = len(asyncio.all_tasks())
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(b"reset")
            assert await reader.read(-1) == b""
            while len(asyncio.all_tasks()) > tasks:  # given up both ways, though the client's side is still open
                await asyncio.sleep(0.005)
            await hang_up(writer)
            _, writer = await asyncio.open_connection(HOST, port)
            writer.write(b"hello")
            await asyncio.sleep(0.05)
            reset(writer)
            while not ends:
                await asyncio.sleep(0.005)
        assert ends == [b""]

    run(main())


def test_an_outage_resets_every_connection_once_data_has_waited_long_enough() -> None:
    """300 ms without an opportunity, from 200 ms on; what is sent into it never comes, and a new connection works after it."""
    received: list[bytes] = []
    gap = with_outage(FAST, 0.2, 0.3)

    async def target(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            received.append(data)
            writer.write(data)

    async def main() -> None:
        async with shaped(target, up=gap, reset_after_ms=100.0) as (shaper, port):
            idle, idle_writer = await asyncio.open_connection(HOST, port)
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(b"before")
            assert await reader.read(100) == b"before"
            while shaper.elapsed_ms() < 220:
                await asyncio.sleep(0.005)
            writer.write(b"lost")
            with pytest.raises(ConnectionResetError):
                await reader.read(100)
            assert 320 <= shaper.elapsed_ms() < 500 and shaper.waiting_up == 0
            with pytest.raises(ConnectionResetError):
                await idle.read(100)
            idle_writer.close()
            writer.close()
            while shaper.elapsed_ms() < 500:
                await asyncio.sleep(0.005)
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(b"after")
            assert await reader.read(100) == b"after" and received == [b"before", b"after"]
            await hang_up(writer)

    run(main())


def test_a_bulk_transfer_puts_at_most_the_limit_ahead_of_a_short_message() -> None:
    link = constant_trace(8.0)
    at_arrival: list[int] = []

    async def main() -> None:
        async def target(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1 << 16):
                if data == b"short":
                    at_arrival.append(shaper.bytes_up)

        async with shaped(target, up=link) as (shaper, port):
            _, bulk = await asyncio.open_connection(HOST, port)
            _, other = await asyncio.open_connection(HOST, port)
            pouring = asyncio.create_task(pour(bulk))
            most = 0
            for _ in range(150):
                await asyncio.sleep(0.001)
                most = max(most, shaper.waiting_up)
            assert QUEUE_LIMIT_BYTES - 4 * PACKET_BYTES < most <= QUEUE_LIMIT_BYTES
            for _ in range(3):
                at_arrival.clear()
                at_sending = shaper.bytes_up
                other.write(b"short")
                while not at_arrival:
                    await asyncio.sleep(0.001)
                ahead = at_arrival[0] - at_sending
                assert QUEUE_LIMIT_BYTES / 2 < ahead < 1.5 * QUEUE_LIMIT_BYTES
            pouring.cancel()
            bulk.transport.abort()
            await hang_up(other)

    run(main())


def test_a_target_that_does_not_read_holds_up_its_own_connection_only() -> None:
    stalling = asyncio.Event()

    async def target(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.read(5) == b"stall":
            await stalling.wait()
        await echo(reader, writer)

    async def main() -> None:
        async with shaped(target, rcvbuf=8192) as (shaper, port):
            _, stalled = await asyncio.open_connection(HOST, port)
            stalled.write(b"stall")
            pouring = asyncio.create_task(pour(stalled))
            carried = -1
            while carried != shaper.bytes_up:
                carried = shaper.bytes_up
                await asyncio.sleep(0.15)
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(b"first, then more")
            assert await reader.readexactly(11) == b", then more"
            assert shaper.bytes_up == carried + 16
            pouring.cancel()
            stalled.transport.abort()
            await hang_up(writer)
            stalling.set()

    run(main())


def test_waiting_costs_no_cpu() -> None:
    outage = Trace("outage", np.array([1, 60_000], dtype=np.int64))

    async def main() -> None:
        async with shaped(echo, up=outage) as (shaper, port):
            await asyncio.sleep(0.01)  # past the only opportunity
            _, writer = await asyncio.open_connection(HOST, port)
            for message in (b"", b"waits out the outage"):
                writer.write(message)
                await asyncio.sleep(0.05)
                began = time.thread_time()
                await asyncio.sleep(0.3)
                assert time.thread_time() - began < 0.03
            assert (shaper.bytes_up, shaper.waiting_up) == (0, 20)
            await hang_up(writer)

    run(main())


def test_shaper_thread_carries_counts_and_closes() -> None:
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                while data := connection.recv(4096):
                    connection.sendall(data[:1])

        server = threading.Thread(target=serve)
        server.start()
        threads_before = threading.active_count()
        shaper = LinkShaper(HOST, HOST, listener.getsockname()[1], FAST, FAST, 15.0)
        with ShaperThread(shaper) as link:
            with socket.create_connection((HOST, link.port), timeout=5) as client:
                began = time.perf_counter()
                client.sendall(b"hello")
                assert client.recv(10) == b"h"
                assert time.perf_counter() - began >= 0.030
            server.join(5)
            assert (link.bytes_up, link.bytes_down) == (5, 1)
            with socket.create_connection((HOST, link.port), timeout=5) as late:
                link.close()  # with a connection open, or still to be accepted: then it is reset
                with suppress(ConnectionResetError):
                    assert late.recv(1) == b""
        link.close()
        assert threading.active_count() < threads_before
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, link.port), timeout=5)


def test_what_cannot_start_says_so() -> None:
    with pytest.raises(ConfigError, match="propagation_ms is -1"):
        LinkShaper(HOST, HOST, 1, FAST, FAST, -1)
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on {HOST} port {port}"):
            ShaperThread(LinkShaper(HOST, HOST, 1, FAST, FAST, 0.0, listen_port=port))
