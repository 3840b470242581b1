"""A real cloud in this process, on a thread and event loop of its own, and devices and pictures that it is asked about."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import grpc
import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from edgefm.cloud.config import CloudConfig, CustomizationConfig
from edgefm.cloud.registry import Registry
from edgefm.cloud.server import CloudServer
from edgefm.edge.agent import Agent, Summary
from edgefm.edge.cloud_client import CloudClient
from edgefm.edge.config import AgentConfig, SwitcherConfig
from edgefm.edge.frames import Frame, Unreadable
from edgefm.edge.records import Answer
from edgefm.models.head import Head
from edgefm.models.images import encode_jpeg
from edgefm.models.versions import GRAPH_FILE, HEAD_FILE, StudentManifest
from edgefm.proto.limits import SERVER_OPTIONS
from edgefm.proto.v1 import edgefm_pb2 as pb
from edgefm.proto.v1 import edgefm_pb2_grpc as rpc

M = TypeVar("M")

LABELS = ("cat", "coffee cup", "rocket", "motorcycle", "daisy")
LOCAL = SwitcherConfig(objective="latency_bound", latency_bound_ms=0.001, audit_share=0.0)
"""Infeasible: the edge answers everything."""


class CloudThread:
    """`start` and `stop` as often as wanted; the port and the data stay the same. It never learns by itself.

    Tests share one: each module has its own environments.
    """

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
        head = self.head(environment)
        scale = 2.0 ** -(1 + len(self.registry.versions(environment)))
        # The same answers, other bytes.
        return self.publish(environment, {HEAD_FILE: Head(head.weight * scale, head.bias * scale).to_bytes()})

    def head(self, environment: str) -> Head:
        current = self.registry.current(environment)
        ref = next(ref for ref in current.files if ref.name == HEAD_FILE)
        return Head.from_bytes(self.registry.blob_path(ref.sha256).read_bytes(), current.embedding_dim)

    def graph(self, environment: str) -> bytes:
        ref = next(ref for ref in self.registry.current(environment).files if ref.name == GRAPH_FILE)
        return self.registry.blob_path(ref.sha256).read_bytes()

    def publish(self, environment: str, files: dict[str, bytes], **changes: object) -> StudentManifest:
        """A successor with other files and other words in its manifest."""
        current = self.registry.current(environment)
        changes = {"parent": current.version, **changes}
        return self.registry.publish(current.model_copy(update=changes), files)

    def announce(self, manifest: StudentManifest) -> None:
        """Makes a version current without looking at its files, as if they went bad right afterwards."""
        self.registry.point(manifest.environment, manifest.version)
        self._loop.call_soon_threadsafe(self.server.environments._published, manifest)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="session")
def cloud(tmp_path_factory) -> Iterator[CloudThread]:
    thread = CloudThread(tmp_path_factory.mktemp("cloud"))
    try:
        thread.start()
        yield thread
        thread.stop()
    finally:
        thread.close()


class ScriptedCloud(rpc.EdgeFMServicer):
    """A real gRPC server without an FM, for what a healthy cloud seldom does. A test sets how it answers.

    Attributes:
        answer: to a query.
        upload: to an upload, given its requests so far; may abort the call.
        register: to a registration; may take its time.
        seen: every message, in order of arrival.
    """

    def __init__(self) -> None:
        self.answer: Callable[[pb.RecognizeRequest], pb.RecognizeResponse] = lambda request: pb.RecognizeResponse(
            query_id=request.query_id, matches=[pb.Match(label="cat", similarity=0.5)], pool_version="p"
        )
        self.upload: Callable[[list[pb.UploadRequest], grpc.ServicerContext], pb.UploadResponse] = lambda requests, _: (
            pb.UploadResponse(acks=[pb.UploadAck(upload_id=r.upload_id) for r in requests])
        )
        self.register: Callable[[grpc.ServicerContext], pb.RegisterResponse]
        self.seen: list[object] = []
        self.port = 0
        self.start()

    def start(self) -> None:
        self.server = grpc.server(ThreadPoolExecutor(8), options=SERVER_OPTIONS)
        rpc.add_EdgeFMServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        self.server.start()

    def stop(self) -> None:
        self.server.stop(0).wait()

    def of(self, kind: type[M]) -> list[M]:
        return [message for message in self.seen if isinstance(message, kind)]

    def Register(self, request, context):  # noqa: N802
        return self.register(context)

    def Recognize(self, request_iterator, context):  # noqa: N802
        for request in request_iterator:
            self.seen.append(request)
            yield self.answer(request)

    def Upload(self, request_iterator, context):  # noqa: N802
        requests = []
        for request in request_iterator:
            self.seen.append(request)
            requests.append(request)
        return self.upload(requests, context)

    def Report(self, request, context):  # noqa: N802
        self.seen.append(request)
        return pb.ReportResponse()


@pytest.fixture
def scripted() -> Iterator[ScriptedCloud]:
    server = ScriptedCloud()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def jpegs(make_picture) -> list[bytes]:
    return [encode_jpeg(make_picture(seed)) for seed in range(80)]


@pytest.fixture(scope="session")
def frames(jpegs) -> Callable[[int], list[Frame]]:
    return lambda count: [Frame(f"{i:03d}", data) for i, data in enumerate(jpegs[:count])]


@pytest.fixture
def answer() -> Answer:
    """One of many digits and another alphabet's letters."""
    return Answer(
        sample_id="a/ü.jpg",
        environment="yard",
        label="café",
        similarity=0.123456789,
        margin=0.05,
        route="cloud",
        reason="margin",
        edge_label="tea",
        edge_margin=0.01,
        threshold=0.2,
        decode_ms=1.0,
        preprocess_ms=2.0,
        student_ms=3.0,
        transit_ms=40.0,
        queue_ms=5.0,
        compute_ms=6.0,
        total_ms=57.0,
        predicted_ms=60.0,
        bytes_sent=4321,
        student_version=3,
        pool_version="0123456789abcdef",
        bandwidth_mbps=4.5,
        time_s=12.25,
        samples_labelled=77,
    )


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def connect(cloud):
    """Makes clients that are closed in the end; registered unless told otherwise."""
    clients = []

    def make(environment: str, deadline_ms: float = 30_000, register: bool = True) -> CloudClient:
        client = CloudClient(cloud.target, "tester", environment, deadline_ms)
        clients.append(client)
        if register:
            client.register((), "", 60.0)
        return client

    yield make
    for client in clients:
        client.close()


