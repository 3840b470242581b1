"""A cloud process for the benchmarks: it answers, and learns nothing meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...edge.cloud_client import CloudClient
from ..processes import CloudProcess, cloud_process

_NO_LEARNING = "[cloud.customization]\nfirst_at = 1000000000\n"


@contextmanager
def cloud_without_learning(folder: Path, fm: str | None = None) -> Iterator[CloudProcess]:
    """See `edgefm.deploy.processes.cloud_process`; `fm` is a URI, None: the default."""
    settings = folder / "cloud.toml"
    settings.write_text(_NO_LEARNING)
    with cloud_process(folder, "--config", str(settings), *(() if fm is None else ("--fm", fm))) as cloud:
        yield cloud


def register(cloud: CloudProcess, environment: str, labels: tuple[str, ...], student: str = "") -> None:
    """Makes the cloud know the environment, its labels and the student that it wants."""
    client = CloudClient(cloud.target, "bench", environment, deadline_ms=60_000)
    try:
        client.register(labels, student, timeout_s=60.0)
    finally:
        client.close()
