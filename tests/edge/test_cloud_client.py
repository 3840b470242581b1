"""The device's end of the contract against a real cloud: client."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time

import grpc
import pytest
from edgefm.edge.cloud_client import CloudClient, UploadResult
from edgefm.edge.operator import Operator
from edgefm.edge.queries import CloudAnswer, StudentAnswer
from edgefm.edge.refusals import Refusal
from edgefm.models.errors import CloudError, DeadlineError, InputError
from edgefm.models.pool import LabelPool
from edgefm.models.versions import BlobRef, sha256_hex
from edgefm.proto.limits import MAX_IMAGE_BYTES, PROTOCOL_VERSION
from edgefm.proto.v1 import edgefm_pb2 as pb
from edgefm.proto.v1 import edgefm_pb2_grpc as rpc

STALL_S = 10.0


class Answers:
    """Collects completions."""

    def __init__(self) -> None:
        self.results: list[CloudAnswer | CloudError] = []
        self._came = threading.Condition()

    def __call__(self, result: CloudAnswer | CloudError) -> None:
        with self._came:
            self.results.append(result)
            self._came.notify_all()

    def wait(self, count: int, timeout_s: float = 60.0) -> list[CloudAnswer | CloudError]:
        with self._came:
            assert self._came.wait_for(lambda: len(self.results) >= count, timeout_s), self.results
            return list(self.results)


def test_nothing_under_edge_imports_torch():
    code = (
        "import importlib, pkgutil, sys, edgefm.edge as edge\n"
        "names = [m.name for m in pkgutil.iter_modules(edge.__path__)]\n"
        "assert len(names) > 12, names\n"
        "[importlib.import_module(f'edgefm.edge.{name}') for name in names]\n"
        "print([m for m in ('torch', 'torchvision', 'timm', 'onnx', 'transformers', 'open_clip') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_registration_says_what_to_run(connect):
    client = connect("registered", register=False)
    registration = client.register(["kettle"], "", 60.0)
    assert registration.student.environment == "registered" and registration.student.version == 0
    assert registration.student.profile == "lite0-64" and registration.foundation_model.startswith("synclip")
    data = b"".join(client.fetch(registration.pool.sha256, 0, STALL_S))
    pool = LabelPool.from_bytes(data)
    assert pool.labels[-1] == "kettle" and BlobRef.of("pool.npz", data) == registration.pool
    assert client.register(["other"], "", 20.0) == registration  # known by now: its labels stay


def test_a_registration_that_the_cloud_refuses(connect):
    with pytest.raises(InputError, match=r"registration: unknown student 'lite9'"):
        connect("refused", register=False).register((), "lite9", 20.0)


def test_a_query_is_answered_with_what_it_took(connect, cloud, jpegs):
    client, answers = connect("asking"), Answers()
    before = cloud.samples("asking")
    ids = [client.query(image, 1.0, answers) for image in jpegs[:8]]
    assert len(set(ids)) == 8
    floor = cloud.server.environments.pool("asking")[0].unknown_floor
    for answer in answers.wait(8):
        assert isinstance(answer, CloudAnswer)
        assert len(answer.labels) == len(answer.similarities) == 5
        assert answer.unknown == (answer.similarities[0] < floor)
        assert list(answer.similarities) == sorted(answer.similarities, reverse=True)
        assert answer.margin == pytest.approx(answer.similarities[0] - answer.similarities[1], abs=1e-6)
        assert answer.compute_ms > 0 and answer.queue_ms >= 0 and answer.pool_version
    assert cloud.samples("asking") == before + 8 == max(answer.samples_labelled for answer in answers.results)
    assert client.available


def test_a_query_that_is_not_to_be_kept_is_not(connect, cloud, jpegs):
    client, answers = connect("asking"), Answers()
    before = cloud.samples("asking")
    client.query(jpegs[70], 1.0, answers, keep=False)
    assert isinstance(answers.wait(1)[0], CloudAnswer) and cloud.samples("asking") == before


def test_a_bad_image_costs_its_own_answer_only(connect, jpegs):
    client, bad, good = connect("asking"), Answers(), Answers()
    client.query(b"no image", 1.0, bad)
    client.query(jpegs[0], 1.0, good)
    (error,) = bad.wait(1)
    assert type(error) is CloudError and "not a JPEG" in str(error)
    assert isinstance(good.wait(1)[0], CloudAnswer) and client.available


def test_a_deadline_of_one_millisecond_passes(connect, jpegs):
    client, answers = connect("asking", deadline_ms=1.0), Answers()
    started = time.monotonic()
    for image in jpegs[:5]:
        client.query(image, 1.0, answers)
    results = answers.wait(5)
    assert {type(result) for result in results} == {DeadlineError} and time.monotonic() - started < 5
    time.sleep(0.3)  # late answers are for nobody
    assert len(answers.results) == 5


def test_an_environment_that_nobody_registered(connect, jpegs):
    client, answers = connect("strange", register=False), Answers()
    client.query(jpegs[0], 1.0, answers)
    (error,) = answers.wait(1)
    assert isinstance(error, CloudError) and "unknown environment 'strange'" in str(error)
    with pytest.raises(CloudError, match="unknown environment"):
        next(client.watch())


def test_fetching_goes_on_from_an_offset_and_says_what_is_missing(connect):
    client = connect("asking")
    ref = client.register((), "", 60.0).student.files[0]
    whole = b"".join(client.fetch(ref.sha256, 0, STALL_S))
    assert len(whole) == ref.size_bytes
    assert b"".join(client.fetch(ref.sha256, ref.size_bytes - 100, STALL_S)) == whole[-100:]
    with pytest.raises(CloudError, match="there is no blob"):
        next(client.fetch("0" * 64, 0, STALL_S))
    with pytest.raises(CloudError, match="past the blob's"):
        next(client.fetch(ref.sha256, ref.size_bytes + 1, STALL_S))


def test_the_operator_s_mistakes_are_input_errors(connect, cloud):
    connect("asking")
    with Operator(cloud.target) as operator:
        before = operator.list_labels("asking")
        with pytest.raises(InputError, match="already in the pool"):
            operator.add_labels("asking", [before.labels[0]])
        with pytest.raises(InputError, match="not in the pool"):
            operator.remove_labels("asking", ["kettle"])
        with pytest.raises(InputError, match="no parent"):
            operator.rollback("asking")
        assert operator.list_labels("asking") == before


# ---- uploads


def test_uploads_are_acknowledged_whether_new_known_or_refused(connect, cloud, jpegs):
    client = connect("asking")
    before = cloud.samples("asking")
    samples = [(jpegs[10], 1.0), (b"no image", 1.0), (jpegs[11], 0.02), (jpegs[10], 1.0)]
    assert client.upload(samples, 20.0).done == (0, 1, 2, 3)
    assert cloud.samples("asking") == before + 2
    stored = cloud.server.environments.store.samples("asking")
    propensity = dict(zip(stored.sha256, stored.propensities, strict=True))
    assert propensity[sha256_hex(jpegs[10])] == 1.0 and propensity[sha256_hex(jpegs[11])] == pytest.approx(0.02)


# ---- the cloud goes away


def test_no_cloud_is_a_cloud_error_at_once_and_opens_the_circuit(unused_port, jpegs):
    client, answers = CloudClient(f"127.0.0.1:{unused_port}", "tester", "asking", 10_000), Answers()
    assert client.available
    started = time.monotonic()
    client.query(jpegs[0], 1.0, answers)
    (error,) = answers.wait(1)
    assert type(error) is CloudError and "cannot be reached" in str(error)
    assert time.monotonic() - started < 5  # long before the deadline
    assert not client.available
    with pytest.raises(CloudError, match="cannot be reached"):
        client.upload([(jpegs[0], 1.0)], 5.0)
    with pytest.raises(DeadlineError, match="registration"):
        client.register((), "", 0.3)
    client.close()


def test_queries_under_way_fail_when_the_cloud_goes_and_are_answered_when_it_is_back(connect, cloud, jpegs, until):
    client, answers = connect("asking"), Answers()
    before = cloud.samples("asking")
    client.query(jpegs[50], 1.0, answers)
    assert isinstance(answers.wait(1)[0], CloudAnswer)
    cloud.stop()
    until(lambda: not client.available)  # the broken stream tells without a query
    until(lambda: client.available)
    client.query(jpegs[51], 1.0, answers)
    assert type(answers.wait(2)[1]) is CloudError and not client.available
    cloud.start()  # the same port and data

    def asked_again() -> bool:
        if client.available:
            count = len(answers.results)
            client.query(jpegs[52], 1.0, answers)
            return isinstance(answers.wait(count + 1)[-1], CloudAnswer)
        return False

    until(asked_again)
    assert client.available and cloud.samples("asking") == before + 2


def test_closing_answers_what_is_under_way(connect, jpegs, until):
    client, answers = connect("asking"), Answers()
    for image in jpegs[:20]:
        client.query(image, 1.0, answers)
    client.close()
    assert len(answers.wait(20, 5.0)) == 20


def test_an_image_at_the_limit_travels(connect, jpegs):
    """Padding after the end of a JPEG is ignored by decoders."""
    client, answers = connect("asking"), Answers()
    client.query(jpegs[0] + bytes(MAX_IMAGE_BYTES - len(jpegs[0])), 1.0, answers)
    assert isinstance(answers.wait(1)[0], CloudAnswer)


# ---- what a healthy cloud seldom does


@pytest.fixture
def client(scripted):
    client = CloudClient(f"127.0.0.1:{scripted.port}", "tester", "yard", 5000)
    yield client
    client.close()


def test_a_query_carries_what_the_student_said(client, scripted):
    answers = Answers()
    client.query(b"a", 0.5, answers, edge=StudentAnswer("cat", 0.25, 3, "0123", 0.125))
    client.query(b"b", 1.0, answers, keep=False)
    answers.wait(2)
    said, silent = scripted.of(pb.RecognizeRequest)
    assert (said.edge_label, said.edge_margin, said.student_version, said.edge_pool_version) == ("cat", 0.25, 3, "0123")
    assert (said.query_propensity, silent.query_propensity) == (0.125, 0.0)
    assert (said.propensity, said.keep, said.device_id, said.environment) == (0.5, True, "tester", "yard")
    assert (silent.edge_label, silent.edge_pool_version, silent.keep) == ("", "", False)


def fail_with(code: pb.QueryError.Code, retry_after_ms: int = 0):
    error = pb.QueryError(code=code, message="not now", retry_after_ms=retry_after_ms)
    return lambda request: pb.RecognizeResponse(query_id=request.query_id, error=error)


def test_a_cloud_that_is_there_may_work_on_a_registration(client, scripted, cloud):
    done = threading.Event()

    def slowly(context: grpc.ServicerContext) -> pb.RegisterResponse:
        done.wait(20)
        return hello

    with grpc.insecure_channel(cloud.target) as channel:
        request = pb.RegisterRequest(protocol=PROTOCOL_VERSION, device_id="d", environment="patient")
        hello = rpc.EdgeFMStub(channel).Register(request, timeout=60)
    scripted.register = slowly
    with pytest.raises(DeadlineError, match="registration: the cloud did not answer in time"):
        client.register((), "", 1.5)
    threading.Timer(4.0, done.set).start()
    assert client.register((), "", 2.0, 30.0).student.environment == "patient"


def test_what_does_not_speak_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = CloudClient(f"127.0.0.1:{silent.getsockname()[1]}", "tester", "yard", 5000)
        began = time.monotonic()
        with pytest.raises(DeadlineError, match="registration: the cloud did not answer in time"):
            client.register((), "", 0.5, 60.0)
        client.close()
    assert time.monotonic() - began < 15


def test_an_overloaded_cloud_is_left_alone_as_long_as_it_asks(client, scripted, until):
    answers = Answers()
    scripted.answer = fail_with(pb.QueryError.CODE_OVERLOADED, retry_after_ms=700)
    started = time.monotonic()
    client.query(b"a", 1.0, answers)
    (error,) = answers.wait(1)
    assert isinstance(error, CloudError) and "not now" in str(error) and not client.available
    until(lambda: client.available)
    assert time.monotonic() - started > 0.7


def test_a_cloud_whose_fm_fails_gets_one_probe_after_a_pause(client, scripted, until):
    answers = Answers()
    healthy, scripted.answer = scripted.answer, fail_with(pb.QueryError.CODE_INTERNAL)
    client.query(b"a", 1.0, answers)
    answers.wait(1)
    assert not client.available
    until(lambda: client.available)
    release = threading.Event()

    def slowly(request: pb.RecognizeRequest) -> pb.RecognizeResponse:
        release.wait(10)
        return healthy(request)

    scripted.answer = slowly
    client.query(b"b", 1.0, answers)
    assert not client.available  # the probe is out
    release.set()
    assert isinstance(answers.wait(2)[1], CloudAnswer) and client.available


def test_a_probe_that_is_never_answered_is_given_up(scripted, until):
    client, answers, release = (
        CloudClient(f"127.0.0.1:{scripted.port}", "tester", "yard", 300),
        Answers(),
        threading.Event(),
    )
    scripted.answer = fail_with(pb.QueryError.CODE_INTERNAL)
    client.query(b"a", 1.0, answers)
    answers.wait(1)
    until(lambda: client.available)
    scripted.answer = lambda request: release.wait(20) and pb.RecognizeResponse(query_id=request.query_id)
    client.query(b"b", 1.0, answers)
    assert isinstance(answers.wait(2)[1], DeadlineError)
    until(lambda: client.available)  # after a longer pause it may be asked again
    release.set()
    client.close()


def test_a_refused_upload_says_when_to_come_again(client, scripted):
    def refuse(requests, context: grpc.ServicerContext):
        context.set_trailing_metadata((("grpc-retry-pushback-ms", "1500"),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")

    scripted.upload = refuse
    assert client.upload([(b"a", 1.0)], 10.0) == UploadResult((), 1.5)


def test_a_report_names_what_was_refused_and_why(client, scripted):
    heard = threading.Event()
    refusals = [
        Refusal(key="a", kind="SLOW", reason="slow here", student_version=0),
        Refusal(key="b", kind="DAMAGED", reason="no pool", pool_version="0123"),
    ]
    client.report(refusals, heard.set)
    assert heard.wait(10)
    (report,) = scripted.of(pb.ReportRequest)
    assert (report.device_id, report.environment) == ("tester", "yard")
    slow, damaged = report.refusals
    assert (slow.WhichOneof("what"), slow.student_version, slow.kind) == ("student_version", 0, pb.Refusal.KIND_SLOW)
    assert (damaged.pool_version, damaged.kind, damaged.reason) == ("0123", pb.Refusal.KIND_DAMAGED, "no pool")


def test_interrupting_ends_what_would_wait_long(unused_port):
    client = CloudClient(f"127.0.0.1:{unused_port}", "tester", "yard", 5000)
    errors: list[CloudError] = []

    def register() -> None:
        try:
            client.register((), "", 60.0)
        except CloudError as error:
            errors.append(error)

    thread = threading.Thread(target=register)
    thread.start()
    time.sleep(0.3)
    client.interrupt()
    thread.join(10)
    assert not thread.is_alive() and len(errors) == 1
    for late in (
        lambda: client.register((), "", 60.0),
        lambda: next(client.watch()),
        lambda: next(client.fetch("", 0, 1)),
    ):
        with pytest.raises(CloudError, match="stopping"):
            late()
    client.close()
