"""EdgeFM's commands as child processes, ended with the block that wants them, and where other processes fork from."""

from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from ..models.errors import EdgeFMError

_STARTUP_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class CloudProcess:
    """`edgefm cloud`, which answers."""

    pid: int
    port: int

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"


@contextmanager
def child_process(command: list[str], log: Path, **kwargs: Any) -> Iterator[subprocess.Popen[str]]:
    """A child of its own session, so that Ctrl-C reaches this process alone; ended with its block, whatever happens."""
    with log.open("w", encoding="utf-8") as out:
        child = subprocess.Popen(command, stderr=out, text=True, start_new_session=True, **kwargs)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if child.stdout is not None:
            child.stdout.close()


def edgefm(*arguments: str) -> list[str]:
    """The command line of `edgefm -v ARGUMENTS`."""
    return [sys.executable, "-m", "edgefm.deploy.cli", "-v", *arguments]


@contextmanager
def cloud_process(folder: Path, *flags: str) -> Iterator[CloudProcess]:
    """A cloud on a free port; its data and log are in `folder`. Raises `EdgeFMError` with its last words."""
    port_file, log = folder / "cloud.port", folder / "cloud.log"
    command = edgefm("cloud", "--port", "0", "--port-file", str(port_file), "--data-dir", str(folder / "cloud"), *flags)
    with child_process(command, log, stdout=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + _STARTUP_TIMEOUT_S
        while not port_file.exists():
            if child.poll() is not None or time.monotonic() > deadline:
                raise EdgeFMError(f"the cloud did not start; {log} ends with: {last_words(log)}")
            time.sleep(0.05)
        yield CloudProcess(child.pid, int(port_file.read_text()))


def loaded() -> BaseContext:
    """Of processes that fork from one which has loaded PyTorch and what trains a student, and computed nothing: it would take
    each of them seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["edgefm.deploy.bench.learner"])
    return context


def last_words(log: Path) -> str:
    return log.read_text(encoding="utf-8")[-400:].strip() or "nothing"


def follow_records(path: Path, child: subprocess.Popen[str], poll_s: float = 0.05) -> Iterator[dict[str, Any]]:
    """The records of a growing JSON Lines file until its writer has ended."""
    while not path.exists():
        if child.poll() is not None:
            return
        time.sleep(poll_s)
    rest = ""
    with path.open(encoding="utf-8") as file:
        while True:
            ended = child.poll() is not None
            text = rest + file.read()
            *lines, rest = text.split("\n")
            for line in lines:
                yield json.loads(line)
            if ended:
                return
            time.sleep(poll_s)
