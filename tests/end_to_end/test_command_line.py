"""A cloud and an agent as they are run from the command line, and their signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from edgefm.deploy.cli import INTERRUPTED
from edgefm.edge.local_state import StateLock
from edgefm.edge.spool import Spool
from edgefm.models.images import encode_jpeg
from jsonschema import Draft202012Validator


class _Stalling(BaseHTTPRequestHandler):
    """A network camera that sends one picture in a hundred copies, and then nothing more."""

    picture = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(self.picture)}\r\n\r\n".encode()
        self.wfile.write((head + self.picture + b"\r\n") * 100)
        self.rfile.read()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def stalling_stream(make_picture) -> Iterator[str]:
    _Stalling.picture = encode_jpeg(make_picture(0))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Stalling)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/live"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_signal_ends_a_run_cleanly(start_cloud, start_process, stalling_stream, tmp_path, image):
    cloud = start_cloud("--labels", "tabby cat, dog", "--student", "lite0-64")
    (image / "list.txt").write_text("a.jpg\n" * 1000)
    for number, source, code in (
        (signal.SIGINT, str(image / "list.txt"), INTERRUPTED),
        (signal.SIGTERM, stalling_stream, 0),
    ):
        answers = tmp_path / f"{code}.jsonl"
        out, err = tmp_path / "out", tmp_path / "err"
        command = ("agent", source, "--fps", "20", "-o", answers, "--cloud", cloud.target)
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = start_process(*command, stdout=stdout, stderr=stderr, cwd=tmp_path)
        deadline = time.monotonic() + 60
        while not answers.exists() or not answers.read_text():
            assert process.poll() is None and time.monotonic() < deadline, err.read_text()
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(30) == code and "Traceback" not in err.read_text(), err.read_text()
        summary = json.loads(out.read_text())
        assert 0 < summary["frames"] == len(answers.read_text().splitlines()) < 1000


def children(process: int) -> list[int]:
    return [int(found) for found in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_terminated_measurement_ends_its_processes_and_leaves_no_folder(tmp_path, image, until):
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-m", "edgefm.deploy.cli", "replay", str(image), "--labels", "cat, rocket"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True) as process:
        until(lambda: children(process.pid))
        started = children(process.pid)
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    until(lambda: not any(Path(f"/proc/{child}").exists() for child in started), 20)
    assert not list((tmp_path / "temporary").glob("edgefm*"))  # torch leaves some of its own


def test_a_run_that_achieves_nothing_says_so(edgefm, start_cloud, tmp_path, image):
    cloud = start_cloud("--labels", "cat, dog", "--student", "lite0-64")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for number in range(3):
        (damaged / f"{number}.jpg").write_bytes(b"no picture")
    ran = edgefm("agent", damaged, "--cloud", cloud.target, cwd=tmp_path)
    assert ran.returncode == 4 and "not one of 3 images could be read" in ran.stderr, ran
    nobody = ["--mqtt", "mqtt://127.0.0.1:1/yard"]
    ran = edgefm("agent", image, "--cloud", cloud.target, *nobody, cwd=tmp_path)
    assert ran.returncode == 7 and "no answer reached the broker" in ran.stderr, ran
    assert json.loads(ran.stdout)["frames"] == 1
    ran = edgefm("agent", image, "--cloud", cloud.target, *nobody, "-o", "answers.jsonl", cwd=tmp_path)
    assert ran.returncode == 0 and len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1, ran
    ran = edgefm("agent", image, "--cloud", cloud.target, "--labels", "cat, owl", cwd=tmp_path)
    assert ran.returncode == 0 and "event=labels_not_taken labels=owl" in ran.stderr, ran


def test_labels_and_an_agent_from_the_command_line(edgefm, start_cloud, make_broker, tmp_path, image, make_picture):
    cloud = start_cloud("--labels", "tabby cat, dog", "--student", "lite0-64")
    for seed in range(1, 4):
        (image / f"{seed}.jpg").write_bytes(encode_jpeg(make_picture(seed)))

    def labels(*arguments: str) -> subprocess.CompletedProcess[str]:
        return edgefm("labels", *arguments, "--cloud", cloud.target)

    assert labels("list").stdout.splitlines() == ["tabby cat", "dog"]
    config = tmp_path / "agent.toml"
    config.write_text(f'[agent]\ncloud = "{cloud.target}"\nenvironment = "nowhere"\nfps = 50\n')
    (image / "list.txt").write_text("1.jpg\ngone.jpg\n2.jpg\n3.jpg\na.jpg\n")
    source = [image / "list.txt", "--limit", "4"]
    ran = edgefm("agent", *source, "-c", config, "-e", "yard", "-o", "out/answers.jsonl", cwd=tmp_path)
    assert ran.returncode == 0, ran
    summary = json.loads(ran.stdout)
    assert summary["frames"] == 4 and summary["unreadable_by_reason"] == {"cannot-read": 1}
    assert 'event=unreadable sample=gone.jpg reason=cannot-read detail="cannot read ' in ran.stderr
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    schema = Draft202012Validator(json.loads(edgefm("agent", "--schema").stdout))
    for answer in answers:
        schema.validate(answer)
    assert len(answers) == 3 and {answer["environment"] for answer in answers} == {"yard"}  # the flag over the file

    broker = make_broker()
    broker.start()
    mqtt = ["--mqtt", f"mqtt://127.0.0.1:{broker.port}/yard"]
    ran = edgefm("agent", image, "-c", config, "-e", "yard", "--limit", "2", *mqtt, cwd=tmp_path)
    assert json.loads(ran.stdout)["mqtt_published"] == 2, ran
    assert not (tmp_path / "answers.jsonl").exists()  # no file unless one is asked for

    costs = {"threads": 1, "preprocess_ms": 1, "session_p50_ms": 2, "session_p95_ms": 3, "peak_rss_mb": 150}
    costs |= {"student": "lite0-96"}
    (tmp_path / "device.json").write_text(json.dumps({"source": "by hand", "device": "x", "students": [costs]}))
    shown = edgefm("select", tmp_path / "device.json", "--latency-ms", "4")
    assert shown.returncode == 0 and "taken" in shown.stdout, shown
    refused = edgefm("select", tmp_path / "device.json", "--latency-ms", "3.9")
    assert refused.returncode == 2 and "no student fits 3.9 ms a frame" in refused.stderr, refused
    auto = ["--student", "auto", "--device-profile", "device.json", "--state-dir", "auto", "-e", "auto"]
    ran = edgefm("agent", image, "-c", config, *auto, "--limit", "1", cwd=tmp_path)
    assert ran.returncode == 0, ran
    manifest = json.loads((tmp_path / "auto" / "environments" / "auto" / "student.json").read_text())
    assert manifest["profile"] == "lite0-96"  # the cloud's default is another
    state = [tmp_path / "auto", "--threads", "1", "--runs", "20", "--frame-size", "64x64", "-o", "measured.json"]
    measured = edgefm("profile", *state, cwd=tmp_path)
    assert measured.returncode == 0 and "taken: the" in measured.stdout, measured
    found = json.loads((tmp_path / "measured.json").read_text())
    assert [cost["student"] for cost in found["students"]] == ["lite0-96"]

    added = labels("add", "owl", "quantum entanglement", "-e", "yard")
    assert added.returncode == 0 and added.stdout.startswith("4 labels, pool ")
    assert added.stderr.startswith("warning: 'quantum entanglement' is out of") and added.stderr.count("\n") == 1
    assert labels("list", "-e", "yard").stdout.splitlines() == ["tabby cat", "dog", "owl", "quantum entanglement"]
    assert labels("list").stdout.splitlines() == ["tabby cat", "dog"]
    by_hand = labels("describe", "owl", "--text", "A bird with a flat face.", "--text", "Large eyes", "-e", "yard")
    assert by_hand.stdout.startswith("4 labels, 1 described, pool "), by_hand
    shown = labels("show", "-e", "yard")
    assert "owl\n    A bird with a flat face.\n    Large eyes\nquantum" in shown.stdout and not shown.stderr
    edited = tmp_path / "descriptions.txt"
    edited.write_text(shown.stdout.replace("dog\n", "dog\n    A pet that barks.\n").replace("    Large eyes\n", ""))
    assert labels("describe", "--file", edited, "-e", "yard").stdout.startswith("4 labels, 2 described, pool ")
    assert labels("show", "-e", "yard").stdout == edited.read_text()
    for code, arguments, says in (
        (7, ["describe", "owl", "-e", "yard"], "no language model"),
        (4, ["add", "owl", "-e", "yard"], "owl"),
        (4, ["remove", "fox", "-e", "yard"], "fox"),
        (4, ["add", " ", "-e", "yard"], "non-empty"),
    ):
        refused = labels(*arguments)
        assert refused.returncode == code and says in refused.stderr and refused.stderr.startswith("edgefm: "), refused
    assert labels("remove", "dog", "-e", "yard").stdout.startswith("3 labels, 1 described, pool ")
    state = tmp_path / "edgefm-agent"
    with closing(Spool(state, 10**6, 10**6)) as spool:
        spool.add("yard", b"waits", 0.1, 1.0, time.time())
    lock = StateLock(state)
    busy = edgefm("device", "purge", "--state-dir", state)
    assert busy.returncode == 6 and "another agent is using" in busy.stderr, busy
    lock.release()
    assert edgefm("device", "purge", "--state-dir", state).stdout == "1 waiting samples deleted\n"
    stay = edgefm("device", "rollback", "--state-dir", state, "-e", "yard")
    assert stay.returncode == 4 and "holds no earlier student" in stay.stderr, stay
    back = edgefm("rollback", "yard", "--cloud", cloud.target)
    assert back.returncode == 4 and back.stderr.startswith("edgefm: "), back  # version 0 has no parent
