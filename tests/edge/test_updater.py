"""New versions on their way to a device, from a real cloud: tested, taken, refused, and gone back from."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgefm.edge.cloud_client import CloudClient
from edgefm.edge.config import AgentConfig
from edgefm.edge.local_state import LocalState
from edgefm.edge.operator import Operator
from edgefm.edge.swap_test import RecentAnswers
from edgefm.edge.updater import Running, Updater
from edgefm.models.head import Head
from edgefm.models.images import Preprocess, encode_jpeg
from edgefm.models.pool import LabelPool
from edgefm.models.student_graph import student_files
from edgefm.models.students import student_profile
from edgefm.models.versions import GRAPH_FILE, HEAD_FILE, BlobRef, StudentManifest
from edgefm.proto.v1 import edgefm_pb2 as pb
from PIL import Image

ENVIRONMENT = "updates"


@pytest.fixture
def updating(cloud, tmp_path):
    """Starts updaters: () -> (updater, what it began with). A second one goes on from the first one's state."""
    if ENVIRONMENT in cloud.registry.environments():
        with Operator(cloud.target) as operator:
            operator.rollback(ENVIRONMENT, 0)
    started: list[tuple[Updater, CloudClient]] = []

    def start(recent: RecentAnswers | None = None, **settings) -> tuple[Updater, Running]:
        settings = {"cloud": cloud.target, "connect_timeout_s": 60.0, "threads": 1, **settings}
        config = AgentConfig(environment=ENVIRONMENT, device_id="tester", **settings)
        client = CloudClient(config.cloud, config.device_id, ENVIRONMENT, 30_000)
        updater = Updater(client, LocalState(tmp_path / "device", ENVIRONMENT), config, recent or RecentAnswers())
        started.append((updater, client))
        running = updater.begin()
        updater.start()
        return updater, running

    yield start
    for updater, client in started:
        updater.close()
        client.close()


@pytest.fixture
def offer(cloud) -> Callable[[StudentManifest], None]:
    """Makes a published version current, so that the cloud announces it."""

    def make_current(manifest: StudentManifest) -> None:
        with Operator(cloud.target) as operator:
            assert operator.rollback(manifest.environment, manifest.version) == manifest.version

    return make_current


def taken(updater: Updater, until) -> Running:
    until(lambda: updater._ready is not None)
    running = updater.take()
    assert running is not None and updater.take() is None
    return running


def test_an_added_label_comes_as_a_new_pool_beside_the_same_student(updating, cloud, tmp_path, until):
    updater, running = updating()
    assert updater.take() is None
    with Operator(cloud.target) as operator:
        operator.add_labels(ENVIRONMENT, ["kettle"])
    changed = taken(updater, until)
    assert changed.student is running.student and changed.pool.labels == (*running.pool.labels, "kettle")
    last = LocalState(tmp_path / "device", ENVIRONMENT).last_good()
    assert last is not None and last[1].sha256 == BlobRef.of("pool.npz", changed.pool.to_bytes()).sha256


def test_a_new_version_is_loaded_and_only_its_head_is_fetched(updating, cloud, offer, until):
    updater, running = updating()
    received = updater.received_bytes
    successor = cloud.publish_successor(ENVIRONMENT)
    offer(successor)
    changed = taken(updater, until)
    assert changed.student.manifest == successor and changed.pool is running.pool
    head = next(ref for ref in successor.files if ref not in running.student.manifest.files)
    assert updater.received_bytes - received == head.size_bytes < received / 3


