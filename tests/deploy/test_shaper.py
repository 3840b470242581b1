"""The link shaper on real sockets: capacity, delay, order, and limits."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time

import numpy as np
import pytest
from edgefm.deploy.link_queue import QUEUE_LIMIT_BYTES
from edgefm.deploy.traces import PACKET_BYTES, Trace, constant_trace, synthetic_trace

from .conftest import HOST


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
def test_each_direction_delivers_its_capacity_and_never_more(up: Trace, down: Trace, share: float, run, shaped) -> None:
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


def test_a_loop_that_wakes_late_catches_up(run, shaped) -> None:
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


def test_opportunities_nobody_used_are_lost(run, shaped, hang_up) -> None:
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


def test_propagation_delay_is_added_each_way(run, shaped, hang_up) -> None:
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


def test_the_trace_starts_again_at_its_end(run, shaped, hang_up) -> None:
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


def test_two_connections_keep_their_bytes_and_their_order(run, shaped, hang_up) -> None:
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


def test_one_queue_serves_connections_first_in_first_out(run, shaped, hang_up) -> None:
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


def test_a_bulk_transfer_puts_at_most_the_limit_ahead_of_a_short_message(run, shaped, hang_up) -> None:
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


def test_a_target_that_does_not_read_holds_up_its_own_connection_only(run, shaped, hang_up) -> None:
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


def test_waiting_costs_no_cpu(run, shaped, hang_up) -> None:
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
