"""The demo as a user runs it: real processes, plain files, its JSON; and Ctrl-C leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from edgefm.deploy.camera import DAY, walk
from edgefm.deploy.weights import WEIGHTS

COMMAND = [sys.executable, "-m", "edgefm.deploy.cli", "demo"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Camera frames laid out train/<label>/ and val/<label>/."""
    root = tmp_path_factory.mktemp("yard")
    for part, seed, count in (("train", 1, 260), ("val", 2, 90)):
        for number, frame in enumerate(walk(DAY, seed, count)):
            path = root / part / frame.label / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(frame.image_bytes)
    return root


def _children(marker: str) -> list[str]:
    """Command lines of living processes that mention `marker`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if marker in line and entry.parent.name != str(os.getpid()):
            found.append(line)
    return found


def test_its_json_has_the_documented_keys_and_nothing_is_lost(photographs, tmp_path):
    output, result_file = tmp_path / "out", tmp_path / "result.json"
    flags = ["--data", str(photographs), "--frames", "250", "--fps", "50", "-o", str(output)]
    ended = subprocess.run([*COMMAND, *flags, "--json", str(result_file)], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(result_file.read_text())
    (environment,) = result["environments"]
    assert {"name", "labels", "frames", "versions", "fm_accuracy", "system_accuracy"} <= environment.keys()
    assert {"student_accuracy", "version0", "edge_share"} <= environment.keys()
    answers = result["answers"]
    assert answers["lost"] == 0 and answers["total"] == environment["frames"] == 250
    assert answers["edge"] + answers["cloud"] + answers["fallback"] == 250
    assert result["latency_ms"]["cloud"].keys() == {"p50", "p95", "mean", "predicted_mean"}
    assert result["bytes_up"] > 0 and result["bytes_down"] > 5_000_000  # the student came over the link
    assert result["added_label"]["recognised_before"] == 0.0 and result["added_label"]["recognised_after"] > 0.5
    if WEIGHTS["smollm2"].path.is_file():
        assert result["added_label"]["descriptions"] and result["added_label"]["fm_described"] > 0.5
    assert {"machine", "versions", "seed", "command", "date"} <= result["environment"].keys()
    assert (output / "report.html").stat().st_size > 10_000
    assert str(photographs) not in result_file.read_text()
    assert not _children(str(output))


def _hear_interrupts() -> None:
    """A shell without job control has what it starts in the background ignore them, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes by /proc")
def test_ctrl_c_leaves_no_process_behind(photographs, tmp_path):
    output = tmp_path / "out"
    demo = subprocess.Popen(
        [*COMMAND, "--data", str(photographs), "-o", str(output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=_hear_interrupts,
    )
    deadline = time.monotonic() + 120
    while not list(output.glob("*.jsonl")):
        assert demo.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    assert len(_children(str(output))) >= 3  # demo, cloud, agent
    demo.send_signal(signal.SIGINT)
    _, stderr = demo.communicate(timeout=40)
    assert demo.returncode == 130 and b"Traceback" not in stderr, stderr
    assert not _children(str(output))
