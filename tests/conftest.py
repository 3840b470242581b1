"""Shared fixtures: the real FM (loaded once), a real cloud process, seeded pictures, the shared data where it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARED = Path(os.environ.get("EDGEFM_SHARED") or Path(__file__).resolve().parents[2] / "shared")


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
def make_picture() -> Callable[[int], Image.Image]:
    """Seeded pictures of coloured blocks: cheap, distinct, and not noise, so that JPEG keeps them."""

    def make(seed: int, size: int = 64) -> Image.Image:
        rng = np.random.default_rng(seed)
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(blocks).resize((size, size), Image.Resampling.BICUBIC)

    return make


@dataclass
class CloudProcess:
    """`edgefm cloud` as its own process."""

    process: subprocess.Popen[bytes]
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
def start_cloud(tmp_path: Path) -> Iterator[Callable[..., CloudProcess]]:
    """Starts real cloud processes; none outlives its test. Keyword `data_dir`, positional: further flags."""
    started: list[CloudProcess] = []

    def start(*flags: str, data_dir: Path | None = None) -> CloudProcess:
        folder = data_dir or tmp_path / "cloud"
        number = len(started)
        port_file, log = tmp_path / f"port-{number}", tmp_path / f"cloud-{number}.log"
        command = [sys.executable, "-m", "edgefm.deploy.cli", "-v", "cloud", "--port-file", str(port_file)]
        command += ["--data-dir", str(folder), *flags]
        if "--port" not in flags:
            command += ["--port", "0"]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
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
