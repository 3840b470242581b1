"""The service under load, on a full disk, with a failing FM, and when its start fails: over real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from edgefm.cloud import server as server_module
from edgefm.cloud.config import CloudConfig, CustomizationConfig, DriftConfig
from edgefm.cloud.server import CloudServer
from edgefm.models.errors import ConfigError, ModelError, StoreError
from edgefm.models.images import encode_jpeg
from edgefm.proto.v1 import edgefm_pb2 as pb
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

NEVER = CustomizationConfig(first_at=1_000_000)
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Faulty:
    """The real FM behind a gate, which fails when it is told to."""

    def __init__(self, model) -> None:
        self._model = model
        self.gate = threading.Event()
        self.gate.set()
        self.failing = False

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def embed(self, batch: np.ndarray) -> np.ndarray:
        assert self.gate.wait(30)
        if self.failing:
            raise RuntimeError("CUDA error: device-side assert")
        return self._model.embed(batch)


@pytest.fixture
def fm(synclip, monkeypatch) -> Faulty:
    """What the server loads. The one place to hand it a model is the loader's name."""
    faulty = Faulty(synclip)
    monkeypatch.setattr(server_module, "load_foundation_model", lambda uri: faulty)
    return faulty


@pytest.fixture(scope="module")
def images(make_picture) -> list[bytes]:
    return [encode_jpeg(make_picture(seed)) for seed in range(40)]


def config(folder: Path, **settings: object) -> CloudConfig:
    fields = {
        "port": 0,
        "labels": ("cat", "rocket"),
        "student": "lite0-64",
        "customization": NEVER,
        "health_period_s": 0.2,
    }
    return CloudConfig(folder, **(fields | settings))  # pyright: ignore[reportArgumentType]


def until(happened: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)


def health_of(served, service: str = "") -> int:
    return health_pb2_grpc.HealthStub(served.channel).Check(health_pb2.HealthCheckRequest(service=service)).status


def query(number: int, image: bytes, device: str = "d", **fields: object) -> pb.RecognizeRequest:
    values = {"query_id": number, "environment": "yard", "image": image, "device_id": device}
    return pb.RecognizeRequest(**(values | fields))  # pyright: ignore[reportArgumentType]


