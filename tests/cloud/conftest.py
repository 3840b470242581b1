"""Cloud services in a thread of this process, behind a real socket; and what several modules do with a batcher or a store."""

from __future__ import annotations

import asyncio
import re
import resource
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from edgefm.cloud.batcher import Batched, DynamicBatcher
from edgefm.cloud.config import CloudConfig, CustomizationConfig
from edgefm.cloud.enrichment import Describer
from edgefm.cloud.environments import Environments
from edgefm.cloud.recognition import compare
from edgefm.cloud.server import CloudServer
from edgefm.cloud.store import Kept, NewSample
from edgefm.deploy.camera import DAY, PHOTOGRAPHS, walk
from edgefm.models.errors import InputError
from edgefm.models.images import decode_image
from edgefm.proto.limits import CHANNEL_OPTIONS, PROTOCOL_VERSION
from edgefm.proto.v1 import edgefm_pb2 as pb
from edgefm.proto.v1 import edgefm_pb2_grpc as rpc

LABELS = tuple(sorted({photograph.label for photograph in PHOTOGRAPHS}))
BASE = ("cat", "rocket")
FRAMES = 120
NEVER = 1_000_000
ONE_THREAD = CustomizationConfig(threads=1, tail_from=NEVER)


@dataclass(frozen=True)
class Served:
    server: CloudServer
    channel: grpc.Channel
    stub: rpc.EdgeFMStub

    def register(self, environment: str, *labels: str, **fields: object) -> pb.RegisterResponse:
        request = {"protocol": PROTOCOL_VERSION, "device_id": "device", "environment": environment, "labels": labels}
        return self.stub.Register(pb.RegisterRequest(**request | fields))


@contextmanager
def _serve(config: CloudConfig, describer: Describer | None = None) -> Iterator[Served]:
    """Starts a server, yields it with a client, and stops it; what `start` raises is raised here."""
    server = CloudServer(config, describer)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="cloud")
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(60)
        try:
            with grpc.insecure_channel(f"127.0.0.1:{server.port}", CHANNEL_OPTIONS) as channel:
                yield Served(server, channel, rpc.EdgeFMStub(channel))
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@pytest.fixture(scope="session")
def serve() -> Callable[..., AbstractContextManager[Served]]:
    return _serve


@pytest.fixture
def full_disk() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """While it is entered, no file of this process can grow: the kernel refuses each write as it would on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextmanager
    def fill() -> Iterator[None]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---- one service for the tests of a module


@pytest.fixture(scope="module")
def cloud(tmp_path_factory, serve) -> Iterator[Served]:
    """It starts from the labels `BASE` and never learns."""
    learning = CustomizationConfig(first_at=NEVER)
    folder = tmp_path_factory.mktemp("cloud")
    with serve(CloudConfig(folder, port=0, labels=BASE, student="lite0-64", customization=learning)) as served:
        yield served


def _registered(cloud: Served, name: str) -> str:
    cloud.register(name, *(label for label in LABELS if label not in BASE))
    return name


@pytest.fixture(scope="module")
def yard(cloud: Served) -> str:
    """An environment that no test changes: nothing is kept there and its labels stay."""
    return _registered(cloud, "yard")


@pytest.fixture
def environment(cloud: Served, request) -> str:
    """An environment of the test's own."""
    return _registered(cloud, re.sub(r"\W", "-", request.node.name)[:60])


@pytest.fixture(scope="session")
def status_of() -> Callable[..., tuple[grpc.StatusCode, str]]:
    """The code and text with which a call is refused."""

    def refusal(call) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as refused:
            result = call()
            if not hasattr(result, "DESCRIPTOR"):
                list(result)
        return refused.value.code(), refused.value.details()

    return refusal


# ---- environments that learn


@dataclass(frozen=True)
class Pictures:
    """Encoded images with what the real FM says of them."""

    images: list[bytes]
    embeddings: np.ndarray  # (N, D)


@pytest.fixture(scope="session")
def pictures(synclip) -> Pictures:
    """The simulated camera's first `FRAMES`."""
    images = [frame.image_bytes for frame in walk(DAY, 0, FRAMES)]
    return Pictures(images, np.vstack([synclip.embed_images([decode_image(image)]) for image in images]))


@pytest.fixture(scope="session")
def cloud_config() -> Callable[..., CloudConfig]:
    """Keywords: what differs from `ONE_THREAD`."""

    def make(data_dir: Path, **customization: object) -> CloudConfig:
        settings = replace(ONE_THREAD, **customization)
        return CloudConfig(data_dir=data_dir, student="lite0-64", customization=settings)

    return make


@pytest.fixture(scope="session")
def keep() -> Callable[..., Awaitable[Kept]]:
    """Keeps an image in an environment, labelled as its embedding says."""

    async def add(
        environments: Environments, name: str, image: bytes, embedding: np.ndarray, propensity: float = 1.0
    ) -> Kept:
        (found,) = compare(embedding[None], environments.pool(name)[0], [1])
        return await environments.keep(NewSample(name, image, found.labelled, propensity, "device"))

    return add


@pytest.fixture(scope="session")
def keep_all(keep) -> Callable[..., Awaitable[None]]:
    async def add(environments: Environments, name: str, images: Iterable[bytes], embeddings: np.ndarray) -> None:
        for image, embedding in zip(images, embeddings, strict=True):
            await keep(environments, name, image, embedding)

    return add


# ---- a batcher whose model doubles numbers

FAILS = 666
Batcher = DynamicBatcher[int, int, int]


class Doubler:
    """Doubles numbers and remembers its batches. Negative numbers cannot be prepared; `FAILS` breaks its whole batch."""

    def __init__(self) -> None:
        self.prepared: list[int] = []
        self.batches: list[list[int]] = []
        self.running = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def prepare(self, item: int) -> int:
        self.prepared.append(item)
        if item < 0:
            raise InputError(f"{item} is negative")
        return item

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.running.set()
        assert self.gate.wait(10)
        if FAILS in items:
            raise RuntimeError("out of memory")
        return [item * 2 for item in items]


@pytest.fixture(scope="session")
def doubling() -> Callable[..., Batcher]:
    """Makes a batcher before a `Doubler`; keywords: its settings."""

    def make(process: Doubler, **settings: float) -> Batcher:
        return DynamicBatcher(process.prepare, process, **settings)  # pyright: ignore[reportArgumentType]

    return make


@pytest.fixture(scope="session")
def run() -> Callable[[Batcher, Callable[[], Awaitable[None]]], None]:
    """Runs a test's work in a loop of its own, within 20 s, while the batcher is started."""

    def within_20_s(batcher: Batcher, work: Callable[[], Awaitable[None]]) -> None:
        async def all_of_it() -> None:
            batcher.start()
            try:
                await asyncio.wait_for(work(), 20)
            finally:
                await batcher.close()

        asyncio.run(all_of_it())

    return within_20_s


@pytest.fixture(scope="session")
def occupy() -> Callable[[Batcher, Doubler], Awaitable[asyncio.Task[Batched[int]]]]:
    """Keeps the model busy with item 0 until `process.gate` is set; what is submitted now waits in the queue."""

    async def submit(batcher: Batcher, process: Doubler) -> asyncio.Task[Batched[int]]:
        process.gate.clear()
        process.running.clear()
        first = asyncio.create_task(batcher.submit(0))
        while not process.running.is_set():
            await asyncio.sleep(0.001)
        return first

    return submit
