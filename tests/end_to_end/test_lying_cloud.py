"""An agent on damaged images, with a cloud that says what no cloud would: it goes on answering, inside its folder."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from edgefm.models.errors import ModelError
from edgefm.models.pool import LabelPool
from edgefm.models.versions import BlobRef, StudentManifest, sha256_hex
from edgefm.proto.limits import PROTOCOL_VERSION, PUSHBACK_KEY, SERVER_OPTIONS
from edgefm.proto.v1 import edgefm_pb2 as pb
from edgefm.proto.v1 import edgefm_pb2_grpc as rpc
from google.protobuf.message import DecodeError

INF, NAN = float("inf"), float("nan")
ENDLESS = "e" * 64


def answers(pool: str) -> list[dict[str, object]]:
    """Fields of answers of which none is to be believed, but the last."""
    two = [pb.Match(label="cat", similarity=0.5), pb.Match(label="rocket", similarity=0.4)]
    good = {"matches": two, "margin": 0.1, "pool_version": pool}
    return [
        {},
        {**good, "matches": []},
        {**good, "matches": [pb.Match(label="cat", similarity=NAN)]},
        {**good, "matches": [pb.Match(label="cat", similarity=1e30)]},
        {**good, "matches": [pb.Match(label="x" * 100_000, similarity=0.5)]},
        {**good, "margin": NAN},
        {**good, "margin": -INF},
        {**good, "queue_ms": 3e38},
        {**good, "compute_ms": NAN},
        {**good, "queue_ms": -5.0},
        {**good, "edge_similarity": NAN},
        {**good, "error": pb.QueryError(code=99, message="\x1b[31m" * 1000)},
        {**good, "error": pb.QueryError(code=pb.QueryError.CODE_BAD_IMAGE, retry_after_ms=2**32 - 1)},
        {**good, "matches": [pb.Match(label="no such label", similarity=0.5)], "edge_similarity": 0.1},
        {**good, "pool_version": "another", "samples_labelled": 2**32 - 1},
    ]


def manifests(good: StudentManifest) -> list[str]:
    """Manifests that must not be followed."""
    fields = json.loads(good.to_json()) | {"version": 7}
    file = fields["files"][0]
    calibration = {"margins": [0.1], "agreements": [1.0], "propensities": [0.0]}
    changes: list[dict[str, object]] = [
        {"files": [{**file, "sha256": ENDLESS, "size_bytes": 300_000}, *fields["files"][1:]]},
        {"files": [{**file, "name": "../../../outside"}]},
        {"files": [{**file, "name": "/tmp/outside"}]},
        {"files": [{**file, "sha256": "../" * 21 + "x"}]},
        {"files": [{**file, "size_bytes": 10**15}]},
        {"files": [file] * 10_000},
        {"files": []},
        {"version": 2**40},
        {"preprocess": {**fields["preprocess"], "size": 10**6}},
        {"preprocess": {**fields["preprocess"], "size": 0}},
        {"preprocess": {**fields["preprocess"], "std": [0.0, 0.0, 0.0]}},
        {"embedding_dim": 7},
        {"confidence": {**fields["confidence"], "temperature": NAN}},
        {"calibration": calibration},
        {"environment": "../../elsewhere"},
        {"created_at": "x" * 1_000_000, "embedding_dim": 8},
    ]
    return [*(json.dumps(fields | change) for change in changes), "", "null", "[" * 100_000, "1" * 10_000]


def pools(good: LabelPool) -> list[bytes]:
    """Pools whose bytes are what was promised, and wrong all the same."""
    with_nan = np.full_like(good.embeddings, NAN)
    wrong = [(with_nan, 0.05), (good.embeddings[:, :5], 0.05), (good.embeddings * 1e30, 0.05), (good.embeddings, NAN)]
    made = [LabelPool(good.labels, vectors, good.foundation_model, -1.0, t).to_bytes() for vectors, t in wrong]
    return [b"", b"PK\x03\x04" * 100, *made]


def believable(registration: bytes) -> bool:
    """It can be read, its manifest too."""
    try:
        StudentManifest.from_json(pb.RegisterResponse.FromString(registration).student.manifest_json)
    except (DecodeError, ModelError):
        return False
    return True


class LyingCloud:
    """A gRPC server whose first registration is the true cloud's and whose every other word is a lie.

    Attributes:
        counts: calls and answers, by what they were.
    """

    def __init__(self, registration: bytes, manifest: StudentManifest, pool: LabelPool, mutate) -> None:
        self._registration, self._mutate, self._rng = registration, mutate, random.Random(11)
        self._manifests = itertools.cycle(manifests(manifest))
        self._blobs = {sha256_hex(data): data for data in pools(pool)}
        self._pools = itertools.cycle([BlobRef.of("pool.npz", data) for data in self._blobs.values()])
        self._answers = itertools.cycle(answers(pool.version))
        self._lock = threading.Lock()
        self.counts: dict[str, int] = dict.fromkeys(("register", "answer", "upload", "watch", "fetch", "endless"), 0)
        self.server = grpc.server(ThreadPoolExecutor(16), options=SERVER_OPTIONS)
        raw = lambda data: data  # noqa: E731
        handlers = {
            "Register": grpc.unary_unary_rpc_method_handler(self._register, pb.RegisterRequest.FromString, raw),
            "Recognize": grpc.stream_stream_rpc_method_handler(self._recognize, pb.RecognizeRequest.FromString, raw),
            "Upload": grpc.stream_unary_rpc_method_handler(self._upload, pb.UploadRequest.FromString, raw),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch, pb.WatchRequest.FromString, raw),
            "Fetch": grpc.unary_stream_rpc_method_handler(self._fetch, pb.FetchRequest.FromString, raw),
            "Report": grpc.unary_unary_rpc_method_handler(lambda *_: b"\xff", pb.ReportRequest.FromString, raw),
        }
        self.server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("edgefm.v1.EdgeFM", handlers)])
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def _count(self, what: str) -> int:
        with self._lock:
            self.counts[what] += 1
            return self.counts[what]

    def _damaged(self, data: bytes) -> bytes:
        with self._lock:
            return self._mutate(data, self._rng)

    def _register(self, request, context) -> bytes:
        if self._count("register") % 2:
            return self._registration
        damaged = self._damaged(self._registration)
        # Another date or number with the true files is a version like any other: an agent may follow it.
        return self._registration if believable(damaged) else damaged

    def _recognize(self, requests, context) -> Iterator[bytes]:
        for request in requests:
            number = self._count("answer")
            with self._lock:
                fields = next(self._answers)
            true = pb.RecognizeResponse(query_id=request.query_id, **fields).SerializeToString()
            if number % 4 == 0:  # of another query, or of none
                yield pb.RecognizeResponse(query_id=2**64 - number, **fields).SerializeToString()
            yield self._damaged(true) if number % 16 == 0 else true

    def _upload(self, requests, context) -> bytes:
        taken = list(requests)
        number = self._count("upload")
        if number % 3 == 0:
            context.set_trailing_metadata(((PUSHBACK_KEY, "9" * 400),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "never again")
        acks = [pb.UploadAck(upload_id=2**64 - 1 - r.upload_id, sha256="../x") for r in taken]
        response = pb.UploadResponse(acks=acks).SerializeToString()
        return response if number % 3 == 1 else self._damaged(response)

    def _watch(self, request, context) -> Iterator[bytes]:
        for _ in range(3):
            self._count("watch")
            with self._lock:
                manifest, ref = next(self._manifests), next(self._pools)
            blob = pb.Blob(name=ref.name, sha256=ref.sha256, size_bytes=ref.size_bytes)
            yield pb.WatchEvent(pool=pb.PoolVersion(version="p", file=blob)).SerializeToString()
            yield pb.WatchEvent(student=pb.StudentVersion(version=7, manifest_json=manifest)).SerializeToString()

    def _fetch(self, request, context) -> Iterator[bytes]:
        self._count("fetch")
        if request.sha256 in self._blobs:
            yield pb.FetchChunk(data=self._blobs[request.sha256]).SerializeToString()
            return
        self._count("endless")
        for number in itertools.count():
            if not context.is_active():
                return
            data = b"" if self.counts["endless"] % 2 else number.to_bytes(4, "big") * 4096
            yield pb.FetchChunk(data=data, total_bytes=2**63).SerializeToString()


@pytest.fixture
def agent(edgefm, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs an agent on a source to its end, with one state folder and one file of answers."""

    def run(source: Path, target: str, *flags: str) -> subprocess.CompletedProcess[str]:
        kept = ("--state-dir", tmp_path / "agent", "-o", tmp_path / "answers.jsonl")
        return edgefm("agent", source, "--cloud", target, *kept, *flags, cwd=tmp_path)

    return run


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@pytest.fixture
def lying_cloud(start_cloud, agent, make_picture, mutate, tmp_path: Path) -> Iterator[Callable[[], LyingCloud]]:
    """Made from what a true cloud says, which has served the device in `tmp_path / "agent"` before."""
    started: list[LyingCloud] = []

    def start() -> LyingCloud:
        cloud = start_cloud("--labels", "cat, rocket", "--student", "lite0-64")
        with grpc.insecure_channel(cloud.target) as channel:
            hello = pb.RegisterRequest(protocol=PROTOCOL_VERSION, device_id="d", environment="default")
            true = rpc.EdgeFMStub(channel).Register(hello, timeout=60)
        (tmp_path / "first").mkdir()
        make_picture(1).save(tmp_path / "first" / "1.png")
        assert agent(tmp_path / "first", cloud.target).returncode == 0
        pool = LabelPool.load(tmp_path / "agent" / "blobs" / true.pool.file.sha256)
        cloud.process.kill()
        manifest = StudentManifest.from_json(true.student.manifest_json)
        started.append(LyingCloud(true.SerializeToString(), manifest, pool, mutate))
        return started[-1]

    yield start
    for cloud in started:
        cloud.server.stop(0).wait()