def metrics_of(served) -> dict[tuple[str, ...], float]:
    """By name and the values of its labels, in the order of the labels' names."""
    with urllib.request.urlopen(f"http://127.0.0.1:{served.server.metrics_port}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_full_queue_tells_each_query_and_upload_when_to_come_again(tmp_path: Path, serve, fm: Faulty, images):
    """One device fills the queue; another is served all the same."""
    with serve(config(tmp_path, max_queue=8, max_batch=4, metrics_port=0)) as cloud:
        cloud.register("yard")
        fm.gate.clear()
        requests: queue.SimpleQueue[pb.RecognizeRequest | None] = queue.SimpleQueue()
        greedy = cloud.stub.Recognize(iter(requests.get, None), timeout=60)
        sent = 0
        while cloud.stub.Status(pb.StatusRequest()).queue_live < 8 or sent < 20:
            requests.put(query(sent, images[sent % 40], "greedy"))
            sent += 1
            time.sleep(0.02)
        refused = next(greedy)
        assert refused.error.code == pb.QueryError.CODE_OVERLOADED and refused.error.retry_after_ms > 0
        modest = cloud.stub.Recognize(iter([query(0, images[0], "modest")]), timeout=60)
        uploads = [pb.UploadRequest(upload_id=i, environment="yard", image=images[i]) for i in range(3)]
        with pytest.raises(grpc.RpcError) as full:
            cloud.stub.Upload(iter(uploads), timeout=60)
        assert full.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        hint = dict(full.value.trailing_metadata())["grpc-retry-pushback-ms"]
        assert int(hint) > 0
        wrong = pb.UploadRequest(upload_id=9, environment="yard", image=images[0], propensity=2.0)
        acks = {ack.upload_id: ack.error for ack in cloud.stub.Upload(iter([wrong, uploads[0]]), timeout=60).acks}
        assert acks[9].code == pb.QueryError.CODE_INVALID_REQUEST and acks[9].retry_after_ms == 0
        assert acks[0].code == pb.QueryError.CODE_OVERLOADED and acks[0].retry_after_ms > 0
        fm.gate.set()
        assert not next(modest).HasField("error")
        requests.put(None)
        answers = [refused, *greedy]
        assert any(not answer.HasField("error") for answer in answers) and len(answers) == sent
        # What was refused can come again, and then everything is kept.
        assert len(cloud.stub.Upload(iter(uploads), timeout=60).acks) == 3
        overloaded = sum(answer.error.code == pb.QueryError.CODE_OVERLOADED for answer in answers)
        counted = metrics_of(cloud)
        assert counted["edgefm_cloud_requests_total", "overloaded"] == overloaded
        assert counted["edgefm_cloud_requests_total", "ok"] == sent + 1 - overloaded
        assert counted["edgefm_cloud_queue_length", "live"] == 0


def test_a_full_disk_costs_the_samples_and_not_the_answers(
    tmp_path: Path, serve, fm: Faulty, images, full_disk, caplog
):
    with serve(config(tmp_path, metrics_port=0)) as cloud:
        cloud.register("yard")
        assert health_of(cloud) == SERVING
        with full_disk():
            answers = list(cloud.stub.Recognize(iter([query(i, images[i], keep=True) for i in range(5)]), timeout=60))
            assert len(answers) == 5 and all(answer.matches and not answer.HasField("error") for answer in answers)
            until(lambda: health_of(cloud) == NOT_SERVING)
            assert health_of(cloud, "edgefm.v1.EdgeFM") == NOT_SERVING == health_of(cloud, "store")
            assert health_of(cloud, "fm") == SERVING
            upload = pb.UploadRequest(upload_id=1, environment="yard", image=images[0])
            with pytest.raises(grpc.RpcError) as refused:
                cloud.stub.Upload(iter([upload]), timeout=60)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"] == "5000"
            wrong = pb.UploadRequest(upload_id=9, environment="yard", image=images[0], propensity=2.0)
            acks = {ack.upload_id: ack.error for ack in cloud.stub.Upload(iter([wrong, upload]), timeout=60).acks}
            assert acks.keys() == {1, 9} and acks[9].code == pb.QueryError.CODE_INVALID_REQUEST
            assert acks[1].code == pb.QueryError.CODE_INTERNAL and acks[1].retry_after_ms == 5000
            unhealthy = cloud.stub.Status(pb.StatusRequest()).unhealthy
            assert "free space" in unhealthy["store"] and "fm" not in unhealthy
            counted = metrics_of(cloud)
            assert counted["edgefm_cloud_samples_total", "failed"] == 5
            assert counted["edgefm_cloud_healthy", "store"] == 0 and counted["edgefm_cloud_healthy", "fm"] == 1
        until(lambda: health_of(cloud) == SERVING)
        assert len(cloud.stub.Upload(iter([upload]), timeout=60).acks) == 1
        assert cloud.server.environments.store.count("yard") == 1
    events = [record.getMessage() for record in caplog.records if record.name == "edgefm.cloud.health"]
    assert (
        events[0].startswith("event=unhealthy part=store reason=cannot")
        and events[1] == "event=healthy_again part=store"
    )


def test_a_failing_model_is_told_by_health_until_a_canary_is_answered(tmp_path: Path, serve, fm: Faulty, images):
    with serve(config(tmp_path)) as cloud:
        cloud.register("yard")
        fm.failing = True
        (answer,) = cloud.stub.Recognize(iter([query(1, images[0])]), timeout=60)
        assert answer.error.code == pb.QueryError.CODE_INTERNAL and "CUDA error" in answer.error.message
        until(lambda: health_of(cloud) == NOT_SERVING)
        assert health_of(cloud, "fm") == NOT_SERVING and health_of(cloud, "store") == SERVING
        fm.failing = False  # nobody asks; the canary finds out
        until(lambda: health_of(cloud) == SERVING)


# ---- starting


def start(settings: CloudConfig) -> Exception:
    """The error with which it fails to start; nothing may be left behind: warnings are errors here."""

    async def attempt() -> Exception:
        with pytest.raises((ConfigError, ModelError, StoreError)) as failed:
            await CloudServer(settings).start()
        return failed.value

    return asyncio.run(attempt())


def test_a_taken_port_is_found_before_the_model_is_loaded(tmp_path: Path, fm: Faulty, monkeypatch):
    monkeypatch.setattr(server_module, "load_foundation_model", lambda uri: pytest.fail("it was loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "cannot listen" in str(start(config(tmp_path, port=port)))
        assert "cannot serve metrics" in str(start(config(tmp_path, metrics_port=port)))
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_closes_what_it_had_opened(tmp_path: Path, serve, fm: Faulty):
    fm.failing = True
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "does not answer" in str(start(config(tmp_path, port=port, metrics_port=0)))
    fm.failing = False
    with serve(config(tmp_path, port=port)) as cloud:  # the port, the lock and the store are free again
        assert health_of(cloud) == SERVING


def test_a_second_cloud_in_the_same_folder_is_refused(tmp_path: Path, serve, fm: Faulty):
    with serve(config(tmp_path)):
        (tmp_path / "drift").mkdir()
        being_written = tmp_path / "drift" / ".yard.json.x1y2"
        being_written.write_bytes(b"")
        assert "another cloud works in" in str(start(config(tmp_path)))
        assert being_written.exists()  # it is not the second's to clear away
    with serve(config(tmp_path)):
        assert not being_written.exists()


def test_other_labels_than_those_on_the_disk_are_not_silent(tmp_path: Path, serve, fm: Faulty, caplog):
    with serve(config(tmp_path)), serve(config(tmp_path / "other", labels=("dog",))):
        pass
    for labels, warned in ((("rocket", "cat"), False), (("cat", "dog"), True)):
        caplog.clear()
        with serve(config(tmp_path, labels=labels)) as cloud:
            assert set(cloud.stub.ListLabels(pb.ListLabelsRequest()).labels) == {"cat", "rocket"}
        assert ("event=labels_ignored" in caplog.text) == warned


# ---- drift, from the wire to a run


def edge_says(number: int, image: bytes, response: pb.RegisterResponse, label: str) -> pb.RecognizeRequest:
    return query(
        number,
        image,
        keep=True,
        edge_label=label,
        edge_margin=0.1 + number % 7 / 100,
        student_version=response.student.version,
        edge_pool_version=response.pool.version,
    )


def test_drift_is_told_counted_kept_over_a_restart_and_starts_a_run(tmp_path: Path, serve, fm: Faulty, images, caplog):
    caplog.set_level(logging.INFO, "edgefm.cloud")
    drift = DriftConfig(baseline=40, window=40, recent=40, average_run=100.0)
    # No count ever starts a run by itself after the first, which the test does not reach.
    learn = CustomizationConfig(first_at=25, growth=1000.0, threads=1)
    settings = config(tmp_path, drift=drift, customization=learn, metrics_port=0)

    def ask(cloud, registered: pb.RegisterResponse, count: int, right: bool, first: int) -> None:
        """The student says what the FM says, or its opposite."""
        for start_at in range(first, first + count, 20):
            numbers = range(start_at, min(start_at + 20, first + count))
            plain = list(cloud.stub.Recognize(iter([query(i, images[i % 40]) for i in numbers]), timeout=60))
            said = {answer.query_id: answer.matches[0].label for answer in plain if not answer.unknown}
            unknown = {answer.query_id for answer in plain if answer.unknown}
            asked = []
            for i in numbers:
                truth = "unknown" if i in unknown else said[i]
                asked.append(edge_says(i, images[i % 40], registered, truth if right else "something else"))
            list(cloud.stub.Recognize(iter(asked), timeout=60))

    def messages(event: str) -> list[str]:
        return [record.getMessage() for record in caplog.records if record.getMessage().startswith(f"event={event} ")]

    with serve(settings) as cloud:
        registered = cloud.register("yard")
        ask(cloud, registered, 40, right=True, first=0)
        until(lambda: bool(messages("customized")))  # the first 25 samples have started it
        assert messages("drift") == []
        (status,) = cloud.stub.Status(pb.StatusRequest(environment="yard")).environments
        left = cloud.register("yard")
        if left.student.version == 0:  # the gate refused: the baseline is still version 0's
            assert status.baseline.share == 1.0 and status.baseline.samples == 40 and not status.alarms
    with serve(settings) as cloud:
        registered = cloud.register("yard")
        if registered.student.version:
            ask(cloud, registered, 40, right=True, first=0)
        ask(cloud, registered, 40, right=False, first=0)
        (alarm,) = messages("drift")
        assert "environment=yard kind=agreement" in alarm and "baseline_agreement=1.0000" in alarm
        (status,) = cloud.stub.Status(pb.StatusRequest(environment="yard")).environments
        assert [raised.kind for raised in status.alarms] == ["agreement"]
        assert status.alarms[0].statistic >= status.alarms[0].limit == 100.0
        assert status.alarms[0].agreement.share == 0.0 and status.agreement.share < 0.5
        counted = metrics_of(cloud)
        assert counted["edgefm_cloud_drift_alarms_total", "yard", "agreement"] == 1
        assert counted["edgefm_cloud_drift_raised", "yard"] == 1
        assert counted["edgefm_cloud_student_agreement_ratio", "yard"] < 0.5
        assert counted["edgefm_cloud_student_version", "yard"] == registered.student.version
        assert counted["edgefm_cloud_samples_stored", "yard"] == 40
        # All 40 pictures are known: 25 new samples have to come before the run that the alarm asked for.
        runs = len(messages("customized"))
        new = [np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8) for i in range(25)]
        encoded = [encode_jpeg(Image.fromarray(array).resize((64, 64))) for array in new]
        list(cloud.stub.Recognize(iter([query(i, image, keep=True) for i, image in enumerate(encoded)]), timeout=60))
        until(lambda: len(messages("customized")) == runs + 1)
        run = dict(pair.split("=", 1) for pair in messages("customized")[-1].split(" "))
        assert float(run["since"]) > 0 and int(run["samples"]) == 65  # all teach; those since the evidence began judge
        assert cloud.server.environments.trainer.outcomes.total() == 1


def test_refusals_are_told_to_an_operator(tmp_path: Path, serve, edgefm, fm: Faulty):
    with serve(config(tmp_path, metrics_port=0)) as cloud:
        cloud.register("yard")
        refusals = [
            pb.Refusal(student_version=number, kind=pb.Refusal.KIND_SLOW, reason="9 ms\nand \x1b[31mred")
            for number in range(25)
        ]
        cloud.stub.Report(pb.ReportRequest(device_id="d\n1", environment="yard", refusals=refusals))
        with pytest.raises(grpc.RpcError, match="unknown environment"):
            cloud.stub.Report(pb.ReportRequest(device_id="d", environment="nowhere", refusals=refusals))
        (status,) = cloud.stub.Status(pb.StatusRequest()).environments
        assert [reported.refusal for reported in status.refusals] == refusals[-20:]
        cloud.stub.Report(
            pb.ReportRequest(device_id="d\n1", environment="yard", refusals=refusals[-3:])
        )  # not heard of again
        (status,) = cloud.stub.Status(pb.StatusRequest()).environments
        assert [reported.refusal for reported in status.refusals] == refusals[-20:]
        assert metrics_of(cloud)["edgefm_cloud_refusals_total", "slow"] == 25

        def status_lines(*arguments: str) -> list[str]:
            done = edgefm("status", *arguments, "--cloud", f"127.0.0.1:{cloud.server.port}")
            assert done.returncode == 0, done.stderr
            return done.stdout.splitlines()

        newer = pb.Refusal(student_version=25, reason="a new one", kind=99)  # pyright: ignore[reportArgumentType]
        cloud.stub.Report(pb.ReportRequest(device_id="d", environment="yard", refusals=[newer]))
        assert status_lines()[-1] == "  refused by d: student 25, unspecified: a new one"
        cloud.stub.Report(pb.ReportRequest(device_id="d\n1", environment="yard", refusals=refusals))
        lines = status_lines()
        assert lines[0] == "cloud: synclip, waiting: 0 queries, 0 uploads"
        assert lines[1].startswith("yard: student lite0-64 version 0 of 1; 2 labels, pool ")
        assert lines[-1] == "  refused by d 1: student 24, slow: 9 ms and ?[31mred"
        assert json.loads("\n".join(status_lines("yard", "--json")))["environments"][0]["student_version"] == 0
