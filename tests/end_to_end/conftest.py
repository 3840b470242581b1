"""Agents as processes of their own, and what they and the cloud leave on the disk, read without their code."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from edgefm.cloud.registry import Registry
from edgefm.models.head import Head
from edgefm.models.images import encode_jpeg
from edgefm.models.versions import HEAD_FILE

LABELS = "cat, coffee cup, rocket, motorcycle, daisy"
STUDENT = "lite0-64"
PICTURES = 2000
PATIENT = "[agent]\nconnect_timeout_s = 60.0\nslower_than = 1000.0\nthreads = 1\n"
"""Of agents on a busy machine: what is slow there is neither away nor a bad version."""


@pytest.fixture(scope="session")
def pictures(tmp_path_factory, make_picture) -> Path:
    """A folder of seeded JPEGs, no two alike: a source that lasts longer than any test."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(PICTURES):
        (folder / f"{seed:04d}.jpg").write_bytes(encode_jpeg(make_picture(seed)))
    return folder


@pytest.fixture(scope="session")
def digests(pictures: Path) -> dict[str, str]:
    """SHA-256 by the sample's name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures.iterdir()}


@dataclass
class AgentProcess:
    """`edgefm agent` as its own process."""

    process: Any
    """As `subprocess.Popen`."""
    state_dir: Path
    answers: Path
    out: Path
    log: Path

    def lines(self) -> list[dict[str, Any]]:
        """The answers so far; a line that is being written does not count."""
        if not self.answers.exists():
            return []
        return [json.loads(line) for line in self.answers.read_bytes().splitlines(True) if line.endswith(b"\n")]

    def count(self, *routes: str) -> int:
        return sum(line["route"] in routes for line in self.lines())

    def spooled(self) -> int:
        """Samples that wait for upload, while the agent runs."""
        with closing(sqlite3.connect(f"file:{self.state_dir / 'spool.sqlite'}?mode=ro", timeout=30, uri=True)) as db:
            return db.execute("SELECT count(*) FROM samples").fetchone()[0]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def finish(self, signum: int | None = signal.SIGTERM) -> dict[str, Any]:
        """Asks it to end, or waits for its source to end; returns its summary."""
        if signum is not None:
            self.process.send_signal(signum)
        try:
            code = self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # its log then says where each thread is
            code = self.process.wait()
        assert code == 0, self.log.read_text()
        return json.loads(self.out.read_text())


@pytest.fixture
def start_agent(tmp_path: Path, pictures: Path, start_process) -> Iterator[Callable[..., AgentProcess]]:
    """Starts agents on `pictures`, which all use one state folder and one file of answers unless `flags` say otherwise."""
    started: list[AgentProcess] = []
    settings = tmp_path / "edgefm.toml"
    settings.write_text(PATIENT)

    def start(target: str, *flags: str, state_dir: Path | None = None) -> AgentProcess:
        number, state_dir, answers = len(started), state_dir or tmp_path / "agent", tmp_path / "answers.jsonl"
        out, log = tmp_path / f"agent-{number}.out", tmp_path / f"agent-{number}.log"
        command = ["-v", "agent", str(pictures), "--cloud", target]
        command += ["--state-dir", str(state_dir), "--environment", "yard", "-o", str(answers)]
        command += ["--config", str(settings), *flags]
        with out.open("wb") as stdout, log.open("wb") as stderr:
            process = start_process(*command, stdout=stdout, stderr=stderr)
        started.append(AgentProcess(process, state_dir, answers, out, log))
        return started[-1]

    yield start
    for agent in started:
        if agent.process.poll() is None:
            agent.process.kill()
        agent.process.wait()


@pytest.fixture(scope="session")
def cloud_flags(tmp_path_factory) -> tuple[str, ...]:
    """Of a cloud with labels and a small student, which never learns by itself."""
    settings = tmp_path_factory.mktemp("settings") / "edgefm.toml"
    settings.write_text("[cloud.customization]\nfirst_at = 1000000\n")
    return ("--config", str(settings), "--labels", LABELS, "--student", STUDENT)


@dataclass(frozen=True)
class Stored:
    """What the cloud's store holds: content hashes, with how often each is there, as rows and as files."""

    rows: Counter[str]
    files: Counter[str]
    labelled: int


@pytest.fixture(scope="session")
def stored() -> Callable[[Path], Stored]:
    """Reads a store's index and images; every image must be what its name says."""

    def read(data_dir: Path) -> Stored:
        root = data_dir / "store"
        with closing(sqlite3.connect(root / "samples.db")) as db:
            rows = Counter(row[0] for row in db.execute("SELECT sha256 FROM samples"))
            (labelled,) = db.execute("SELECT coalesce(sum(samples), 0) FROM labelled").fetchone()
        files = [path for path in (root / "images").rglob("*") if path.is_file() and not path.name.startswith(".")]
        for path in files:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        return Stored(rows, Counter(path.name for path in files), labelled)

    return read


@pytest.fixture(scope="session")
def waiting(tmp_path_factory) -> Callable[[Path], set[str]]:
    """Content hashes of what the spool of a device that has ended holds; the file must be whole."""

    def read(state_dir: Path) -> set[str]:
        copy = tmp_path_factory.mktemp("spool")  # the device itself is to recover what a kill left in the log
        for path in state_dir.glob("spool.sqlite*"):
            shutil.copyfile(path, copy / path.name)
        with closing(sqlite3.connect(copy / "spool.sqlite")) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            rows = db.execute("SELECT sha256, image FROM samples").fetchall()
        shutil.rmtree(copy)
        assert all(hashlib.sha256(image).digest() == digest for digest, image in rows)
        return {digest.hex() for digest, _ in rows}

    return read


@dataclass(frozen=True)
class Files:
    """One environment's versions in a cloud's folder, for a test to add to and to damage while the cloud runs."""

    registry: Registry
    environment: str = "yard"

    def path(self, name: str, version: int) -> Path:
        """The blob that a version's file of that name is."""
        files = self.registry.manifest(self.environment, version).files
        return self.registry.blob_path(next(ref.sha256 for ref in files if ref.name == name))

    def publish(self, files: dict[str, bytes]) -> int:
        """Adds a successor of the current version; the cloud announces it when it is told to go (back) to it."""
        current = self.registry.current(self.environment)
        published = self.registry.publish(current.model_copy(update={"parent": current.version}), files)
        self.registry.point(self.environment, current.version)
        return published.version

    def other_head(self, version: int, scale: float = 0.5) -> bytes:
        """The version's head with other bytes; the student's answers stay the same."""
        dim = self.registry.manifest(self.environment, version).embedding_dim
        head = Head.from_bytes(self.path(HEAD_FILE, version).read_bytes(), dim)
        return Head(head.weight * scale, head.bias * scale).to_bytes()


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], Files]:
    return lambda data_dir: Files(Registry(data_dir / "registry"))
