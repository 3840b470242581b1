"""Shared fixtures: the real FM (loaded once), a real cloud process, seeded pictures, the shared data where it is."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

settings.register_profile("shared", deadline=None)  # the machine is shared with other tests
settings.load_profile("shared")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

SHARED = Path(os.environ.get("EDGEFM_SHARED") or Path(__file__).resolve().parents[2] / "shared")


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """Waits for a condition; fails when it does not come about."""

    def wait(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "it did not come about in time"
            time.sleep(0.01)

    return wait


@pytest.fixture(autouse=True)
def _handlers_kept() -> Iterator[None]:
    """What commands run in this process make of the root logger ends with their test, as do their streams."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture(scope="session", autouse=True)
def _exported() -> None:
    """What is exported once per machine takes half a minute and more: not out of the patience of the first test that needs it.
    Where all is there this takes a second."""
    from edgefm.models.foundation import load_foundation_model
    from edgefm.models.student_graph import student_files, version0_head
    from edgefm.models.students import PROFILES

    student_files(PROFILES["lite0-64"], version0_head(PROFILES["lite0-64"], load_foundation_model("synclip")))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """`$EDGEFM_SHARED/data` with images and traces; tests that want it skip where it is absent."""
    data = SHARED / "data"
    if not data.is_dir():
        pytest.skip(f"no shared data in {data}; set EDGEFM_SHARED")
    return data


@pytest.fixture(scope="session")
def synclip():
    from edgefm.models.foundation import load_foundation_model

    return load_foundation_model("synclip")


@pytest.fixture(scope="session")
def smollm2():
    """The real language model's weights, opened; skips where they have not been fetched."""
    from edgefm.deploy.weights import WEIGHTS
    from edgefm.models.language.weights import open_checkpoint

    path = WEIGHTS["smollm2"].path
    if not path.is_file():
        pytest.skip("no weights of SmolLM2 in the cache; edgefm weights get smollm2")
    return open_checkpoint(path)


@pytest.fixture(scope="session")
def read_tail():
    """Reads what `tail_to_bytes` wrote."""
    import torch
    from edgefm.models.backbones import Tail
    from edgefm.models.student_graph import _backbone

    def read(profile, data: bytes) -> Tail:
        tail, flat, start = Tail(profile.backbone), np.frombuffer(data, "<f2").astype(np.float32), 0
        weights = dict(tail.named_parameters())
        with torch.no_grad():
            for name, shape in _backbone(profile.backbone, profile.input_size).tail_layout:
                size = int(np.prod(shape))
                weights[name].copy_(torch.from_numpy(flat[start : start + size].reshape(shape)))
                start += size
        return tail.eval()

    return read


@pytest.fixture(scope="session")
def make_picture() -> Callable[[int], Image.Image]:
    """Seeded pictures of coloured blocks: cheap, distinct, and not noise, so that JPEG keeps them."""

    def make(seed: int, size: int = 64) -> Image.Image:
        rng = np.random.default_rng(seed)
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(blocks).resize((size, size), Image.Resampling.BICUBIC)

    return make


