"""A real cloud in this process, on a thread and event loop of its own, and pictures for a device that asks it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from edgefm.cloud.config import CloudConfig, CustomizationConfig
from edgefm.cloud.registry import Registry
from edgefm.cloud.server import CloudServer
from edgefm.edge.sources import Frame
from edgefm.models.images import encode_jpeg
from edgefm.models.student_graph import HEAD_FILE, Head
from edgefm.models.versions import StudentManifest

LABELS = ("cat", "coffee cup", "rocket", "motorcycle", "daisy")


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """Waits for a condition; fails when it does not come about."""

    def wait(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "it did not come about in time"
            time.sleep(0.01)

    return wait


class CloudThread:
    """`start` and `stop` as often as wanted; the port and the data stay the same. It never learns by itself."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cloud")
        self._thread.start()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def registry(self) -> Registry:
        return Registry(self.data_dir / "registry")

    def start(self) -> None:
        self.server = CloudServer(
            CloudConfig(
                data_dir=self.data_dir,
                port=self.port,
                labels=LABELS,
                student="lite0-64",
                customization=CustomizationConfig(first_at=1_000_000),
            )
        )
        asyncio.run_coroutine_threadsafe(self.server.start(), self._loop).result(120)
        self.port = self.server.port

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(), self._loop).result(30)

    def samples(self, environment: str) -> int:
        return self.server.environments.store.count(environment)

    def publish_successor(self, environment: str) -> StudentManifest:
        """Another version with a head of its own; `Operator.rollback` to its number makes the cloud announce it."""
        current = self.registry.current(environment)
        old = next(ref for ref in current.files if ref.name == HEAD_FILE)
        head = Head.from_bytes(self.registry.blob_path(old.sha256).read_bytes(), current.embedding_dim)
        scale = 2.0 ** -(1 + len(self.registry.versions(environment)))
        data = Head(head.weight * scale, head.bias * scale).to_bytes()  # the same answers, other bytes
        return self.registry.publish(current.model_copy(update={"parent": current.version}), {HEAD_FILE: data})

    def announce(self, manifest: StudentManifest) -> None:
        """Makes a version current without looking at its files, as if they went bad right afterwards."""
        self.registry.point(manifest.environment, manifest.version)
        self._loop.call_soon_threadsafe(self.server.environments._published, manifest)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def cloud(tmp_path_factory) -> Iterator[CloudThread]:
    thread = CloudThread(tmp_path_factory.mktemp("cloud"))
    try:
        thread.start()
        yield thread
        thread.stop()
    finally:
        thread.close()


@pytest.fixture(scope="session")
def jpegs(make_picture) -> list[bytes]:
    return [encode_jpeg(make_picture(seed)) for seed in range(80)]


@pytest.fixture(scope="session")
def frames(jpegs) -> Callable[[int], list[Frame]]:
    return lambda count: [Frame(f"{i:03d}", data) for i, data in enumerate(jpegs[:count])]
