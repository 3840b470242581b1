"""The spool's way to the cloud, over real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from edgefm.edge.cloud_client import CloudClient
from edgefm.edge.spool import DAY_S, Spool
from edgefm.edge.uploader import Uploader
from edgefm.proto.v1 import edgefm_pb2 as pb

Start = Callable[..., Uploader]


@pytest.fixture
def spool(tmp_path) -> Iterator[Spool]:
    spool = Spool(tmp_path, 10**9, 30 * DAY_S)
    yield spool
    spool.close()


@pytest.fixture
def upload(spool) -> Iterator[Start]:
    """Starts uploaders of that spool; what they leave running is ended."""
    clients, uploaders = [], []

    def start(port: int, **settings) -> Uploader:
        clients.append(CloudClient(f"127.0.0.1:{port}", "tester", "yard", 1000))
        uploaders.append(Uploader(clients[-1], spool, "yard", **settings))
        return uploaders[-1]

    yield start
    for uploader in uploaders:
        uploader.close(0.0)
    for client in clients:
        client.close()


def image(number: int, size: int = 100) -> bytes:
    return number.to_bytes(2, "big") + bytes(size - 2)


def fill(uploader: Uploader, count: int, size: int = 100) -> None:
    for number in range(count):
        uploader.add(image(number, size), number / 1000, 1.0)


def images(requests: list[pb.UploadRequest]) -> list[int]:
    return [int.from_bytes(request.image[:2], "big") for request in requests]


def test_all_leaves_on_acknowledgement_the_most_uncertain_first(scripted, upload, spool):
    uploader = upload(scripted.port)
    fill(uploader, 50)
    assert uploader.close(10.0) == 0 == spool.count()
    sent = scripted.of(pb.UploadRequest)
    assert sorted(images(sent)) == list(range(50))
    assert {(r.environment, r.device_id, r.propensity) for r in sent} == {("yard", "tester", 1.0)}
    assert uploader.sent_bytes == 5000 == spool.sent_on_day(time.time())


def test_what_is_not_acknowledged_stays_and_comes_after_the_others(scripted, upload, spool, until):
    def acks(requests: list[pb.UploadRequest], _: object) -> pb.UploadResponse:
        errors = {
            1: pb.QueryError.CODE_INTERNAL,
            2: pb.QueryError.CODE_UNKNOWN_ENVIRONMENT,
            3: pb.QueryError.CODE_BAD_IMAGE,
        }
        response = pb.UploadResponse()
        for request, number in zip(requests, images(requests), strict=True):
            error = pb.QueryError(code=errors[number]) if number in errors else None
            response.acks.append(pb.UploadAck(upload_id=request.upload_id, error=error))
        return response

    scripted.upload = acks
    for number in range(
        40
    ):  # all wait before the first leaves: an uploader that has nothing else tries the failed anew
        spool.add("yard", image(number), number / 1000, 1.0, time.time())
    upload(scripted.port)
    until(lambda: spool.count() == 2)
    first = images(scripted.of(pb.UploadRequest))[:40]
    assert sorted(first) == list(range(40))  # those that failed did not stand in front of the others
    del scripted.upload
    scripted.upload = lambda requests, _: pb.UploadResponse(
        acks=[pb.UploadAck(upload_id=r.upload_id) for r in requests]
    )
    until(lambda: spool.count() == 0)


def test_a_full_cloud_is_left_alone_as_long_as_it_asks(scripted, upload, spool, until):
    def refuse(requests: list[pb.UploadRequest], context: grpc.ServicerContext) -> pb.UploadResponse:
        context.set_trailing_metadata((("grpc-retry-pushback-ms", "60000"),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")

    scripted.upload = refuse
    uploader = upload(scripted.port)
    fill(uploader, 5)
    until(lambda: uploader._asked_to_wait)
    assert 50 < uploader._again_at_s - time.monotonic() <= 60
    seen = len(scripted.seen)
    fill(uploader, 9)
    assert uploader.close(20.0) == 9  # and closing does not press it either
    assert len(scripted.seen) == seen


def test_closing_ends_an_upload_that_has_minutes_left(scripted, upload, spool, until):
    release, ended = threading.Event(), threading.Event()

    def stall(requests: list[pb.UploadRequest], _: object) -> pb.UploadResponse:
        release.wait(30)
        ended.set()
        return pb.UploadResponse()

    scripted.upload = stall
    uploader = upload(scripted.port)
    fill(uploader, 3)
    until(lambda: scripted.seen)
    try:
        assert uploader.close(0.2) == 3 and not ended.is_set()
    finally:
        release.set()


def test_a_cloud_whose_store_fails_is_left_alone_and_its_connection_kept(scripted, upload, until):
    def refuse(requests: list[pb.UploadRequest], context: grpc.ServicerContext) -> pb.UploadResponse:
        context.set_trailing_metadata((("grpc-retry-pushback-ms", "60000"),))
        context.abort(grpc.StatusCode.UNAVAILABLE, "the disk is full")

    scripted.upload = refuse
    uploader = upload(scripted.port)
    fill(uploader, 1)
    until(lambda: uploader._again_at_s > 0)
    assert uploader._asked_to_wait and 50 < uploader._again_at_s - time.monotonic() <= 60
    assert uploader._client._bulk._failures == 0


def test_a_cloud_that_is_away_costs_nothing_and_the_next_run_goes_on(scripted, upload, spool, unused_port):
    uploader = upload(unused_port, bytes_per_day=100_000)
    fill(uploader, 20)
    started = time.monotonic()
    assert uploader.close(0.5) == 20 and time.monotonic() - started < 10
    assert uploader.sent_bytes == 0 == spool.sent_on_day(time.time())
    assert upload(scripted.port).close(10.0) == 0 and len(scripted.seen) == 20


def test_a_cloud_that_comes_back_gets_it_all(scripted, upload, spool, until):
    scripted.stop()
    uploader = upload(scripted.port)
    fill(uploader, 5)
    until(lambda: uploader._again_at_s > 0)
    scripted.start()
    until(lambda: spool.count() == 0)


def test_the_day_s_cap_holds_across_runs(scripted, upload, spool, until):
    uploader = upload(scripted.port, bytes_per_day=1050)
    fill(uploader, 30)
    until(lambda: spool.count() == 20)
    assert uploader.close(5.0) == 20
    assert upload(scripted.port, bytes_per_day=1050).close(5.0) == 20
    assert sorted(images(scripted.of(pb.UploadRequest))) == list(range(10))
    assert upload(scripted.port, bytes_per_day=1250).close(5.0) == 18
    assert upload(scripted.port).close(5.0) == 0


def test_other_environments_samples_wait_for_their_own_agent(scripted, upload, spool):
    spool.add("street", b"elsewhere", 0.0, 1.0, time.time())
    assert upload(scripted.port).close(5.0) == 0
    assert scripted.seen == [] and spool.count("street") == 1
