"""`edgefm bench link`: what the link shaper costs beside the link that it plays.

Messages of a query's size, answered by another process, alternately past the shaper and through it, on a trace so fast that what
is left is the shaper's own, but for the trace's resolution of a millisecond, which is taken off; beside them a second connection
keeps the link under load. Then how much one connection can push through. Clients and target are processes of their own, as agent
and cloud are.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from rich.console import Console

from ..demo_results import describe_environment
from ..replay.virtual_link import VirtualLink
from ..shaper import LinkShaper, ShaperThread
from ..traces import Trace, constant_trace

MESSAGE_BYTES, ANSWER_BYTES = 20_000, 200
LINK_MBIT_PER_S = 1000.0
LOAD_MBIT_PER_S = 20.0
_PROBES, _PAUSE_S = 100, 0.01
_BULK_S = 3.0
_OFFSETS = 100


def bench_link(repeats: int, console: Console) -> dict[str, Any]:
    """Medians over interleaved repeats: round trips past the shaper and through it, and what it carries."""
    trace = constant_trace(LINK_MBIT_PER_S)
    past, through, carried = [], [], []
    with (
        _target() as port,
        ShaperThread(LinkShaper("127.0.0.1", "127.0.0.1", port, trace, trace, 0.0)) as link,
        ProcessPoolExecutor(1, get_context("spawn")) as clients,
        console.status("Sending ..."),
    ):
        for _ in range(repeats):
            past.append(clients.submit(_round_trips, port).result())
            through.append(clients.submit(_round_trips, link.port).result())
            carried.append(clients.submit(_push, link.port).result())
    alone, shaped = (np.percentile(some, (50, 95), axis=1) for some in (past, through))  # (2, repeats)
    link_ms = sum(_link_ms(trace, size) for size in (MESSAGE_BYTES, ANSWER_BYTES))
    added = np.median(shaped - alone, axis=1) - link_ms
    result = {
        "message_bytes": MESSAGE_BYTES,
        "load_mbit_per_s": LOAD_MBIT_PER_S,
        "link_mbit_per_s": LINK_MBIT_PER_S,
        "round_trip_ms": {"past": _described(alone), "through": _described(shaped)},
        "link_ms": round(link_ms, 3),
        "added_ms": {"p50": round(float(added[0]), 3), "p95": round(float(added[1]), 3)},
        "carried_mbit_per_s": round(float(np.median(carried)), 1),
        "repeats": repeats,
        "environment": describe_environment(0),
    }
    console.print(
        f"{MESSAGE_BYTES} bytes there, {ANSWER_BYTES} back, under {LOAD_MBIT_PER_S:g} Mbit/s of load: the shaper adds "
        f"{added[0]:.2f} ms (median), {added[1]:.2f} ms (95th percentile) a round trip; one connection pushes "
        f"{result['carried_mbit_per_s']:.0f} Mbit/s through it."
    )
    return result


def _link_ms(trace: Trace, size_bytes: int) -> float:
    """What the trace itself takes, mean over when in a millisecond the message comes: a link without a proxy."""
    sent_ms = np.arange(_OFFSETS) * (1 + 1 / _OFFSETS)
    return float(np.mean([VirtualLink(trace).send(size_bytes, at) - at for at in sent_ms]))


def _described(percentiles: np.ndarray) -> dict[str, float]:
    p50, p95 = np.median(percentiles, axis=1)
    return {"p50": round(float(p50), 3), "p95": round(float(p95), 3)}


# ---- the target, a process of its own


@contextmanager
def _target() -> Iterator[int]:
    """Answers every whole message. Yields its port."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.terminate()
        process.join()


def _serve(started: Connection) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    started.send(listener.getsockname()[1])
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    came = 0
    with connection:
        while data := connection.recv(1 << 18):
            answers = (came % MESSAGE_BYTES + len(data)) // MESSAGE_BYTES
            came += len(data)
            if answers:
                connection.sendall(bytes(ANSWER_BYTES * answers))


# ---- the clients, in another


def _round_trips(port: int) -> list[float]:
    """ms, while another connection keeps up the load."""
    ended = threading.Event()
    load = threading.Thread(target=_load, args=(port, ended))
    load.start()
    taken_ms = []
    try:
        with _connect(port) as connection:
            for _ in range(_PROBES):
                began = time.perf_counter()
                _ask(connection)
                taken_ms.append((time.perf_counter() - began) * 1e3)
                time.sleep(_PAUSE_S)
    finally:
        ended.set()
        load.join()
    return taken_ms


def _load(port: int, ended: threading.Event) -> None:
    """At even times, however long an answer takes."""
    gap_s, due_s = MESSAGE_BYTES * 8 / (LOAD_MBIT_PER_S * 1e6), time.perf_counter()
    with _connect(port) as connection:
        while not ended.wait(max(due_s - time.perf_counter(), 0.0)):
            _ask(connection)
            due_s += gap_s


def _push(port: int) -> float:
    """Mbit/s that arrived, by the target's answers."""
    sent = answered = 0
    with _connect(port) as connection:
        connection.setblocking(False)
        began = time.perf_counter()
        while time.perf_counter() - began < _BULK_S:
            try:
                sent += connection.send(bytes(1 << 16))
            except BlockingIOError:
                time.sleep(0.0005)
            with suppress(BlockingIOError):
                answered += len(connection.recv(1 << 16))
        seconds = time.perf_counter() - began
    return answered // ANSWER_BYTES * MESSAGE_BYTES * 8 / seconds / 1e6


def _connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _ask(connection: socket.socket) -> None:
    connection.sendall(bytes(MESSAGE_BYTES))
    left = ANSWER_BYTES
    while left:
        left -= len(connection.recv(left))
