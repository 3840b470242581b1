"""A wall clock that somebody sets while cloud and agent run: to 1970, to the right time, ten years ahead, and back."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from edgefm.models.clock import CLOCK_SET_S
from edgefm.models.images import encode_jpeg
from edgefm.proto.limits import CHANNEL_OPTIONS, PROTOCOL_VERSION
from edgefm.proto.v1 import edgefm_pb2 as pb
from edgefm.proto.v1 import edgefm_pb2_grpc as rpc

YEARS_S = 10 * 365 * 86_400.0
PATCH = """
import os, time
real = time.time
time.time = lambda: real() + float(open(os.environ["TEST_CLOCK"]).read())
"""


class WallClock:
    """Of all processes with `environment`: seconds to add to the real one. The monotonic clocks are left alone."""

    def __init__(self, folder: Path) -> None:
        (folder / "sitecustomize.py").write_text(PATCH)
        self._shift = folder / "shift"
        self.environment = {"PYTHONPATH": str(folder), "TEST_CLOCK": str(self._shift)}
        self.shift(0.0)

    def shift(self, seconds: float) -> None:
        beside = self._shift.with_suffix(".new")
        beside.write_text(repr(seconds))
        beside.replace(self._shift)

    def to_1970(self) -> None:
        self.shift(300.0 - time.time())


@pytest.fixture
def clock(tmp_path: Path, monkeypatch) -> WallClock:
    folder = tmp_path / "clock"
    folder.mkdir()
    clock = WallClock(folder)
    for name, value in clock.environment.items():
        monkeypatch.setenv(name, value)
    return clock


@pytest.fixture
def start_agent(tmp_path: Path, make_picture) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Agents with one state folder, on a source of 400 pictures; its summary comes on stdout."""
    pictures, started = tmp_path / "pictures", []
    pictures.mkdir()
    for seed in range(400):
        (pictures / f"{seed:03d}.jpg").write_bytes(encode_jpeg(make_picture(seed)))

    def start(target: str, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "edgefm.deploy.cli", "agent", str(pictures), "--cloud", target]
        command += ["--state-dir", str(tmp_path / "agent"), "-o", str(tmp_path / "answers.jsonl")]
        started.append(subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True, env=os.environ.copy()))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def until(happened: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)


def rows(database: Path, query: str) -> list[tuple]:
    with closing(sqlite3.connect(database)) as db:
        return db.execute(query).fetchall()


def finish(agent: subprocess.Popen[str]) -> dict[str, object]:
    """The summary; an agent on its way out tries to hand over what waits."""
    out, _ = agent.communicate(timeout=60)
    assert agent.returncode == 0
    return json.loads(out)


def test_an_agent_loses_nothing_of_its_spool_and_keeps_its_daily_cap(
    start_cloud, start_agent, unused_port, clock, tmp_path
):
    spool = tmp_path / "agent" / "spool.sqlite"
    cloud = start_cloud("--labels", "cat, rocket", "--student", "lite0-64")
    finish(start_agent(cloud.target, "--limit", "5"))

    # Without a cloud everything waits; the device has booted in 1970, NTP sets its clock, and it is set wrongly too.
    clock.to_1970()
    settings = tmp_path / "settings.toml"
    settings.write_text("[agent]\nconnect_timeout_s = 0.2\n")
    agent = start_agent(f"127.0.0.1:{unused_port}", "--fps", "100", "--config", str(settings))
    count = lambda: rows(spool, "SELECT count(*) FROM samples")[0][0]  # noqa: E731
    until(lambda: spool.exists() and count() >= 20)
    for seconds in (0.0, YEARS_S, 0.0):
        before = count()
        clock.shift(seconds)
        until(lambda before=before: count() >= before + 60)
    summary = finish(agent)
    assert summary["frames"] == 400 == summary["fallback"] == summary["uploads_left"]
    assert (summary["uploads_expired"], summary["uploads_dropped"]) == (0, 0)
    assert rows(spool, "SELECT max(created_at) FROM samples")[0][0] < CLOCK_SET_S  # its clock began in 1970

    # The next run has the right time, and then ten years more; the cap of each day holds.
    cap = 30_000
    agent = start_agent(cloud.target, "--fps", "40", "--upload-bytes-per-day", str(cap))
    sent = lambda: [row[0] for row in rows(spool, "SELECT bytes FROM sent")]  # noqa: E731
    until(lambda: sum(sent()) > cap * 0.9)
    clock.shift(YEARS_S)
    agent.send_signal(signal.SIGTERM)
    summary = finish(agent)
    assert all(day <= cap for day in sent()) and summary["uploads_expired"] == 0
    assert count() == summary["uploads_left"] > 100
    assert time.time() - 60 < rows(spool, "SELECT min(created_at) FROM samples")[0][0] < time.time()


def stamps(cloud) -> list[float]:
    return [row[0] for row in rows(cloud.data_dir / "store" / "samples.db", "SELECT received_at FROM samples")]


def test_a_cloud_keeps_its_samples_and_its_drift_watch(start_cloud, clock, tmp_path, make_picture):
    settings = tmp_path / "settings.toml"
    settings.write_text("[cloud]\nretention_days = 1\nhealth_period_s = 0.1\n")  # how often old samples are removed
    flags = ("--labels", "cat, rocket", "--student", "lite0-64", "--config", str(settings))
    numbers = iter(range(1000))

    def ask(cloud, count: int) -> None:
        """Queries as a device sends them, kept and compared with what its student said."""
        with grpc.insecure_channel(cloud.target, CHANNEL_OPTIONS) as channel:
            stub = rpc.EdgeFMStub(channel)
            hello = pb.RegisterRequest(protocol=PROTOCOL_VERSION, device_id="d", environment="yard")
            registered = stub.Register(hello, timeout=60)
            queries = [
                pb.RecognizeRequest(
                    query_id=number,
                    environment="yard",
                    image=encode_jpeg(make_picture(number)),
                    keep=True,
                    edge_label="cat",
                    edge_margin=0.1,
                    student_version=registered.student.version,
                    edge_pool_version=registered.pool.version,
                )
                for number in (next(numbers) for _ in range(count))
            ]
            answers = list(stub.Recognize(iter(queries), timeout=60))
            assert len(answers) == count and not any(answer.HasField("error") for answer in answers)
            (status,) = stub.Status(pb.StatusRequest(environment="yard"), timeout=60).environments
            assert status.samples_stored == status.samples_labelled and status.agreement.samples >= count

    clock.shift(YEARS_S)
    first = start_cloud(*flags)
    ask(first, 10)
    for seconds in (0.0, 2 * YEARS_S):
        clock.shift(seconds)
        time.sleep(0.5)
        ask(first, 10)
    assert first.stop() == 0
    ahead = stamps(first)
    assert len(ahead) == 30 and max(ahead) - min(ahead) < 120

    clock.shift(0.0)  # at the next start the clock is right: what is from the future counts as received now
    second = start_cloud(*flags)
    assert "times_mended=30" in second.log.read_text()
    ask(second, 10)
    assert second.stop() == 0 and len(stamps(second)) == 40 and max(stamps(second)) < time.time()