def _mutate(data: bytes, rng: random.Random) -> bytes:
    """Some bits flipped, the end cut off, something inserted, or a piece written over."""
    kind, at, mutated = rng.randrange(4), rng.randrange(len(data) + 1), bytearray(data)
    if kind == 0 and data:
        for _ in range(rng.choice((1, 4, 32))):
            mutated[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del mutated[at:]
    elif kind == 2:
        mutated[at:at] = rng.randbytes(rng.choice((1, 8, 200)))
    else:
        piece = rng.choice((b"\xff" * 8, bytes(8), rng.randbytes(16)))
        mutated[at : at + len(piece)] = piece
    return bytes(mutated)


@pytest.fixture(scope="session")
def mutate() -> Callable[[bytes, random.Random], bytes]:
    return _mutate


@pytest.fixture(scope="session")
def mutated_images(make_picture) -> list[tuple[str, bytes]]:
    """1,000 pictures in five formats, seeded and damaged, with a suffix: JPEG, PNG, WebP, BMP and GIF, 200 of each."""
    rng, images = random.Random(7), []
    for number in range(1000):
        kind = ("jpeg", "png", "webp", "bmp", "gif")[number % 5]
        buffer = io.BytesIO()
        make_picture(number, 32).save(buffer, kind)
        images.append((kind, _mutate(buffer.getvalue(), rng)))
    return images


class Forked:
    """A process of a fork server, as `subprocess.Popen` would show it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._lines = connection, connection.makefile()
        self.pid = int(self._lines.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            self.returncode = int(self._lines.readline())
            self._lines.close(), self._connection.close()
        return self.returncode


class ForkServer:
    """See `fork_server.py`; begun with the first process that is wanted."""

    def __init__(self, folder: Path, modules: tuple[str, ...]) -> None:
        self._address, self._modules = str(folder / "socket"), modules
        self._server: subprocess.Popen[bytes] | None = None

    def start(self, arguments: list[str], cwd: Path, stdout: IO[Any], stderr: IO[Any]) -> Forked:
        if self._server is None:
            script = Path(__file__).with_name("fork_server.py")
            command = [sys.executable, str(script), self._address, *self._modules]
            self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self._server.stdout is not None and self._server.stdout.readline() == b"ready\n"
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address)
        request = json.dumps({"arguments": arguments, "cwd": str(cwd), "environment": dict(os.environ)}).encode()
        socket.send_fds(connection, [request], [stdout.fileno(), stderr.fileno()])
        return Forked(connection)

    def stop(self) -> None:
        if self._server is not None:
            self._server.communicate()


Process: TypeAlias = "Forked | subprocess.Popen[Any]"
_LOADED = (
    *("edgefm.cloud.server", "edgefm.models.foundation.synclip", "edgefm.edge.agent", "edgefm.edge.operator"),
    *("edgefm.edge.sources", "edgefm.edge.sinks", "edgefm.edge.video", "edgefm.deploy.device", "edgefm.deploy.logs"),
)


@pytest.fixture(scope="session")
def start_process(tmp_path_factory) -> Iterator[Callable[..., Process]]:
    """Starts `edgefm` with arguments as a process of its own, from a fork server: but where PYTHONPATH has changed, which a new
    interpreter alone reads."""
    path, server = os.environ.get("PYTHONPATH"), ForkServer(tmp_path_factory.mktemp("forks"), _LOADED)

    def start(*arguments: str | Path, stdout: IO[Any], stderr: IO[Any], cwd: Path | None = None) -> Process:
        command, cwd = list(map(str, arguments)), cwd or Path.cwd()
        if os.environ.get("PYTHONPATH") != path:
            whole = [sys.executable, "-X", "faulthandler", "-m", "edgefm.deploy.cli", *command]
            return subprocess.Popen(whole, stdout=stdout, stderr=stderr, cwd=cwd)
        return server.start(command, cwd, stdout, stderr)

    yield start
    server.stop()


@dataclass
class CloudProcess:
    """`edgefm cloud` as its own process."""

    process: Process
    port: int
    data_dir: Path
    log: Path

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self, signum: int = signal.SIGINT) -> int:
        self.process.send_signal(signum)
        return self.process.wait(20)


@pytest.fixture
def start_cloud(tmp_path: Path, start_process) -> Iterator[Callable[..., CloudProcess]]:
    """Starts real cloud processes; none outlives its test. Keyword `data_dir`, positional: further flags."""
    yield from _cloud_starter(tmp_path, start_process)


@pytest.fixture(scope="module")
def start_lasting_cloud(tmp_path_factory, start_process) -> Iterator[Callable[..., CloudProcess]]:
    """The same, for a cloud that the tests of a module share."""
    yield from _cloud_starter(tmp_path_factory.mktemp("clouds"), start_process)


def _cloud_starter(tmp_path: Path, start_process: Callable[..., Process]) -> Iterator[Callable[..., CloudProcess]]:
    started: list[CloudProcess] = []

    def start(*flags: str, data_dir: Path | None = None) -> CloudProcess:
        folder = data_dir or tmp_path / "cloud"
        number = len(started)
        port_file, log = tmp_path / f"port-{number}", tmp_path / f"cloud-{number}.log"
        command = ["-v", "cloud", "--port-file", str(port_file), "--data-dir", str(folder), *flags]
        if "--port" not in flags:
            command += ["--port", "0"]
        with log.open("wb") as out:
            process = start_process(*command, stdout=out, stderr=out)
        deadline = time.monotonic() + 120
        while not port_file.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        cloud = CloudProcess(process, int(port_file.read_text()), folder, log)
        started.append(cloud)
        return cloud

    yield start
    for cloud in started:
        if cloud.process.poll() is None:
            cloud.process.kill()
        cloud.process.wait()


class BrokerProcess:
    """A broker as its own process, on one port; `start` and `stop` as often as wanted."""

    def __init__(self, folder: Path, listener: dict[str, object], plugin: dict[str, dict[str, object]]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self._log = folder / "broker.log"
        self._config = folder / "broker.yaml"
        listener = {"type": "tcp", "bind": f"127.0.0.1:{self.port}", **listener}
        self._config.write_text(json.dumps({"listeners": {"default": listener}, "plugins": plugin}))  # JSON is YAML
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-c", "from amqtt.scripts.broker_script import main; main()"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([*command, "-c", str(self._config)], stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


_PASSWORDS = "amqtt.plugins.authentication.FileAuthPlugin"
_OPEN = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}


@pytest.fixture
def make_broker(tmp_path) -> Iterator[Callable[..., BrokerProcess]]:
    """MQTT brokers, not started yet; none outlives its test. `passwords`: the file of users that it lets in."""
    made: list[BrokerProcess] = []

    def make(**listener: object) -> BrokerProcess:
        plugin = {_PASSWORDS: {"password_file": listener.pop("passwords")}} if "passwords" in listener else _OPEN
        made.append(BrokerProcess(tmp_path, listener, plugin))
        return made[-1]

    yield make
    for broker in made:
        broker.stop()


@pytest.fixture(scope="session")
def edgefm(start_process) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line to its end."""

    def run(*arguments: str | Path, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = start_process(*arguments, stdout=out, stderr=err, cwd=cwd)
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
            out.seek(0), err.seek(0)
            return subprocess.CompletedProcess(arguments, code, out.read(), err.read())

    return run


@pytest.fixture
def image(tmp_path: Path, make_picture) -> Path:
    """A folder of one picture."""
    folder = tmp_path / "images"
    folder.mkdir()
    make_picture(0).save(folder / "a.jpg")
    return folder
