"""Starts customization when enough samples have come or drift asks for it, one process at a time, and publishes."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ..models.cache import write_atomic
from ..models.errors import EdgeFMError, StoreError
from ..models.versions import StudentManifest
from .config import CustomizationConfig
from .customize import RESULT_FILE, Job, Outcome
from .keeper import Keeper
from .registry import Registry

log = logging.getLogger("edgefm.cloud.trainer")


class CustomizationError(EdgeFMError):
    """The customization process failed; its last words are in the message. Nothing was published."""


async def customize(
    registry: Registry, store: Path, environment: str, config: CustomizationConfig, since: float = 0.0
) -> tuple[Outcome, dict[str, bytes], StudentManifest]:
    """Runs one customization in a child process.

    Args:
        since: Unix seconds; only samples received then or later judge the outcome.

    Returns:
        The outcome, the new weight files by name, and the manifest of the version that was running when the run began.

    Raises:
        CustomizationError: the child failed.
        StoreError: the disk takes no folder for it.
    """
    with registry.run_folder() as root:
        job, running = await asyncio.to_thread(_lay_out, root, registry, store, environment, config, since)
        await _run_child(root / "job.json")
        outcome = TypeAdapter(Outcome).validate_json((job.output / RESULT_FILE).read_bytes())
        return outcome, {name: (job.output / name).read_bytes() for name in outcome.files}, running


def _lay_out(
    root: Path, registry: Registry, store: Path, environment: str, config: CustomizationConfig, since: float
) -> tuple[Job, StudentManifest]:
    """The job's folder: verified files of the running version and of version 0, and job.json."""
    running, version0 = registry.current(environment), registry.manifest(environment, 0)
    _, pool_ref = registry.pool(environment)
    for manifest, name in ((running, "running"), (version0, "version0")):
        registry.materialise(manifest, root / name)
        (root / name / "manifest.json").write_text(manifest.to_json())
    output = root / "output"
    output.mkdir()
    pool = registry.blob_path(pool_ref.sha256)
    job = Job(store, environment, pool, root / "running", root / "version0", output, config, since)
    job.save(root / "job.json")
    return job, running


async def _run_child(job: Path) -> None:
    # A lower priority keeps the answers fast while a student learns.
    command = ("nice", "-n", "10", sys.executable, "-m", "edgefm.cloud.customize", str(job), str(os.getpid()))
    own_temporaries = os.environ | {"TMPDIR": str(job.parent)}  # a killed run's are gone with its folder
    child = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, env=own_temporaries)
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
        log.warning("event=customization_said text=%s", text[-500:])


@dataclass
class Past:
    """What a schedule goes by after a restart.

    Attributes:
        learned_at: samples ever labelled when the last run began, whatever came of it.
        drifted_since: Unix seconds at which the evidence of an alarm began whose run is still to come.
    """

    learned_at: int = 0
    drifted_since: float | None = None


_PAST: TypeAdapter[Past] = TypeAdapter(Past)


class Schedule:
    """Which counts of samples ever labelled start a run: `first_at`, then `growth` times the count of the last run, each
    once.

    After a drift alarm also `first_at` samples received since the evidence for it began, once.

    Args:
        samples_since: stored samples received since `past.drifted_since`.
    """

    def __init__(self, config: CustomizationConfig, past: Past, samples_since: int = 0) -> None:
        self._first_at = config.first_at
        self._growth = config.growth
        self.past = past
        self._next = max(config.first_at, round(past.learned_at * config.growth))
        self._since_drift = samples_since

    def drifted(self, since: float, samples_since: int) -> None:
        self.past.drifted_since, self._since_drift = since, samples_since

    def sample_kept(self) -> None:
        self._since_drift += 1

    @property
    def since(self) -> float:
        """From when on (Unix seconds) samples judge a run that is due now; 0: all do."""
        return self.past.drifted_since if self._drift_due and self.past.drifted_since is not None else 0.0

    def due(self, samples: int) -> bool:
        return samples >= self._next or self._drift_due

    def started(self, samples: int) -> None:
        if self._drift_due:
            self.past.drifted_since = None
        self.past.learned_at = samples
        self._next = max(self._next, round(samples * self._growth))

    @property
    def _drift_due(self) -> bool:
        return self.past.drifted_since is not None and self._since_drift >= self._first_at


