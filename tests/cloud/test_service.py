"""The service over real sockets, with the real FM: one server for the module."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from edgefm.cloud.config import CloudConfig, CustomizationConfig
from edgefm.deploy.camera import DAY, PHOTOGRAPHS, walk
from edgefm.models.images import decode_image, encode_jpeg
from edgefm.models.pool import LabelPool
from edgefm.models.versions import HEAD_FILE, StudentManifest, sha256_hex
from edgefm.proto.limits import (
    FETCH_CHUNK_BYTES,
    MAX_IMAGE_BYTES,
    MAX_LABELS_PER_CALL,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
)
from edgefm.proto.v1 import edgefm_pb2 as pb
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

LABELS = tuple(sorted({photograph.label for photograph in PHOTOGRAPHS}))
BASE = ("cat", "rocket")
NEVER = CustomizationConfig(first_at=1_000_000)


@pytest.fixture(scope="module")
def cloud(tmp_path_factory, serve):
    config = CloudConfig(tmp_path_factory.mktemp("cloud"), port=0, labels=BASE, student="lite0-64", customization=NEVER)
    with serve(config) as served:
        yield served


@pytest.fixture(scope="module")
def frames() -> list[bytes]:
    return [frame.image_bytes for frame in walk(DAY, 0, 40)]


def registered(cloud, name: str) -> str:
    cloud.register(name, *(label for label in LABELS if label not in BASE))
    return name


@pytest.fixture(scope="module")
def yard(cloud) -> str:
    """An environment that no test changes: nothing is kept there and its labels stay."""
    return registered(cloud, "yard")


@pytest.fixture
def environment(cloud, request) -> str:
    """An environment of the test's own."""
    return registered(cloud, re.sub(r"\W", "-", request.node.name)[:60])


def status_of(call) -> tuple[grpc.StatusCode, str]:
    """The code and text with which a call is refused."""
    with pytest.raises(grpc.RpcError) as refused:
        result = call()
        if not hasattr(result, "DESCRIPTOR"):
            list(result)
    return refused.value.code(), refused.value.details()


def recognise(cloud, *requests: pb.RecognizeRequest) -> dict[int, pb.RecognizeResponse]:
    answers = list(cloud.stub.Recognize(iter(requests), timeout=60))
    assert len({answer.query_id for answer in answers}) == len(answers) == len(requests)
    return {answer.query_id: answer for answer in answers}


def labels_of(cloud, environment: str) -> list[str]:
    return list(cloud.stub.ListLabels(pb.ListLabelsRequest(environment=environment)).labels)


# ---- registration


def test_registers_once_and_answers_the_same_afterwards(cloud):
    first = cloud.register("twice", "cat", "temple")
    assert first.foundation_model == "synclip" and first.max_image_bytes == MAX_IMAGE_BYTES
    manifest = StudentManifest.from_json(first.student.manifest_json)
    assert (manifest.environment, manifest.version, manifest.profile) == ("twice", 0, "lite0-64")
    assert (first.student.environment, first.student.version) == ("twice", 0)
    assert {(f.name, f.sha256, f.size_bytes) for f in first.student.files} == {
        (ref.name, ref.sha256, ref.size_bytes) for ref in manifest.files
    }
    assert manifest.pool_version == first.pool.version
    # The base labels come first, the device's own after them, none twice.
    assert labels_of(cloud, "twice") == ["cat", "rocket", "temple"]
    again = cloud.register("twice", "another label", device_id="another device")
    assert again == first
    assert labels_of(cloud, "twice") == ["cat", "rocket", "temple"]
    assert cloud.register("twice", student_profile="lite0-64") == first


def test_labels_out_of_reach_are_taken_with_a_warning(cloud):
    warnings = cloud.register("reach", "zxqv flooble").warnings
    assert len(warnings) == 1 and "'zxqv flooble' is out of synclip's reach" in warnings[0]


@pytest.mark.parametrize(
    ("protocol", "who"), [(PROTOCOL_VERSION - 1, "the device"), (PROTOCOL_VERSION + 1, "the cloud")]
)
def test_another_protocol_is_refused(cloud, protocol: int, who: str):
    code, text = status_of(lambda: cloud.register("other", "cat", protocol=protocol))
    assert code is grpc.StatusCode.FAILED_PRECONDITION and text.endswith(f"upgrade edgefm on {who}")


