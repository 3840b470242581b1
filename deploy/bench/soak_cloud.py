"""The soak's cloud and links: one port and one data folder, ended, cut and brought back as often as wanted."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ...models.errors import EdgeFMError
from ..processes import child_process, edgefm, last_words
from ..shaper import LinkShaper, ShaperThread
from ..traces import LTE_DOWN, LTE_UP, synthetic_trace
from .soak_memory import Memory

PROPAGATION_MS = 10.0
SERVING_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.1
_PORTS = (20_000, 32_000)
"""Below those that systems give to outgoing connections: one of them could take the port while nobody listens there."""


def free_port(rng: np.random.Generator) -> int:
    """A port that can be listened on now, and again later."""
    while True:
        port = int(rng.integers(*_PORTS))
        try:
            socket.create_server(("127.0.0.1", port)).close()
            return port
        except OSError:
            continue


class SoakCloud:
    """`edgefm cloud`, one life after another.

    Attributes:
        changing: held by whoever ends it, or needs it not to end.
        logs: one a life.
    """

    def __init__(self, folder: Path, port: int, student: str, memory: Memory) -> None:
        self.port = port
        self.data_dir = folder / "cloud"
        self.changing = threading.RLock()
        self.logs: list[Path] = []
        self._folder = folder
        self._student = student
        self._memory = memory
        self._life = ExitStack()
        self._process: subprocess.Popen[str] | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None, "start() comes first"
        return self._process

    def start(self) -> float:
        """Returns the seconds until it served. Raises `EdgeFMError` with its last words."""
        began_s = time.monotonic()
        number = len(self.logs)
        log, port_file = self._folder / f"cloud-{number}.log", self._folder / f"cloud-{number}.port"
        self.logs.append(log)
        flags = ["--port", str(self.port), "--port-file", str(port_file), "--data-dir", str(self.data_dir)]
        command = edgefm("cloud", *flags, "--student", self._student)
        self._process = self._life.enter_context(child_process(command, log, stdout=subprocess.DEVNULL))
        while not port_file.exists():
            if self._process.poll() is not None or time.monotonic() - began_s > SERVING_TIMEOUT_S:
                raise EdgeFMError(f"the cloud did not start; its log ends with: {last_words(log)}")
            time.sleep(_POLL_S)
        self.wait_until_serving()
        self._memory.watch("cloud", self._process.pid)
        return time.monotonic() - began_s

    def end(self, signum: int) -> int:
        """Sends the signal and waits; returns the exit code. Raises `EdgeFMError` when it does not end."""
        self._memory.forget("cloud")
        self.process.send_signal(signum)
        try:
            code = self.process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise EdgeFMError(f"the cloud goes on {_STOP_TIMEOUT_S:.0f} s after signal {signum}") from None
        finally:
            self._life.close()
        return code

    def serving(self) -> bool:
        """All of it is well, says its health service."""
        with grpc.insecure_channel(self.target) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
            except grpc.RpcError:
                return False
            return answer.status == health_pb2.HealthCheckResponse.SERVING

    def wait_until_serving(self) -> float:
        """Returns the seconds it took. Raises `EdgeFMError` when it is not by `SERVING_TIMEOUT_S`."""
        began_s = time.monotonic()
        while not self.serving():
            if self.process.poll() is not None:
                raise EdgeFMError(f"the cloud ended by itself; its log ends with: {last_words(self.logs[-1])}")
            if time.monotonic() - began_s > SERVING_TIMEOUT_S:
                raise EdgeFMError(f"the cloud does not serve after {SERVING_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)
        return time.monotonic() - began_s

    def close(self) -> None:
        self._life.close()


class SoakLink:
    """A shaped link on one port, cut and mended as often as wanted.

    Attributes:
        changing: held by whoever cuts it, or needs it whole.
    """

    def __init__(self, port: int, cloud_port: int, seed: int) -> None:
        self.port = port
        self.changing = threading.RLock()
        self._cloud_port = cloud_port
        self._traces = synthetic_trace(seed, states=LTE_UP), synthetic_trace(seed, states=LTE_DOWN)
        self._shaper: ShaperThread | None = None
        self._carried = [0, 0]

    @property
    def carried_bytes(self) -> tuple[int, int]:
        """Payload, up and down, of all shapers that are closed."""
        return self._carried[0], self._carried[1]

    def mend(self) -> None:
        up, down = self._traces
        shaper = LinkShaper("127.0.0.1", "127.0.0.1", self._cloud_port, up, down, PROPAGATION_MS, listen_port=self.port)
        self._shaper = ShaperThread(shaper)

    def cut(self) -> None:
        """Every connection breaks, and new ones are refused."""
        if self._shaper is not None:
            self._shaper.close()
            self._carried[0] += self._shaper.bytes_up
            self._carried[1] += self._shaper.bytes_down
            self._shaper = None