class Trainer:
    """Runs what is due, one environment at a time. Call it from the event loop only.

    Args:
        change: held while a version is published, as by every other change of a version.
        on_published: called with each new current version.

    Attributes:
        outcomes: runs `accepted`, `refused` by the gate, `superseded` by a rollback meanwhile, and `failed`.
    """

    def __init__(
        self,
        registry: Registry,
        store: Path,
        config: CustomizationConfig,
        keeper: Keeper,
        change: asyncio.Lock,
        on_published: Callable[[StudentManifest], None],
    ) -> None:
        self._registry = registry
        self._store = store
        self._config = config
        self._keeper = keeper
        self._change = change
        self._on_published = on_published
        self._schedules: dict[str, Schedule] = {}
        self._saving = asyncio.Lock()
        self._run: asyncio.Task[None] | None = None
        self.learning: str | None = None
        self.outcomes: Counter[str] = Counter()

    async def watch(self, environment: str) -> None:
        """From now on the environment's samples start runs; goes on with what is on the disk."""
        past = self._load(environment)
        past.learned_at = min(past.learned_at, self._keeper.labelled(environment))  # the store was lost or salvaged
        samples_since = 0
        if past.drifted_since is not None:
            # The clock of an earlier run may have been ahead of this one's.
            past.drifted_since = min(past.drifted_since, self._keeper.store.clock.now_s())
            samples_since = await self._count(environment, past.drifted_since)
        self._schedules[environment] = Schedule(self._config, past, samples_since)

    async def close(self) -> None:
        self._schedules.clear()  # nothing becomes due any more
        if self._run is not None:
            self._run.cancel()
            await asyncio.gather(self._run, return_exceptions=True)

    def sample_kept(self, environment: str) -> None:
        if environment in self._schedules:
            self._schedules[environment].sample_kept()
            self._start_if_due(environment)

    async def drifted(self, environment: str, since: float) -> None:
        """Asks for a run that the samples received at `since` (Unix seconds) or later judge, once enough have come."""
        samples_since = await self._count(environment, since)
        if environment in self._schedules:
            self._schedules[environment].drifted(since, samples_since)
            await self._save(environment)  # before a run may begin that a restart cuts short
        if environment in self._schedules:
            self._start_if_due(environment)

    async def _count(self, environment: str, since: float) -> int:
        """0 when the disk refuses: the run then waits for as many samples more."""
        try:
            return await self._keeper.count(environment, since)
        except StoreError as error:
            log.error("event=samples_not_counted environment=%s reason=%s", environment, error)
            return 0

    def _load(self, environment: str) -> Past:
        path = self._registry.schedule_path(environment)
        try:
            return _PAST.validate_json(path.read_bytes())
        except FileNotFoundError:
            return Past()
        except (OSError, ValidationError) as error:
            log.warning("event=schedule_unreadable path=%s reason=%s", path, error)
            return Past()

    async def _save(self, environment: str) -> None:
        async with self._saving:
            if environment not in self._schedules:  # closed meanwhile
                return
            content = _PAST.dump_json(self._schedules[environment].past)
            try:
                await asyncio.to_thread(write_atomic, self._registry.schedule_path(environment), content)
            except StoreError as error:
                log.error("event=schedule_not_saved environment=%s reason=%s", environment, error)

    def _start_if_due(self, environment: str) -> None:
        samples, schedule = self._keeper.labelled(environment), self._schedules[environment]
        if self._run is not None or not schedule.due(samples):
            return
        since = schedule.since
        schedule.started(samples)
        self.learning = environment
        self._run = asyncio.create_task(self._customize(environment, since), name=f"customize-{environment}")
        self._run.add_done_callback(self._run_ended)

    def _run_ended(self, run: asyncio.Task[None]) -> None:
        self._run = self.learning = None
        if not run.cancelled():  # closing cancels; otherwise another environment may have become due meanwhile
            for environment in self._schedules:
                self._start_if_due(environment)

    async def _customize(self, environment: str, since: float) -> None:
        await self._learn(environment, since)
        await self._save(environment)  # only now: a run that a restart cuts short is repeated

    async def _learn(self, environment: str, since: float) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            outcome, files, parent = await customize(self._registry, self._store, environment, self._config, since)
            async with self._change:
                published = await asyncio.to_thread(self._publish, environment, outcome, files, parent)
        except (EdgeFMError, OSError) as error:
            self.outcomes["failed"] += 1
            log.error("event=customization_failed environment=%s reason=%s", environment, error)
            return
        self.outcomes["accepted" if published else "superseded" if outcome.accepted else "refused"] += 1
        log.info(
            "event=customized environment=%s accepted=%s version=%s samples=%d since=%.0f agreement=%.4f parent=%.4f "
            "quality=%.4f parent_quality=%.4f method=%s seconds=%.1f",
            environment,
            outcome.accepted,
            published.version if published else None,
            outcome.samples,
            since,
            outcome.agreement,
            outcome.parent_agreement,
            outcome.quality,
            outcome.parent_quality,
            outcome.method,
            loop.time() - started,
        )
        if published:
            self._on_published(published)

    def _publish(
        self, environment: str, outcome: Outcome, weights: dict[str, bytes], parent: StudentManifest
    ) -> StudentManifest | None:
        if not outcome.accepted or self._registry.current(environment).version != parent.version:
            return None  # refused by the gate, or rolled back while it learned
        # Every run starts from the pretrained backbone, so what it leaves as it was is version 0's, not the parent's.
        version0 = self._registry.manifest(environment, 0)
        successor = parent.model_copy(
            update={
                "files": [ref for ref in version0.files if ref.name in outcome.pretrained],
                "parent": parent.version,
                "pool_version": outcome.pool_version,
                "samples": outcome.samples,
                "agreement": outcome.agreement,
                "parent_agreement": outcome.parent_agreement,
                "confidence": outcome.confidence,
                "method": outcome.method,
                "precision": outcome.precision,
                "calibration": outcome.calibration,
                "created_at": utc_now(),
            }
        )
        return self._registry.publish(successor, weights)


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
