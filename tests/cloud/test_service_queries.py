"""Queries and uploads over real sockets, with the real FM: what is answered, and what is kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from edgefm.deploy.camera import DAY, walk
from edgefm.models.images import decode_image
from edgefm.models.versions import sha256_hex
from edgefm.proto.limits import MAX_IMAGE_BYTES, MAX_MESSAGE_BYTES
from edgefm.proto.v1 import edgefm_pb2 as pb

from .conftest import LABELS


@pytest.fixture(scope="module")
def frames() -> list[bytes]:
    return [frame.image_bytes for frame in walk(DAY, 0, 40)]


def recognise(cloud, *requests: pb.RecognizeRequest) -> dict[int, pb.RecognizeResponse]:
    answers = list(cloud.stub.Recognize(iter(requests), timeout=60))
    assert len({answer.query_id for answer in answers}) == len(answers) == len(requests)
    return {answer.query_id: answer for answer in answers}


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


def test_a_message_over_the_limit_is_refused(cloud, yard: str, status_of):
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


# ---- what is kept


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
