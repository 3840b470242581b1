"""Damaged images, bombs and garbage on the wire, sent to a cloud of its own process: each is answered, and it stays well."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from edgefm.models.images import encode_jpeg
from edgefm.proto.limits import CHANNEL_OPTIONS, PROTOCOL_VERSION
from edgefm.proto.v1 import edgefm_pb2 as pb
from edgefm.proto.v1 import edgefm_pb2_grpc as rpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

TIMEOUT_S = 100.0
QUERY = pb.QueryError
BOMBS = 16
BOMB_SIDE = 5000  # 75 MB when it is decoded


class Attacked:
    """A cloud with one environment, and the means to see how it fares."""

    def __init__(self, process, channel: grpc.Channel) -> None:
        self.process, self.channel, self.stub = process, channel, rpc.EdgeFMStub(channel)
        hello = pb.RegisterRequest(protocol=PROTOCOL_VERSION, device_id="d", environment="yard")
        self.registered = self.stub.Register(hello, timeout=TIMEOUT_S)

    def peak_bytes(self) -> int:
        status = Path(f"/proc/{self.process.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    def is_well(self, picture: bytes) -> None:
        health = health_pb2_grpc.HealthStub(self.channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        query = pb.RecognizeRequest(query_id=1, environment="yard", image=picture)
        (answer,) = self.stub.Recognize(iter([query]), timeout=TIMEOUT_S)
        assert answer.matches and not answer.HasField("error")
        assert "event=query_failed" not in self.process.log.read_text()


@pytest.fixture(scope="module")
def cloud(start_lasting_cloud) -> Iterator[Attacked]:
    process = start_lasting_cloud("--labels", "cat, rocket", "--student", "lite0-64")
    with grpc.insecure_channel(process.target, CHANNEL_OPTIONS) as channel:
        yield Attacked(process, channel)


def bombs() -> list[bytes]:
    """Images of some 100 kB that decode to much, or claim to."""
    buffer = io.BytesIO()
    Image.new("RGB", (BOMB_SIDE, BOMB_SIDE), (9, 99, 199)).save(buffer, "png")
    within = buffer.getvalue()
    beyond = within[:16] + (100_000).to_bytes(4, "big") * 2 + within[24:]
    return [within] * BOMBS + [beyond] * BOMBS


def test_damaged_images_and_bombs(cloud: Attacked, mutated_images, make_picture):
    good = encode_jpeg(make_picture(0))
    cloud.is_well(good)
    before = cloud.peak_bytes()
    images = [data for _, data in mutated_images] + bombs()
    queries = (pb.RecognizeRequest(query_id=i, environment="yard", image=data) for i, data in enumerate(images))
    answers = {answer.query_id: answer for answer in cloud.stub.Recognize(queries, timeout=TIMEOUT_S)}
    assert len(answers) == len(images)
    errors = [answers[i].error.code if answers[i].HasField("error") else None for i in range(len(images))]
    assert set(errors) == {None, QUERY.CODE_BAD_IMAGE}
    assert 200 < errors[:1000].count(None) < 800 and all(answers[i].matches for i, e in enumerate(errors) if e is None)
    gifs = [errors[i] for i, (kind, _) in enumerate(mutated_images) if kind == "gif"]
    assert set(gifs) == {QUERY.CODE_BAD_IMAGE}
    assert errors[1000:] == [None] * BOMBS + [QUERY.CODE_BAD_IMAGE] * BOMBS

    uploads = (pb.UploadRequest(upload_id=i, environment="yard", image=data) for i, data in enumerate(images[:1000]))
    acks = cloud.stub.Upload(uploads, timeout=TIMEOUT_S).acks
    assert [ack.error.code if ack.HasField("error") else None for ack in acks] == errors[:1000]

    # A worker holds one bomb and its copy; what waits for the model has the model's size.
    workers = min(os.cpu_count() or 1, 8)
    assert cloud.peak_bytes() - before < 2**20 * (300 + workers * 250)
    cloud.is_well(good)


def calls(cloud: Attacked, picture: bytes) -> dict[str, Message]:
    """A message of each call as a device or an operator sends it."""
    digest = cloud.registered.pool.file.sha256
    fields = {"environment": "yard", "image": picture, "device_id": "d", "propensity": 0.5}
    said = {"edge_label": "cat", "edge_margin": 0.1, "edge_pool_version": cloud.registered.pool.version}
    refusal = pb.Refusal(student_version=3, kind=pb.Refusal.KIND_SLOW, reason="9 ms")
    return {
        "Register": pb.RegisterRequest(protocol=PROTOCOL_VERSION, device_id="d", environment="yard"),
        "Recognize": pb.RecognizeRequest(query_id=1, deadline_ms=50_000, top_k=3, keep=True, **fields, **said),
        "Upload": pb.UploadRequest(upload_id=1, **fields),
        "Watch": pb.WatchRequest(device_id="d", environment="yard"),
        "Fetch": pb.FetchRequest(sha256=digest, offset_bytes=5),
        "ListLabels": pb.ListLabelsRequest(environment="yard"),
        "AddLabels": pb.AddLabelsRequest(environment="elsewhere", labels=["dog"]),
        "RemoveLabels": pb.RemoveLabelsRequest(environment="elsewhere", labels=["dog"]),
        "DescribeLabels": pb.DescribeLabelsRequest(environment="yard", labels=["cat"]),
        "SetDescriptions": pb.SetDescriptionsRequest(
            environment="elsewhere", labels=[pb.LabelDescriptions(label="cat", texts=["Small."])]
        ),
        "ListDescriptions": pb.ListDescriptionsRequest(environment="yard", label="cat"),
        "Rollback": pb.RollbackRequest(environment="yard", version=0),
        "Report": pb.ReportRequest(device_id="d", environment="yard", refusals=[refusal]),
        "Status": pb.StatusRequest(environment="yard"),
    }


STREAMS = {
    **{"Recognize": "stream_stream", "Upload": "stream_unary", "Watch": "unary_stream", "Fetch": "unary_stream"},
    "ListDescriptions": "unary_stream",
}


def send(cloud: Attacked, name: str, data: bytes) -> str:
    """One raw message; the name of the status with which the call ends. A Watch that is taken goes on, so it is cancelled."""
    kind = STREAMS.get(name, "unary_unary")
    call = getattr(cloud.channel, kind)(f"/edgefm.v1.EdgeFM/{name}")
    request = iter([data]) if kind.startswith("stream") else data
    try:
        if kind.endswith("stream"):
            for _ in (answers := call(request, timeout=TIMEOUT_S)):
                if name == "Watch":
                    answers.cancel()
                    break
        else:
            call(request, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        return error.code().name
    return "OK"


def test_a_thousand_mutated_messages(cloud: Attacked, make_picture, mutate: Callable[..., bytes]):
    rng, good = random.Random(5), encode_jpeg(make_picture(0, 32))
    ended: dict[str, set[str]] = {}
    messages = {name: message.SerializeToString() for name, message in calls(cloud, good).items()}
    before = cloud.peak_bytes()
    for number in range(1001):
        name = list(messages)[number % len(messages)]
        ended.setdefault(name, set()).add(send(cloud, name, mutate(messages[name], rng)))
    clear = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "OUT_OF_RANGE"}
    assert set().union(*ended.values()) <= clear | {"CANCELLED"}, ended
    assert all("INVALID_ARGUMENT" in codes for codes in ended.values()), ended
    assert cloud.peak_bytes() - before < 300 * 2**20
    cloud.is_well(good)


def test_names_and_reasons_without_end_are_refused_or_cut(cloud: Attacked, make_picture):
    good, long = encode_jpeg(make_picture(0)), "x" * 100_000
    query = pb.RecognizeRequest(query_id=1, environment="yard", image=good, device_id=long, keep=True)
    (answer,) = cloud.stub.Recognize(iter([query]), timeout=TIMEOUT_S)
    upload = pb.UploadRequest(upload_id=1, environment="yard", image=good, device_id=long)
    (ack,) = cloud.stub.Upload(iter([upload]), timeout=TIMEOUT_S).acks
    assert answer.error.code == ack.error.code == QUERY.CODE_INVALID_REQUEST and "64 characters" in ack.error.message
    refusal = pb.Refusal(pool_version=long, reason=long)
    for fields in ({"device_id": long}, {"refusals": [pb.Refusal()] * 101}):
        with pytest.raises(grpc.RpcError, match="at most"):
            cloud.stub.Report(pb.ReportRequest(environment="yard", **fields), timeout=TIMEOUT_S)
    cloud.stub.Report(pb.ReportRequest(environment="yard", refusals=[refusal]), timeout=TIMEOUT_S)
    (status,) = cloud.stub.Status(pb.StatusRequest(environment="yard"), timeout=TIMEOUT_S).environments
    assert status.refusals[-1].ByteSize() < 1200 and len(status.refusals[-1].refusal.reason) == 1000
