"""Every way a connection through the link shaper ends, and how the shaper itself starts and closes."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from contextlib import suppress

import pytest
from edgefm.deploy.shaper import LinkShaper, ShaperThread
from edgefm.deploy.traces import constant_trace, with_outage
from edgefm.models.errors import ConfigError

from .conftest import FAST, HOST


def test_half_close_arrives_after_the_queued_data_and_leaves_the_way_back_open(run, shaped, hang_up) -> None:
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


def test_a_dead_target_shows_as_a_closed_connection(run, hang_up) -> None:
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


def test_a_reset_at_either_end_closes_the_other(run, shaped, hang_up) -> None:
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


def test_an_outage_resets_every_connection_once_data_has_waited_long_enough(run, shaped, hang_up) -> None:
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


def test_shaper_thread_carries_counts_and_closes() -> None:
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                while data := connection.recv(4096):
                    connection.sendall(data[:1])

        server = threading.Thread(target=serve)
        server.start()
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
        assert not link._thread.is_alive()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, link.port), timeout=5)


def test_what_cannot_start_says_so() -> None:
    with pytest.raises(ConfigError, match="propagation_ms is -1"):
        LinkShaper(HOST, HOST, 1, FAST, FAST, -1)
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on {HOST} port {port}"):
            ShaperThread(LinkShaper(HOST, HOST, 1, FAST, FAST, 0.0, listen_port=port))
