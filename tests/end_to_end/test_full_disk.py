"""No room on the device's disk, then none on the cloud's, while both run: for real, on a small file system or by a limit."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest


def forbid_growth(pid: int, forbidden: bool) -> None:
    """While forbidden, the kernel refuses each write with which a file of the process would grow."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0 if forbidden else hard, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_device_s_full_disk_costs_samples_and_no_answer(
    start_cloud, start_agent, cloud_flags, until, stored, digests, small_disk
):
    """The answers are on another disk; the cloud is away, so that every sample wants to be spooled."""
    cloud = start_cloud(*cloud_flags)
    agent = start_agent(cloud.target, "--fps", "20", state_dir=small_disk / "agent")
    until(lambda: agent.count("cloud") >= 5)
    cloud.stop(signal.SIGKILL)
    until(lambda: agent.count("fallback") >= 20)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        while os.statvfs(small_disk).f_bavail:
            try:
                file.write(b"\0" * 4096)
            except OSError:
                break
    full_from = agent.count("fallback")
    until(lambda: "event=spool_failed" in agent.log.read_text())
    until(lambda: agent.count("fallback") >= full_from + 40)
    filler.unlink()
    room_from = agent.count("fallback")
    until(lambda: agent.count("fallback") >= room_from + 20)

    cloud = start_cloud(*cloud_flags, "--port", str(cloud.port))
    until(lambda: not agent.spooled())
    summary = agent.finish()
    answers = agent.lines()
    assert summary["frames"] == len(answers) == len({line["sample_id"] for line in answers})
    cloud.stop()
    rows = stored(cloud.data_dir).rows
    fell_back = [digests[line["sample_id"]] for line in answers if line["route"] == "fallback"]
    lost = [place for place, digest in enumerate(fell_back) if digest not in rows]
    assert 0 < len(lost) == summary["uploads_dropped"] and summary["uploads_left"] == 0
    assert full_from - 1 <= min(lost) and max(lost) <= room_from + 2  # at once used again
    assert "Traceback" not in agent.log.read_text()


def test_a_cloud_s_full_disk_costs_no_answer_and_uploads_come_again(
    start_cloud, start_agent, cloud_flags, until, stored, digests
):
    cloud = start_cloud(*cloud_flags)
    agent = start_agent(cloud.target, "--fps", "20")
    until(lambda: agent.count("cloud") >= 20)
    os.kill(cloud.process.pid, signal.SIGSTOP)
    until(lambda: agent.count("fallback") >= 30)  # they want to be uploaded
    forbid_growth(cloud.process.pid, True)
    os.kill(cloud.process.pid, signal.SIGCONT)
    answered = agent.count("cloud")
    until(lambda: agent.count("cloud") >= answered + 30)
    assert agent.spooled()
    forbid_growth(cloud.process.pid, False)
    until(lambda: not agent.spooled())
    summary = agent.finish()
    answers = agent.lines()
    assert summary["frames"] == len(answers) and summary["uploads_dropped"] == summary["uploads_left"] == 0
    assert cloud.stop() == 0
    store = stored(cloud.data_dir)
    uploaded = {digests[line["sample_id"]] for line in answers if line["route"] == "fallback"}
    assert uploaded <= store.rows.keys()
    assert set(store.rows.values()) == {1} and store.rows == store.files == Counter(store.files.keys())