def test_an_agent_outlives_a_cloud_that_lies(lying_cloud, agent, mutated_images, tmp_path: Path):
    liar = lying_cloud()
    (tmp_path / "answers.jsonl").unlink()
    source = tmp_path / "damaged"
    source.mkdir()
    for number, (suffix, data) in enumerate(mutated_images):
        # A suffix says nothing of what is in a file, and a folder takes no .gif.
        (source / f"{number:04d}.{suffix.replace('gif', 'jpg')}").write_bytes(data)
    before = {path for path in tmp_path.rglob("*") if "agent" not in path.relative_to(tmp_path).parts}
    done = agent(source, f"127.0.0.1:{liar.port}", "--deadline-ms", "500", "--upload", "all", "--fps", "60")
    assert done.returncode == 0, done.stderr
    # gRPC logs what it cannot parse, in one line; no thread may end with an error of ours.
    assert not re.search(r"^Traceback|^Exception|event=watch_failed", done.stderr, re.MULTILINE), done.stderr
    summary = json.loads(done.stdout)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert summary["frames"] == 1000 == len(records) + summary["unreadable"]
    assert len({record["sample_id"] for record in records}) == len(records) > 200 < summary["unreadable"]
    # Only the two kinds of answers that can be true were believed.
    assert {record["label"] for record in records} <= {"cat", "rocket", "unknown", "no such label"}
    assert all(record["student_version"] == 0 for record in records) and summary["swaps"] == 0
    assert min(liar.counts[what] for what in ("register", "answer", "upload", "watch", "fetch", "endless")) > 0, (
        liar.counts
    )
    assert len(summary["refused"]) >= 5
    after = {path for path in tmp_path.rglob("*") if "agent" not in path.relative_to(tmp_path).parts}
    assert after - before == {tmp_path / "answers.jsonl"}
    assert sum(path.stat().st_size for path in (tmp_path / "agent").rglob("*") if path.is_file()) < 64 * 2**20
