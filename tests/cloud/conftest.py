"""Cloud services in a thread of this process, behind a real socket."""

from __future__ import annotations

import asyncio
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import grpc
import pytest
from edgefm.cloud.config import CloudConfig
from edgefm.cloud.server import CloudServer
from edgefm.proto.limits import CHANNEL_OPTIONS, PROTOCOL_VERSION
from edgefm.proto.v1 import edgefm_pb2 as pb
from edgefm.proto.v1 import edgefm_pb2_grpc as rpc


@dataclass(frozen=True)
class Served:
    server: CloudServer
    channel: grpc.Channel
    stub: rpc.EdgeFMStub

    def register(self, environment: str, *labels: str, **fields: object) -> pb.RegisterResponse:
        request = {"protocol": PROTOCOL_VERSION, "device_id": "device", "environment": environment, "labels": labels}
        return self.stub.Register(pb.RegisterRequest(**request | fields))


@contextmanager
def _serve(config: CloudConfig) -> Iterator[Served]:
    """Starts a server, yields it with a client, and stops it; what `start` raises is raised here."""
    server = CloudServer(config)
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
def serve() -> Callable[[CloudConfig], AbstractContextManager[Served]]:
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