@pytest.mark.parametrize(
    ("environment", "fields", "says"),
    [
        ("", {}, "environment's name"),
        ("../up", {}, "environment's name"),
        ("x" * 65, {}, "environment's name"),
        ("base", {}, "choose another name"),
        ("new", {"student_profile": "resnet"}, "unknown student 'resnet'; choose one of lite0-64"),
        ("new", {"labels": ["cow", " "]}, "non-empty"),
        ("new", {"labels": ["cow", "cow"]}, "given twice: cow"),
        ("new", {"labels": ["unknown"]}, "choose another label"),
        ("new", {"labels": [str(i) for i in range(MAX_LABELS_PER_CALL + 1)]}, "at most"),
    ],
)
def test_bad_registrations_are_refused_and_leave_nothing(cloud, environment: str, fields: dict, says: str):
    code, text = status_of(lambda: cloud.register(environment, **fields))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and says in text
    assert "new" not in cloud.server.environments.registry.environments()


def test_devices_of_an_environment_share_one_student(cloud, yard: str):
    code, text = status_of(lambda: cloud.register(yard, student_profile="lite0-96"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "runs student lite0-64, not lite0-96" in text


# ---- recognition


def test_answers_pair_up_with_their_queries(cloud, yard: str, frames: list[bytes], synclip):
    """40 queries at once, with ids in shuffled order, against the FM asked directly."""
    pool, _ = cloud.server.environments.pool(yard)
    ids = np.random.default_rng(2).permutation(1000)[: len(frames)]
    answers = recognise(
        cloud,
        *(
            pb.RecognizeRequest(query_id=int(number), environment=yard, image=frame, top_k=3)
            for number, frame in zip(ids, frames, strict=True)
        ),
    )
    direct = pool.recognise(synclip.embed_images([decode_image(frame) for frame in frames]), 3)
    assert len({int(index) for index in direct.indices[:, 0]}) > 2  # several labels: a mix-up would show
    for row, number in enumerate(ids):
        answer = answers[int(number)]
        assert not answer.HasField("error") and answer.pool_version == pool.version
        assert [match.label for match in answer.matches] == [pool.labels[index] for index in direct.indices[row]]
        similarities = [match.similarity for match in answer.matches]
        np.testing.assert_allclose(similarities, direct.similarities[row], atol=1e-4)
        assert answer.margin == pytest.approx(float(direct.margins[row]), abs=1e-4)
        assert answer.unknown == direct.unknown[row]
        assert answer.queue_ms >= 0 and answer.compute_ms > 0
    assert max(answer.batch_size for answer in answers.values()) > 1  # they shared batches
    assert all(answer.batch_size <= 16 for answer in answers.values())
    assert cloud.server.environments.samples_labelled(yard) == 0  # nothing was to be kept


def test_a_bad_image_costs_only_its_own_answer(cloud, environment: str, frames: list[bytes]):
    bad = {1: b"", 2: b"no image", 3: frames[0][: len(frames[0]) // 2], 4: b"\0" * (MAX_IMAGE_BYTES + 1)}
    queries = [
        pb.RecognizeRequest(query_id=number, environment=environment, image=bad.get(number, frames[number]), keep=True)
        for number in range(8)
    ]
    answers = recognise(cloud, *queries)
    for number, answer in answers.items():
        if number in bad:
            assert answer.error.code == pb.QueryError.CODE_BAD_IMAGE and not answer.matches
        else:
            assert not answer.HasField("error") and answer.matches
    assert f"at most {MAX_IMAGE_BYTES}" in answers[4].error.message
    assert cloud.server.environments.store.count(environment) == 4


def test_a_stream_goes_on_after_an_error(cloud, yard: str, frames: list[bytes]):
    """One query after the other on one stream, each sent once the last is answered."""
    answered = threading.Semaphore(1)

    def queries() -> Iterator[pb.RecognizeRequest]:
        for number, (name, image) in enumerate(
            [(yard, frames[0]), (yard, b"?"), ("nowhere", frames[0]), (yard, frames[1])]
        ):
            assert answered.acquire(timeout=30)
            yield pb.RecognizeRequest(query_id=number, environment=name, image=image)

    codes = []
    for answer in cloud.stub.Recognize(queries(), timeout=60):
        codes.append((answer.query_id, answer.error.code))
        if answer.query_id == 2:
            assert "unknown environment 'nowhere'; known: " in answer.error.message
        answered.release()
    assert codes == [
        (0, pb.QueryError.CODE_UNSPECIFIED),
        (1, pb.QueryError.CODE_BAD_IMAGE),
        (2, pb.QueryError.CODE_UNKNOWN_ENVIRONMENT),
        (3, pb.QueryError.CODE_UNSPECIFIED),
    ]


def test_a_message_over_the_limit_is_refused(cloud, yard: str):
    query = pb.RecognizeRequest(environment=yard, image=b"\0" * (MAX_MESSAGE_BYTES + 1))
    code, _ = status_of(lambda: cloud.stub.Recognize(iter([query])))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_query_past_its_deadline_is_not_computed(cloud, yard: str, frames: list[bytes]):
    """It waits behind two batches and has a millisecond."""
    queries = [pb.RecognizeRequest(query_id=i, environment=yard, image=frames[i % 40]) for i in range(48)]
    late = pb.RecognizeRequest(query_id=99, environment=yard, image=frames[0], deadline_ms=1, keep=True)
    answers = recognise(cloud, *queries, late)
    assert answers[99].error.code == pb.QueryError.CODE_DEADLINE and "in the queue" in answers[99].error.message
    assert not any(answers[i].HasField("error") for i in range(48))
    assert cloud.server.environments.store.count(yard) == 0


@pytest.mark.parametrize(("top_k", "expected"), [(0, 5), (1, 1), (3, 3), (100, len(LABELS))])
def test_as_many_labels_come_back_as_asked_for(cloud, yard: str, frames: list[bytes], top_k: int, expected: int):
    query = pb.RecognizeRequest(query_id=1, environment=yard, image=frames[0], top_k=top_k)
    matches = recognise(cloud, query)[1].matches
    assert len(matches) == expected == len({match.label for match in matches})
    similarities = [match.similarity for match in matches]
    assert similarities == sorted(similarities, reverse=True)


def test_only_what_may_be_kept_is_kept_and_once(cloud, environment: str, frames: list[bytes]):
    store = cloud.server.environments.store

    def ask(keep: bool, image: bytes, propensity: float = 0.0) -> pb.RecognizeResponse:
        query = pb.RecognizeRequest(
            query_id=1, environment=environment, image=image, keep=keep, propensity=propensity, device_id="d"
        )
        return recognise(cloud, query)[1]

    assert ask(False, frames[0]).samples_labelled == 0 == store.count(environment)
    assert ask(True, frames[0], 0.25).samples_labelled == 1 == store.count(environment)
    assert ask(True, frames[0], 1.0).samples_labelled == 1 == store.count(environment)
    assert ask(True, frames[1]).samples_labelled == 2 == store.count(environment)
    assert ask(False, frames[2]).samples_labelled == 2
    stored = store.samples(environment)
    propensities = dict(zip(stored.sha256, stored.propensities, strict=True))
    # The first answer stays; a propensity that was not sent is 1.
    assert propensities == {sha256_hex(frames[0]): 0.25, sha256_hex(frames[1]): 1.0}
    assert store.image_path(sha256_hex(frames[0])).read_bytes() == frames[0]


@pytest.mark.parametrize("propensity", [-1.0, 1.5, float("nan")])
def test_a_sample_with_an_impossible_propensity_is_refused(cloud, yard: str, frames: list[bytes], propensity: float):
    query = pb.RecognizeRequest(query_id=1, environment=yard, image=frames[0], keep=True, propensity=propensity)
    error = recognise(cloud, query)[1].error
    assert error.code == pb.QueryError.CODE_INVALID_REQUEST and "propensity" in error.message
    upload = pb.UploadRequest(upload_id=1, environment=yard, image=frames[0], propensity=propensity)
    ack = cloud.stub.Upload(iter([upload])).acks[0]
    assert ack.error.code == pb.QueryError.CODE_INVALID_REQUEST and "propensity" in ack.error.message
    assert cloud.server.environments.store.count(yard) == 0


def test_the_base_pool_is_no_environment_to_keep_samples_in(cloud, frames: list[bytes]):
    query = pb.RecognizeRequest(query_id=1, environment="base", image=frames[0], keep=True)
    assert recognise(cloud, query)[1].error.code == pb.QueryError.CODE_UNKNOWN_ENVIRONMENT
    ack = cloud.stub.Upload(iter([pb.UploadRequest(upload_id=1, environment="base", image=frames[0])])).acks[0]
    assert ack.error.code == pb.QueryError.CODE_UNKNOWN_ENVIRONMENT
    assert cloud.server.environments.store.count("base") == 0


# ---- upload


def test_uploads_are_acknowledged_by_their_ids(cloud, environment: str, frames: list[bytes]):
    uploads = [
        pb.UploadRequest(upload_id=number, environment=name, image=image, propensity=0.5, device_id="d")
        for number, name, image in (
            (30, environment, frames[0]),
            (10, environment, b"no image"),
            (20, environment, frames[1]),
            (40, environment, frames[0]),
            (50, "nowhere", frames[2]),
        )
    ]
    acks = {ack.upload_id: ack for ack in cloud.stub.Upload(iter(uploads)).acks}
    assert acks.keys() == {10, 20, 30, 40, 50}
    for number, image, duplicate in ((30, frames[0], False), (20, frames[1], False), (40, frames[0], True)):
        ack = acks[number]
        assert (ack.sha256, ack.duplicate, ack.HasField("error")) == (sha256_hex(image), duplicate, False)
    assert acks[10].error.code == pb.QueryError.CODE_BAD_IMAGE
    assert acks[50].error.code == pb.QueryError.CODE_UNKNOWN_ENVIRONMENT
    assert cloud.server.environments.samples_labelled(environment) == 2
    again = cloud.stub.Upload(iter(uploads[:1])).acks[0]
    assert again.duplicate and again.sha256 == sha256_hex(frames[0])
    assert list(cloud.stub.Upload(iter([])).acks) == []


# ---- versions on their way to the device


def test_watch_tells_what_runs_and_then_every_change(cloud, environment: str):
    environments = cloud.server.environments
    watch = cloud.stub.Watch(pb.WatchRequest(device_id="d", environment=environment), timeout=60)
    try:
        pool_event, student_event = next(watch), next(watch)
        registered = cloud.register(environment)
        assert pool_event.pool == registered.pool and student_event.student == registered.student

        added = cloud.stub.AddLabels(pb.AddLabelsRequest(environment=environment, labels=["zebra"]))
        event = next(watch)
        assert event.WhichOneof("change") == "pool" and event.pool.version == added.pool_version

        version0 = environments.registry.manifest(environment, 0)
        published = environments.registry.publish(version0.model_copy(update={"parent": 0}), {HEAD_FILE: b"head"})
        cloud.stub.Rollback(pb.RollbackRequest(environment=environment, version=1))
        event = next(watch)
        assert event.WhichOneof("change") == "student" and event.student.version == 1
        assert StudentManifest.from_json(event.student.manifest_json) == published

        back = cloud.stub.Rollback(pb.RollbackRequest(environment=environment))
        event = next(watch)
        assert back.version == 0 and event.student == back == registered.student
    finally:
        watch.cancel()


def test_rollback_needs_a_version_to_go_to(cloud, yard: str):
    for request, says in (
        (pb.RollbackRequest(environment=yard), "version 0 of .* has no parent"),
        (pb.RollbackRequest(environment=yard, version=9), "has no version 9; there are: 0"),
        (pb.RollbackRequest(environment="nowhere"), "unknown environment 'nowhere'"),
        (pb.RollbackRequest(environment="base"), "no student"),
    ):
        code, text = status_of(lambda request=request: cloud.stub.Rollback(request))
        assert code is grpc.StatusCode.INVALID_ARGUMENT and re.search(says, text)
    assert cloud.register(yard).student.version == 0


@pytest.mark.parametrize("environment", ["nowhere", "base"])
def test_only_an_environment_with_a_student_can_be_watched(cloud, environment: str):
    code, text = status_of(lambda: cloud.stub.Watch(pb.WatchRequest(environment=environment)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and environment in text


def test_every_file_can_be_fetched_and_resumed(cloud, yard: str):
    registered = cloud.register(yard)
    for blob in (*registered.student.files, registered.pool.file):
        chunks = list(cloud.stub.Fetch(pb.FetchRequest(sha256=blob.sha256)))
        data = b"".join(chunk.data for chunk in chunks)
        assert len(data) == blob.size_bytes and hashlib.sha256(data).hexdigest() == blob.sha256
        assert {(chunk.total_bytes, chunk.sha256) for chunk in chunks} == {(blob.size_bytes, blob.sha256)}
        assert [chunk.offset_bytes for chunk in chunks] == list(range(0, len(data), FETCH_CHUNK_BYTES))
        for offset in (1, len(data) // 2, len(data) - 1):
            rest = list(cloud.stub.Fetch(pb.FetchRequest(sha256=blob.sha256, offset_bytes=offset)))
            assert rest[0].offset_bytes == offset and b"".join(chunk.data for chunk in rest) == data[offset:]
        assert list(cloud.stub.Fetch(pb.FetchRequest(sha256=blob.sha256, offset_bytes=len(data)))) == []
    assert LabelPool.from_bytes(data).version == registered.pool.version  # the last one was the pool


def test_what_cannot_be_fetched(cloud, yard: str):
    file = cloud.register(yard).pool.file
    for request, expected in (
        (pb.FetchRequest(sha256="0" * 64), grpc.StatusCode.NOT_FOUND),
        (pb.FetchRequest(sha256="../../store/samples.db"), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.FetchRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.FetchRequest(sha256=file.sha256, offset_bytes=file.size_bytes + 1), grpc.StatusCode.OUT_OF_RANGE),
        (pb.FetchRequest(sha256=file.sha256, offset_bytes=2**63), grpc.StatusCode.OUT_OF_RANGE),
    ):
        assert status_of(lambda request=request: cloud.stub.Fetch(request))[0] is expected


# ---- labels


def test_labels_are_added_and_removed_while_it_runs(cloud, environment: str, synclip):
    before = labels_of(cloud, environment)
    version = cloud.register(environment).pool.version
    added = cloud.stub.AddLabels(pb.AddLabelsRequest(environment=environment, labels=[" zebra ", "zxqv flooble"]))
    assert list(added.labels) == [*before, "zebra", "zxqv flooble"] == labels_of(cloud, environment)
    assert added.pool_version != version and added.environment == environment
    assert any("'zxqv flooble'" in warning for warning in added.warnings)
    assert not any("zebra" in warning for warning in added.warnings)

    data = b"".join(
        chunk.data for chunk in cloud.stub.Fetch(pb.FetchRequest(sha256=cloud.register(environment).pool.file.sha256))
    )
    pool = LabelPool.from_bytes(data)
    assert pool.version == added.pool_version
    np.testing.assert_allclose(pool.embeddings[len(before)], synclip.embed_labels(["zebra"])[0], atol=1e-5)

    removed = cloud.stub.RemoveLabels(pb.RemoveLabelsRequest(environment=environment, labels=["zxqv flooble", "zebra"]))
    assert list(removed.labels) == before
    assert removed.pool_version == version  # named by content: the same labels are the same pool


def test_a_change_that_is_half_wrong_changes_nothing(cloud, yard: str):
    before = cloud.stub.ListLabels(pb.ListLabelsRequest(environment=yard))

    def add(*labels: str):
        return cloud.stub.AddLabels(pb.AddLabelsRequest(environment=yard, labels=labels))

    def remove(*labels: str):
        return cloud.stub.RemoveLabels(pb.RemoveLabelsRequest(environment=yard, labels=labels))

    assert status_of(lambda: add("zebra", "cat")) == (
        grpc.StatusCode.ALREADY_EXISTS,
        f"already in the pool of {yard}: cat",
    )
    assert status_of(lambda: remove("cat", "zebra")) == (
        grpc.StatusCode.NOT_FOUND,
        f"not in the pool of {yard}: zebra",
    )
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    for call in (
        lambda: add(),
        lambda: remove(),
        lambda: add("zebra", ""),
        lambda: add("zebra", "zebra"),
        lambda: add("zebra", "unknown"),
        lambda: add("zebra", "x" * 201),
        lambda: add(*(f"label {i}" for i in range(MAX_LABELS_PER_CALL + 1))),
        lambda: remove(*before.labels),  # a pool is never empty
    ):
        assert status_of(call)[0] is invalid
    nowhere = pb.AddLabelsRequest(environment="nowhere", labels=["zebra"])
    assert status_of(lambda: cloud.stub.AddLabels(nowhere))[0] is invalid
    assert status_of(lambda: cloud.stub.ListLabels(pb.ListLabelsRequest(environment="nowhere")))[0] is invalid
    assert cloud.stub.ListLabels(pb.ListLabelsRequest(environment=yard)) == before


def test_the_base_labels_are_where_new_environments_start(cloud, yard: str):
    assert labels_of(cloud, "") == list(BASE)
    before = labels_of(cloud, yard)
    cloud.stub.AddLabels(pb.AddLabelsRequest(labels=["temple"]))
    try:
        cloud.register("after", "coins", "temple")
        assert labels_of(cloud, "after") == [*BASE, "temple", "coins"]
        assert labels_of(cloud, yard) == before  # existing environments keep theirs
    finally:
        cloud.stub.RemoveLabels(pb.RemoveLabelsRequest(labels=["temple"]))
    assert labels_of(cloud, "") == list(BASE)


# ---- standard services


def test_health_and_reflection(cloud):
    health = health_pb2_grpc.HealthStub(cloud.channel)
    for service in ("", "edgefm.v1.EdgeFM"):
        status = health.Check(health_pb2.HealthCheckRequest(service=service)).status
        assert status == health_pb2.HealthCheckResponse.SERVING
    missing = health_pb2.HealthCheckRequest(service="edgefm.v9.EdgeFM")
    assert status_of(lambda: health.Check(missing))[0] is grpc.StatusCode.NOT_FOUND
    reflected = ProtoReflectionDescriptorDatabase(cloud.channel)
    assert {"edgefm.v1.EdgeFM", "grpc.health.v1.Health"} <= set(reflected.get_services())
    methods = reflected.FindFileContainingSymbol("edgefm.v1.EdgeFM").service[0].method
    assert "Recognize" in {method.name for method in methods}


# ---- a service on what an earlier one left


def test_a_restart_finds_versions_pools_and_counts(tmp_path: Path, make_picture, serve):
    config = CloudConfig(tmp_path / "cloud", port=0, labels=BASE, student="lite0-64", customization=NEVER)
    uploads = [
        pb.UploadRequest(upload_id=i, environment="yard", image=encode_jpeg(make_picture(i)), propensity=1.0)
        for i in range(5)
    ]
    with serve(config) as first:
        first.register("yard", "temple")
        first.stub.AddLabels(pb.AddLabelsRequest(environment="yard", labels=["zebra"]))
        first.stub.AddLabels(pb.AddLabelsRequest(labels=["coins"]))
        assert not any(ack.duplicate for ack in first.stub.Upload(iter(uploads)).acks)
        registry = first.server.environments.registry
        version0 = registry.manifest("yard", 0)
        for _ in range(2):
            registry.publish(version0.model_copy(update={"parent": 0}), {})
        first.stub.Rollback(pb.RollbackRequest(environment="yard", version=1))
        left = first.register("yard")
    with serve(config) as second:
        assert second.register("yard") == left and left.student.version == 1
        assert labels_of(second, "yard") == [*BASE, "temple", "zebra"]
        assert labels_of(second, "") == [*BASE, "coins"]
        assert second.server.environments.samples_labelled("yard") == 5
        assert all(ack.duplicate for ack in second.stub.Upload(iter(uploads)).acks)
        assert second.stub.Rollback(pb.RollbackRequest(environment="yard")).version == 0
