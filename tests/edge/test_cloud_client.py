"""The device's end of the contract against a real cloud: client, uploader, updater."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from edgefm.edge.cloud_client import CloudAnswer, CloudClient
from edgefm.edge.local_state import LocalState
from edgefm.edge.operator import Operator
from edgefm.edge.updater import Running, Updater
from edgefm.edge.uploader import Uploader
from edgefm.models.errors import CloudError, DeadlineError, InputError
from edgefm.models.pool import LabelPool
from edgefm.models.versions import BlobRef, StudentManifest, sha256_hex
from edgefm.proto.limits import MAX_IMAGE_BYTES

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
    client, answers = connect("yard"), Answers()
    before = cloud.samples("yard")
    ids = [client.query(image, 1.0, answers) for image in jpegs[:8]]
    assert len(set(ids)) == 8
    floor = cloud.server.environments.pool("yard")[0].unknown_floor
    for answer in answers.wait(8):
        assert isinstance(answer, CloudAnswer)
        assert len(answer.labels) == len(answer.similarities) == 5
        assert answer.unknown == (answer.similarities[0] < floor)
        assert list(answer.similarities) == sorted(answer.similarities, reverse=True)
        assert answer.margin == pytest.approx(answer.similarities[0] - answer.similarities[1], abs=1e-6)
        assert answer.compute_ms > 0 and answer.queue_ms >= 0 and answer.pool_version
    assert cloud.samples("yard") == before + 8 == max(answer.samples_labelled for answer in answers.results)
    assert client.available


def test_a_query_that_is_not_to_be_kept_is_not(connect, cloud, jpegs):
    client, answers = connect("yard"), Answers()
    before = cloud.samples("yard")
    client.query(jpegs[70], 1.0, answers, keep=False)
    assert isinstance(answers.wait(1)[0], CloudAnswer) and cloud.samples("yard") == before


def test_a_bad_image_costs_its_own_answer_only(connect, jpegs):
    client, bad, good = connect("yard"), Answers(), Answers()
    client.query(b"no image", 1.0, bad)
    client.query(jpegs[0], 1.0, good)
    (error,) = bad.wait(1)
    assert type(error) is CloudError and "not a JPEG" in str(error)
    assert isinstance(good.wait(1)[0], CloudAnswer) and client.available


def test_a_deadline_of_one_millisecond_passes(connect, jpegs):
    client, answers = connect("yard", deadline_ms=1.0), Answers()
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
    client = connect("yard")
    ref = client.register((), "", 60.0).student.files[0]
    whole = b"".join(client.fetch(ref.sha256, 0, STALL_S))
    assert len(whole) == ref.size_bytes
    assert b"".join(client.fetch(ref.sha256, ref.size_bytes - 100, STALL_S)) == whole[-100:]
    with pytest.raises(CloudError, match="there is no blob"):
        next(client.fetch("0" * 64, 0, STALL_S))
    with pytest.raises(CloudError, match="past the blob's"):
        next(client.fetch(ref.sha256, ref.size_bytes + 1, STALL_S))


def test_the_operator_s_mistakes_are_input_errors(connect, cloud):
    connect("yard")
    with Operator(cloud.target) as operator:
        before = operator.list_labels("yard")
        with pytest.raises(InputError, match="already in the pool"):
            operator.add_labels("yard", [before.labels[0]])
        with pytest.raises(InputError, match="not in the pool"):
            operator.remove_labels("yard", ["kettle"])
        with pytest.raises(InputError, match="no parent"):
            operator.rollback("yard")
        assert operator.list_labels("yard") == before


# ---- uploads


def test_uploads_are_acknowledged_whether_new_known_or_refused(connect, cloud, jpegs):
    client = connect("yard")
    before = cloud.samples("yard")
    samples = [(jpegs[10], 1.0), (b"no image", 1.0), (jpegs[11], 0.02), (jpegs[10], 1.0)]
    assert client.upload(samples, 20.0) == [0, 1, 2, 3]
    assert cloud.samples("yard") == before + 2
    stored = cloud.server.environments.store.samples("yard")
    propensity = dict(zip(stored.sha256, stored.propensities, strict=True))
    assert propensity[sha256_hex(jpegs[10])] == 1.0 and propensity[sha256_hex(jpegs[11])] == pytest.approx(0.02)


def test_the_uploader_empties_its_queue(connect, cloud, jpegs):
    before, images = cloud.samples("yard"), jpegs[12:40]  # two batches
    uploader = Uploader(connect("yard"), capacity=100)
    for image in images:
        uploader.add(image, 0.1, 1.0)
    assert uploader.close(20.0) == 0
    assert cloud.samples("yard") == before + len(images)
    assert uploader.sent_bytes == sum(map(len, images)) and uploader.dropped == 0


def test_a_full_queue_drops_the_most_certain_and_nothing_is_lost_silently(unused_port, jpegs):
    client = CloudClient(f"127.0.0.1:{unused_port}", "tester", "yard", 1000)
    uploader = Uploader(client, capacity=5)
    for i, image in enumerate(jpegs[:20]):
        uploader.add(image, (7 * i % 20) / 20, 1.0)
    left = uploader._waiting
    assert sorted(margin for margin, _, _ in left) == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    started = time.monotonic()
    assert uploader.close(0.3) == 5 and time.monotonic() - started < 5
    assert uploader.dropped == 15 and uploader.sent_bytes == 0
    client.close()


# ---- the cloud goes away


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_no_cloud_is_a_cloud_error_at_once_and_opens_the_circuit(unused_port, jpegs):
    client, answers = CloudClient(f"127.0.0.1:{unused_port}", "tester", "yard", 10_000), Answers()
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
    client, answers = connect("yard"), Answers()
    before = cloud.samples("yard")
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
    assert client.available and cloud.samples("yard") == before + 2


def test_closing_answers_what_is_under_way(connect, jpegs, until):
    client, answers = connect("yard"), Answers()
    for image in jpegs[:20]:
        client.query(image, 1.0, answers)
    client.close()
    assert len(answers.wait(20, 5.0)) == 20


# ---- versions


@pytest.fixture
def updating(cloud, connect, tmp_path):
    """Starts updaters: (environment) -> (updater, what it loaded first)."""
    updaters = []

    def start(environment: str) -> tuple[Updater, Running]:
        client = connect(environment)
        updater = Updater(client, LocalState(tmp_path / environment, environment), threads=1)
        registration = client.register((), "", 60.0)
        running = updater.load(registration.student, registration.pool)
        updater.start()
        updaters.append(updater)
        return updater, running

    yield start
    for updater in updaters:
        updater.close()


def taken(updater: Updater, until) -> Running:
    until(lambda: updater._ready is not None)
    running = updater.take()
    assert running is not None and updater.take() is None
    return running


def test_an_added_label_comes_as_a_new_pool_beside_the_same_student(updating, cloud, tmp_path, until):
    updater, running = updating("pools")
    assert updater.take() is None
    with Operator(cloud.target) as operator:
        operator.add_labels("pools", ["kettle"])
    changed = taken(updater, until)
    assert changed.student is running.student and changed.pool.labels == (*running.pool.labels, "kettle")
    last = LocalState(tmp_path / "pools", "pools").last_good()
    assert last is not None and last[1].sha256 == BlobRef.of("pool.npz", changed.pool.to_bytes()).sha256


def test_a_new_version_is_loaded_and_only_its_head_is_fetched(updating, cloud, until):
    updater, running = updating("versions")
    received = updater.received_bytes
    successor = cloud.publish_successor("versions")
    with Operator(cloud.target) as operator:
        assert operator.rollback("versions", successor.version) == successor.version
    changed = taken(updater, until)
    assert changed.student.manifest == successor and changed.pool is running.pool
    head = next(ref for ref in successor.files if ref not in running.student.manifest.files)
    assert updater.received_bytes - received == head.size_bytes < received / 3


def test_a_version_that_arrives_corrupt_is_refused_and_a_later_one_taken(updating, cloud, until):
    updater, running = updating("versions")
    bad, good = cloud.publish_successor("versions"), cloud.publish_successor("versions")
    ref = next(ref for ref in bad.files if ref not in running.student.manifest.files)
    path = cloud.registry.blob_path(ref.sha256)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with Operator(cloud.target) as operator:
        cloud.announce(bad)
        until(lambda: bool(updater.refused))
        assert updater.take() is None and "is damaged" in updater.refused[0]
        operator.rollback("versions", good.version)
    assert taken(updater, until).student.manifest.version == good.version and len(updater.refused) == 1


def test_a_pool_of_another_fm_is_refused(cloud, updating, tmp_path, until):
    """Student and pool that do not speak of the same space never run together, nor are they remembered."""
    _, running = updating("versions")
    pool = LabelPool(("a", "b"), running.pool.embeddings[:2, :7].copy(), "another")
    ref = BlobRef.of("pool.npz", pool.to_bytes())

    class Client(CloudClient):
        def watch(self) -> Iterator[StudentManifest | BlobRef]:
            yield ref
            time.sleep(60)

        def fetch(self, sha256: str, offset: int, stall_timeout_s: float) -> Iterator[bytes]:
            assert sha256 == ref.sha256
            yield pool.to_bytes()[offset:]

    state = LocalState(tmp_path / "versions", "versions")
    last = state.last_good()
    assert last is not None
    client = Client(cloud.target, "tester", "versions", 1000)
    updater = Updater(client, state, threads=1)
    updater.load(*last)
    updater.start()
    until(lambda: bool(updater.refused))
    assert "another" in updater.refused[0] and updater.take() is None and state.last_good() == last
    updater.close()
    client.close()


def test_watching_goes_on_after_the_cloud_was_away(updating, cloud, until):
    updater, _ = updating("pools")
    cloud.stop()
    cloud.start()
    with Operator(cloud.target) as operator:
        operator.add_labels("pools", ["teapot"])
    assert taken(updater, until).pool.labels[-1] == "teapot"


def test_an_image_at_the_limit_travels(connect, jpegs):
    """Padding after the end of a JPEG is ignored by decoders."""
    client, answers = connect("yard"), Answers()
    client.query(jpegs[0] + bytes(MAX_IMAGE_BYTES - len(jpegs[0])), 1.0, answers)
    assert isinstance(answers.wait(1)[0], CloudAnswer)