def test_a_version_that_arrives_corrupt_is_refused_reported_and_a_later_one_taken(
    updating, cloud, offer, until, caplog
):
    caplog.set_level(logging.INFO, "edgefm")
    updater, running = updating()
    bad, good = cloud.publish_successor(ENVIRONMENT), cloud.publish_successor(ENVIRONMENT)
    ref = next(ref for ref in bad.files if ref not in running.student.manifest.files)
    path = cloud.registry.blob_path(ref.sha256)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    cloud.announce(bad)
    reported = f"event=refused_by_device device=tester environment=updates what={bad.version} kind=KIND_DAMAGED"
    until(lambda: reported in caplog.text)
    assert updater.take() is None and updater.refused[0].startswith(
        f"student version {bad.version}: damaged: {ref.sha256} is damaged"
    )
    received = updater.received_bytes
    cloud.stop()  # what is refused is not fetched again when the device registers anew
    cloud.start()
    until(lambda: caplog.text.count("event=device device=tester environment=updates") >= 2)
    offer(good)
    assert taken(updater, until).student.manifest == good
    head = next(ref for ref in good.files if ref not in running.student.manifest.files)
    assert len(updater.refused) == 1 and updater.received_bytes == received + head.size_bytes


@pytest.fixture
def recent(make_picture) -> Callable[[Running], RecentAnswers]:
    """60 samples on which the FM, let us say, agrees with this student."""

    def label(running: Running, samples: RecentAnswers) -> None:
        for seed in range(60):
            picture = make_picture(seed)
            embedding = running.student.embed(running.student.preprocess(picture))
            (answer,) = running.pool.answers(running.pool.recognise(embedding, 1))
            samples.add(encode_jpeg(picture, 98), picture, answer, running.pool.version)

    return label


@pytest.mark.parametrize("environment", ["elsewhere", "../../elsewhere"])
def test_a_student_of_another_environment_is_refused(updating, environment: str):
    updater, running = updating()
    current = running.student.manifest
    updater._consider(current.model_copy(update={"version": 7, "environment": environment}), None)
    (refused,) = updater.refused
    assert refused.startswith(f"student version 7: damaged: it is of the environment {environment!r}, not 'updates'")
    assert updater.take() is None and updater._state.last_good()[0] == current


def test_what_is_not_fit_is_refused_for_its_reason_and_does_not_wedge_the_next(
    updating, cloud, offer, recent, failing_on, until
):
    samples = RecentAnswers()
    updater, running = updating(samples)
    recent(running, samples)
    bright = Image.new("RGB", (64, 64), (250, 250, 250))
    samples.add(encode_jpeg(bright), bright, "cat", running.pool.version)
    head, current = cloud.head(ENVIRONMENT), running.student.manifest
    graph = cloud.graph(ENVIRONMENT)
    slow = student_files(student_profile("lite0-128"), head)
    cases = {
        "damaged: cannot load": {"files": {GRAPH_FILE: graph[:1000]}},
        "damaged: student version {} gives numbers that are not finite": {
            "files": {HEAD_FILE: Head(head.weight * np.nan, head.bias).to_bytes()}
        },
        "damaged: student version {} gives (1, 1280) embeddings, expected (1, 7)": {"files": {}, "embedding_dim": 7},
        "damaged: images cannot be prepared": {"files": {}, "preprocess": Preprocess(-1)},
        "failed: it failed on a recent frame": {"files": {GRAPH_FILE: failing_on(graph, 0.3)}},
        "slow: ": {"files": slow, "preprocess": Preprocess(128)},
        "worse: of 61 recent samples": {"files": {HEAD_FILE: Head(-head.weight, -head.bias).to_bytes()}},
    }
    for number, (reason, changes) in enumerate(cases.items()):
        refused = cloud.publish(ENVIRONMENT, **changes)
        offer(refused)
        until(lambda count=number: len(updater.refused) == count + 1)
        expected = f"student version {refused.version}: {reason.format(refused.version)}"
        assert updater.refused[-1].startswith(expected), updater.refused[-1]
        cloud.registry.rollback(ENVIRONMENT, 0)  # successors are made from the good one
    assert updater.take() is None
    root = updater._state._root
    until(lambda: len(list((root / "blobs").iterdir())) == len(current.files) + 1)  # nothing of theirs is left
    good = cloud.publish_successor(ENVIRONMENT)
    offer(good)
    assert taken(updater, until).student.manifest == good