@pytest.fixture(scope="session")
def failing_on() -> Callable[[bytes, float], bytes]:
    """A graph with a node that fails on some frames: an index out of bounds when the image is brighter than that."""

    def change(graph: bytes, brightness: float) -> bytes:
        model = onnx.ModelProto.FromString(graph)
        (embeddings,) = [node for node in model.graph.node if "embeddings" in node.output]
        embeddings.output[:] = ["whole"]
        node = onnx.helper.make_node
        model.graph.initializer.extend(
            [
                onnx.numpy_helper.from_array(np.array(brightness, np.float32), "t.limit"),
                onnx.numpy_helper.from_array(np.array([7], np.int64), "t.far"),
                onnx.numpy_helper.from_array(np.array([0.0], np.float32), "t.zeros"),
            ]
        )
        model.graph.node.extend(
            [
                node("ReduceMean", ["images"], ["t.mean"], keepdims=0),
                node("Greater", ["t.mean", "t.limit"], ["t.bright"]),
                node("Cast", ["t.bright"], ["t.one"], to=onnx.TensorProto.INT64),
                node("Mul", ["t.one", "t.far"], ["t.index"]),
                node("Gather", ["t.zeros", "t.index"], ["t.zero"]),
                node("Add", ["whole", "t.zero"], ["embeddings"]),
            ]
        )
        return model.SerializeToString()

    return change


@pytest.fixture
def configure(cloud, tmp_path) -> Callable[..., AgentConfig]:
    def make(environment: str = "yard", **settings) -> AgentConfig:
        settings = {
            "deadline_ms": 20_000.0,
            "connect_timeout_s": 60.0,
            "threads": 1,
            "state_dir": tmp_path / "device",
            **settings,
        }
        return AgentConfig(cloud=cloud.target, environment=environment, **settings)

    return make


@pytest.fixture(scope="session")
def run() -> Callable[[AgentConfig, Iterable[Frame | Unreadable]], tuple[Summary, list[Answer]]]:
    """Runs an agent to the source's end."""

    def to_the_end(config: AgentConfig, source: Iterable[Frame | Unreadable]) -> tuple[Summary, list[Answer]]:
        answers: list[Answer] = []
        with Agent(config) as agent:
            agent.run(source, answers.append)
        return agent.summary, answers

    return to_the_end


@pytest.fixture(scope="session")
def check_complete() -> Callable[[Summary, list[Answer], list[Frame]], None]:
    """One answer a frame, no frame twice, and a summary that says the same."""

    def check(summary: Summary, answers: list[Answer], frames: list[Frame]) -> None:
        assert sorted(answer.sample_id for answer in answers) == [frame.sample_id for frame in frames]
        routes = Counter(answer.route for answer in answers)
        assert (summary.edge, summary.cloud, summary.fallback) == (routes["edge"], routes["cloud"], routes["fallback"])
        assert summary.frames == len(answers) + summary.unreadable

    return check
