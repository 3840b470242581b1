"""Starts customization when enough samples have come, one process at a time, and hands its outcome on."""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
from pathlib import Path

from pydantic import TypeAdapter

from ..models.errors import EdgeFMError
from ..models.versions import StudentManifest
from .config import CustomizationConfig
from .customize import RESULT_FILE, Job, Outcome
from .registry import Registry

log = logging.getLogger("edgefm.cloud.trainer")


class CustomizationError(EdgeFMError):
    """The customization process failed; its last words are in the message. Nothing was published."""


async def customize(
    registry: Registry, store: Path, environment: str, config: CustomizationConfig
) -> tuple[Outcome, dict[str, bytes], StudentManifest]:
    """Runs one customization in a child process.

    Returns:
        The outcome, the new weight files by name, and the manifest of the version that was running when the run began.

    Raises:
        CustomizationError: the child failed.
    """
    running, version0 = registry.current(environment), registry.manifest(environment, 0)
    _, pool_ref = registry.pool(environment)
    with tempfile.TemporaryDirectory(prefix="edgefm-customize-") as folder:
        root = Path(folder)
        for manifest, name in ((running, "running"), (version0, "version0")):
            registry.materialise(manifest, root / name)
            (root / name / "manifest.json").write_text(manifest.to_json())
        output = root / "output"
        output.mkdir()
        job = Job(
            store, environment, registry.blob_path(pool_ref.sha256), root / "running", root / "version0", output, config
        )
        job.save(root / "job.json")
        await _run_child(root / "job.json")
        outcome = TypeAdapter(Outcome).validate_json((output / RESULT_FILE).read_bytes())
        return outcome, {name: (output / name).read_bytes() for name in outcome.files}, running


async def _run_child(job: Path) -> None:
    # A lower priority keeps the answers fast while a student learns.
    child = await asyncio.create_subprocess_exec(
        "nice", "-n", "10", sys.executable, "-m", "edgefm.cloud.customize", str(job), stderr=asyncio.subprocess.PIPE
    )
    try:
        _, stderr = await child.communicate()
    except asyncio.CancelledError:
        child.kill()
        await child.wait()
        raise
    text = stderr.decode(errors="replace").strip()
    if child.returncode:
        raise CustomizationError(f"customization ended with {child.returncode}: {text[-500:] or 'no message'}")
    if text:
        log.warning("customization said: %s", text[-500:])


class Schedule:
    """Which sample counts start a run: `first_at`, then `growth` times the count of the last run, each once."""

    def __init__(self, config: CustomizationConfig, samples_of_current: int) -> None:
        self._growth = config.growth
        self._next = max(config.first_at, round(samples_of_current * config.growth))

    def due(self, samples: int) -> bool:
        return samples >= self._next

    def started(self, samples: int) -> None:
        self._next = max(self._next, round(samples * self._growth))