def test_another_profile_may_be_slower(updating, cloud, offer, until):
    updater, _ = updating()
    larger = student_profile("lite0-128")
    files = student_files(larger, cloud.head(ENVIRONMENT))
    offer(cloud.publish(ENVIRONMENT, files, profile="lite0-128", preprocess=larger.preprocess))
    assert taken(updater, until).student.manifest.profile == "lite0-128"


def test_a_pool_of_another_fm_is_refused(cloud, updating, tmp_path, until):
    """Student and pool that do not speak of the same space never run together, nor are they remembered."""
    updater, running = updating()
    pool = LabelPool(("a", "b"), running.pool.embeddings[:2, :7].copy(), "another")
    ref = cloud.registry.put_blob("pool.npz", pool.to_bytes())
    last = updater._state.last_good()
    updater._consider(None, ref)
    assert "another" in updater.refused[0] and updater.take() is None and updater._state.last_good() == last
    (refusal,) = [r for r in updater._state.refusals._file.refusals if r.pool_version]
    assert refusal.pool_version == ref.sha256[:16]


def test_watching_goes_on_after_the_cloud_was_away(updating, cloud, until):
    updater, _ = updating()
    cloud.stop()
    cloud.start()
    with Operator(cloud.target) as operator:
        operator.add_labels(ENVIRONMENT, ["teapot"])
    assert taken(updater, until).pool.labels[-1] == "teapot"


def test_a_fault_of_its_own_does_not_end_the_watch(updating, cloud, until, caplog):
    updater, _ = updating()
    watch, faults = updater._client.watch, iter((ZeroDivisionError("a bug"),))

    def faulty():
        for fault in faults:
            raise fault
        return watch()

    updater._client.watch = faulty
    cloud.stop()
    cloud.start()
    until(lambda: "event=watch_failed" in caplog.text)
    with Operator(cloud.target) as operator:
        operator.add_labels(ENVIRONMENT, ["toaster"])
    assert taken(updater, until).pool.labels[-1] == "toaster"


# ---- starting with less than all


def test_without_the_cloud_it_begins_with_the_last_good_or_the_one_before(updating, cloud, offer, until, unused_port):
    updater, first = updating()
    successor = cloud.publish_successor(ENVIRONMENT)
    offer(successor)
    taken(updater, until)
    updater.close()
    nowhere = {"cloud": f"127.0.0.1:{unused_port}", "connect_timeout_s": 0.2}
    assert updating(**nowhere)[1].student.manifest == successor
    head = next(ref for ref in successor.files if ref.name == HEAD_FILE)
    (updater._state._root / "blobs" / head.sha256).write_bytes(b"rotten")
    assert updating(**nowhere)[1].student.manifest == first.student.manifest
    assert updating()[1].student.manifest == successor  # the cloud mends it


def test_begun_without_the_cloud_it_registers_when_the_cloud_is_there(updating, cloud, offer, until):
    updating()[0].close()
    successor = cloud.publish_successor(ENVIRONMENT)
    cloud.stop()
    updater, running = updating(connect_timeout_s=0.3)
    assert running.student.manifest.version == 0
    cloud.start()  # where the successor is current by now
    assert taken(updater, until).student.manifest == successor


def test_a_device_with_a_student_starts_on_time_beside_a_cloud_that_takes_long(updating, scripted):
    updating()[0].close()
    release = threading.Event()
    scripted.register = lambda context: release.wait(30) and pb.RegisterResponse()
    began_s = time.monotonic()
    _, running = updating(cloud=f"127.0.0.1:{scripted.port}", connect_timeout_s=0.5)
    took_s = time.monotonic() - began_s
    release.set()
    assert running.student.manifest.version == 0 and took_s < 15


def test_an_offer_that_is_not_fit_does_not_keep_a_device_from_starting(updating, cloud, offer):
    updating()[0].close()
    head = cloud.head(ENVIRONMENT)
    offer(cloud.publish(ENVIRONMENT, {HEAD_FILE: Head(head.weight * np.nan, head.bias).to_bytes()}))
    updater, running = updating()
    assert running.student.manifest.version == 0 and "not finite" in updater.refused[0]


