"""The service over real sockets, with the real FM: registration, versions on their way to the device, labels, restarts."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import grpc
import numpy as np
import pytest
from edgefm.cloud.config import CloudConfig, CustomizationConfig
from edgefm.models.images import encode_jpeg
from edgefm.models.pool import LabelPool
from edgefm.models.versions import HEAD_FILE, StudentManifest
from edgefm.proto.limits import FETCH_CHUNK_BYTES, MAX_IMAGE_BYTES, MAX_LABELS_PER_CALL, PROTOCOL_VERSION
from edgefm.proto.v1 import edgefm_pb2 as pb
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from .conftest import BASE

NEVER = CustomizationConfig(first_at=1_000_000)


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
def test_another_protocol_is_refused(cloud, protocol: int, who: str, status_of):
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
def test_bad_registrations_are_refused_and_leave_nothing(cloud, environment: str, fields: dict, says: str, status_of):
    code, text = status_of(lambda: cloud.register(environment, **fields))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and says in text
    assert "new" not in cloud.server.environments.registry.environments()


def test_devices_of_an_environment_share_one_student(cloud, yard: str, status_of):
    code, text = status_of(lambda: cloud.register(yard, student_profile="lite0-96"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "runs student lite0-64, not lite0-96" in text


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


def test_rollback_needs_a_version_to_go_to(cloud, yard: str, status_of):
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
def test_only_an_environment_with_a_student_can_be_watched(cloud, environment: str, status_of):
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


def test_what_cannot_be_fetched(cloud, yard: str, status_of):
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


def test_a_change_that_is_half_wrong_changes_nothing(cloud, yard: str, status_of):
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


def test_health_and_reflection(cloud, status_of):
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
