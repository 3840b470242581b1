"""Closed-loop load, from a process of its own: every client sends the next picture once it has its answer.

A client of EdgeFM's cloud is a device: a connection of its own with one stream. A client of LitServe has a connection of its
own too, kept alive; its HTTP is written by hand on asyncio's streams, which costs less than any library would.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import grpc.aio

from ...models.errors import EdgeFMError
from ...proto.limits import CHANNEL_OPTIONS
from ...proto.v1 import edgefm_pb2 as pb
from ...proto.v1 import edgefm_pb2_grpc as rpc

Ask = Callable[[bytes], Awaitable[str]]
"""Sends an encoded picture; returns the best label, or raises."""
Client = Callable[[int], AbstractAsyncContextManager[Ask]]
"""The client of that number, connected."""

_COMMENT = b"\xff\xfe"


@dataclass(frozen=True)
class Load:
    """What to put on a server.

    Attributes:
        seconds: measured, after `warm_up_s`.
        requests: measured at most.
        distinct_from: every picture's bytes are new to the server, by a JPEG comment that changes no pixel: this number for
            the first one, the next for the next.
    """

    images: Sequence[bytes]
    clients: int
    warm_up_s: float = 1.0
    seconds: float = float("inf")
    requests: float = float("inf")
    distinct_from: int | None = None


@dataclass(frozen=True)
class Answered:
    """What came back. Latencies of the answers within the measured time, in ms.

    Attributes:
        labels: how often each was the answer, to see that the FM has really looked.
        all_requests: those of the warm-up and the last ones too.
        cpu_s: of the load process for all requests.
    """

    latencies_ms: list[float]
    seconds: float
    all_requests: int
    cpu_s: float
    labels: dict[str, int]


def load_cloud(port: int, environment: str, keep: bool, load: Load) -> Answered:
    """Load on EdgeFM's cloud. Raises `EdgeFMError` for an answer that is none."""
    return asyncio.run(_drive(lambda number: _device(port, environment, keep, number), load))


def load_http(port: int, path: str, load: Load) -> Answered:
    """Load on a server that takes an image as a POST's body and answers with `{"label": ...}`."""
    return asyncio.run(_drive(lambda _: _http(port, path), load))


async def _drive(connect: Client, load: Load) -> Answered:
    latencies: list[float] = []
    labels: dict[str, int] = {}
    all_requests = 0
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(number)) for number in range(load.clients)]
        start_s = time.perf_counter() + load.warm_up_s
        end_s = start_s + load.seconds

        async def run(number: int, ask: Ask) -> None:
            nonlocal all_requests
            place, sent_s = number, time.perf_counter()
            while sent_s < end_s and len(latencies) < load.requests:
                image = load.images[place % len(load.images)]
                if load.distinct_from is not None:
                    image = _marked(image, load.distinct_from + place)
                label = await ask(image)
                place += load.clients
                all_requests += 1
                answered_s = time.perf_counter()
                if start_s <= answered_s < end_s:
                    latencies.append((answered_s - sent_s) * 1e3)
                    labels[label] = labels.get(label, 0) + 1
                sent_s = answered_s

        cpu_s = time.process_time()
        await asyncio.gather(*(run(number, ask) for number, ask in enumerate(clients)))
        cpu_s = time.process_time() - cpu_s
    return Answered(latencies, min(load.seconds, time.perf_counter() - start_s), all_requests, cpu_s, labels)


def _marked(jpeg: bytes, number: int) -> bytes:
    return jpeg[:2] + _COMMENT + (10).to_bytes(2, "big") + number.to_bytes(8, "big") + jpeg[2:]


@asynccontextmanager
async def _device(port: int, environment: str, keep: bool, number: int) -> AsyncIterator[Ask]:
    options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]  # or all share one connection
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        stream = rpc.EdgeFMStub(channel).Recognize()  # pyright: ignore[reportCallIssue]
        device = f"device-{number}"
        asked = 0

        async def ask(image: bytes) -> str:
            nonlocal asked
            asked += 1
            request = pb.RecognizeRequest(
                query_id=asked, environment=environment, image=image, keep=keep, device_id=device
            )
            await stream.write(request)
            answer = await stream.read()
            if not isinstance(answer, pb.RecognizeResponse) or answer.HasField("error") or answer.query_id != asked:
                raise EdgeFMError(f"the cloud does not answer the load: {answer}")
            return answer.matches[0].label

        yield ask
        await stream.done_writing()


@asynccontextmanager
async def _http(port: int, path: str) -> AsyncIterator[Ask]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/jpeg\r\nContent-Length: "

    async def ask(image: bytes) -> str:
        writer.write(f"{head}{len(image)}\r\n\r\n".encode() + image)
        status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        size = next(int(field.partition(":")[2]) for field in fields if field.startswith("content-length:"))
        body = await reader.readexactly(size)
        if " 200 " not in status:
            raise EdgeFMError(f"the HTTP server does not answer the load: {status}: {body[:200]!r}")
        return json.loads(body)["label"]

    yield ask
    writer.close()
    await writer.wait_closed()