def test_closing_ends_the_thread_whatever_it_does(updating, cloud, unused_port):
    updater, _ = updating()  # watching
    updater.close()
    assert not updater._thread.is_alive()
    updater, _ = updating(cloud=f"127.0.0.1:{unused_port}", connect_timeout_s=0.2)
    updater._registered = False  # registering, or pausing
    updater.close()
    assert not updater._thread.is_alive()


def test_the_device_s_rollback_holds_until_a_newer_version_and_is_reported(updating, cloud, offer, until, caplog):
    caplog.set_level(logging.INFO, "edgefm")
    updater, first = updating()
    second = cloud.publish_successor(ENVIRONMENT)
    offer(second)
    taken(updater, until)
    updater.close()
    LocalState(updater._state._root, ENVIRONMENT).roll_back("an operator said so")
    updater, running = updating()  # though the cloud offers the second one
    assert running.student.manifest == first.student.manifest and updater.refused == []
    until(lambda: not updater._state.refusals.unreported())
    assert f"environment=updates what={second.version} kind=KIND_ROLLED_BACK reason=an operator said so" in caplog.text
    third = cloud.publish_successor(ENVIRONMENT)
    offer(third)
    assert taken(updater, until).student.manifest == third
    offer(first.student.manifest)  # the pin is gone; the second one stays refused
    assert taken(updater, until).student.manifest == first.student.manifest
    offer(second)
    until(lambda: f"event=passed_over student={second.version}" in caplog.text)


# ---- many swaps

SWAPS = """
import json, os, sys
from pathlib import Path
from edgefm.edge import swap_test
from edgefm.edge.cloud_client import CloudClient
from edgefm.edge.config import AgentConfig
from edgefm.edge.local_state import LocalState
from edgefm.edge.swap_test import RecentAnswers
from edgefm.edge.updater import Updater
from edgefm.models.versions import StudentManifest

swap_test._TIMED_RUNS = 1  # twenty runs of a student before each swap would be half of the time
root, target = Path(sys.argv[1]), "127.0.0.1:1"
versions = [StudentManifest.from_json(Path(path).read_bytes()) for path in sys.argv[2:]]
config = AgentConfig(
    cloud=target, environment="updates", state_dir=root, connect_timeout_s=0.1, threads=1, slower_than=1000.0
)
client = CloudClient(target, "device", "updates", 1000)
updater = Updater(client, LocalState(root, "updates"), config, RecentAnswers())
running = updater.begin()
seen = []
for number in range(200):
    updater._consider(versions[(number + 1) % 2], None)
    running = updater.take()
    assert running.student.manifest == versions[(number + 1) % 2]
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files = sum(1 for path in root.rglob("*") if path.is_file())
    seen.append((rss, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), files))
print(json.dumps(seen))
client.close()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_200_swaps_leave_memory_threads_and_disk_as_they_were(updating, cloud, offer, tmp_path, until):
    updater, running = updating()
    successor = cloud.publish_successor(ENVIRONMENT)
    offer(successor)
    taken(updater, until)
    updater.close()
    paths = []
    for manifest in (successor, running.student.manifest):
        paths.append(tmp_path / f"{manifest.version}.json")
        paths[-1].write_text(manifest.to_json())
    root = updater._state._root
    done = subprocess.run(
        [sys.executable, "-c", SWAPS, str(root), *map(str, paths)], capture_output=True, text=True, check=True
    )
    rss, threads, descriptors, files = (list(column) for column in zip(*json.loads(done.stdout), strict=True))
    assert len(rss) == 200
    # After a warm-up of 50; a leak of one head a swap would be 500 MB, of one manifest with calibration 10 MB.
    assert max(rss[150:]) - max(rss[50:100]) < 12 * 2**20, [value >> 20 for value in rss[::10]]
    # The least of many looks: a session that has just gone may still be ending its threads, a leak stays.
    assert min(threads[150:]) == min(threads[1:50]) and min(descriptors[150:]) == min(descriptors[1:50])
    assert max(files[1:]) == min(files[1:])
