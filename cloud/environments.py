"""The environments a service knows: their pools, students, samples and who watches them."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import TypeVar

import numpy as np

from ..models.errors import ConfigError, EdgeFMError, InputError, LabelError, LabelExistsError, LabelMissingError
from ..models.foundation import FoundationModel, build_pool
from ..models.pool import LabelPool, check_labels
from ..models.student_graph import HEAD_FILE, VERSION0_TEMPERATURE, student_files, version0_head
from ..models.students import student_profile
from ..models.versions import BlobRef, Calibration, StudentManifest
from .config import CloudConfig
from .customize import Outcome
from .registry import Registry, check_environment_name
from .store import Labelled, SampleStore
from .trainer import Schedule, customize

T = TypeVar("T")
log = logging.getLogger("edgefm.cloud.environments")

BASE = "base"
"""The environment whose labels new environments start from; no device belongs to it."""


class Environments:
    """All state of the service that outlives a request. One per process; call it from the event loop only.

    Slow work (text tower, disk, export) runs in a thread of its own, one piece at a time, so that changes of one
    environment happen in order.
    """

    def __init__(self, model: FoundationModel, config: CloudConfig) -> None:
        self.model = model
        self.registry = Registry(config.data_dir / "registry")
        self._store_path = config.data_dir / "store"
        self.store = SampleStore(self._store_path)
        self._config = config
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="environments")
        self._change = asyncio.Lock()
        self._pools: dict[str, tuple[LabelPool, BlobRef]] = {}
        self._students: dict[str, StudentManifest] = {}
        self._counts: dict[str, int] = {}
        self._schedules: dict[str, Schedule] = {}
        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._runs: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Loads what the disk has; embeds the base labels."""
        for name in self.registry.environments():
            self._load(name)
        if self._config.labels and BASE not in self._pools:
            await self._set_pool(BASE, self._config.labels)

    async def close(self) -> None:
        self._schedules.clear()  # nothing becomes due any more
        for run in self._runs:
            run.cancel()
        await asyncio.gather(*self._runs, return_exceptions=True)
        self._worker.shutdown()
        self.store.close()

    # ---- looking things up

    def pool(self, environment: str) -> tuple[LabelPool, BlobRef]:
        """Raises `InputError` for an environment that no device has registered."""
        try:
            return self._pools[environment]
        except KeyError:
            known = ", ".join(sorted(self._pools.keys() - {BASE})) or "none yet"
            raise InputError(f"unknown environment {environment!r}; known: {known}. A device registers it") from None

    def student(self, environment: str) -> StudentManifest:
        self.pool(environment)
        try:
            return self._students[environment]
        except KeyError:
            raise InputError(f"{environment!r} has no student; no device has registered there") from None

    def samples_labelled(self, environment: str) -> int:
        return self._counts.get(environment, 0)

    @property
    def has_base(self) -> bool:
        """New environments start from some labels."""
        return BASE in self._pools

    @property
    def busy(self) -> bool:
        """A student is learning now."""
        return bool(self._runs)

    # ---- changes

    async def register(self, environment: str, labels: Sequence[str], profile_name: str) -> list[str]:
        """Makes the environment if it is new, with version 0 of its student; returns warnings."""
        check_environment_name(environment)
        if environment == BASE:
            raise InputError(f"{BASE!r} names the labels that all environments start from; choose another name")
        profile = student_profile(profile_name or self._config.student)
        async with self._change:
            if environment in self._students:
                running = self._students[environment].profile
                if profile_name and profile_name != running:
                    raise InputError(
                        f"{environment} runs student {running}, not {profile_name}; its devices share one profile"
                    )
                return list(self._pools[environment][0].warnings)
            base = self._pools[BASE][0].labels if BASE in self._pools else ()
            wanted = (*base, *(label for label in check_labels(labels) if label not in base))
            if not wanted:
                raise LabelError(f"{environment} is new and has no labels; register with labels or give the cloud some")
            pool, _ = await self._set_pool(environment, wanted)
            manifest = await self._in_thread(self._publish_version0, environment, profile.name, pool.version)
            self._students[environment] = manifest
            self._schedules[environment] = Schedule(self._config.customization, 0)
            log.info("event=registered environment=%s labels=%d student=%s", environment, len(wanted), profile.name)
            return list(pool.warnings)

    async def add_labels(self, environment: str, labels: Sequence[str]) -> LabelPool:
        """Adds all or none. Raises `LabelError` for one that is there already."""
        return await self._change_labels(environment, labels, add=True)

    async def remove_labels(self, environment: str, labels: Sequence[str]) -> LabelPool:
        """Removes all or none. Raises `LabelError` for one that is not there."""
        return await self._change_labels(environment, labels, add=False)

    async def _change_labels(self, environment: str, labels: Sequence[str], add: bool) -> LabelPool:
        name = environment or BASE
        changed = check_labels(labels)
        if not changed:
            raise LabelError("no label given")
        async with self._change:
            if name == BASE and BASE not in self._pools:
                present: tuple[str, ...] = ()
            else:
                present = self.pool(name)[0].labels
            wrong = ", ".join(label for label in changed if (label in present) == add)
            if wrong and add:
                raise LabelExistsError(f"already in the pool of {name}: {wrong}")
            if wrong:
                raise LabelMissingError(f"not in the pool of {name}: {wrong}")
            wanted = (*present, *changed) if add else tuple(label for label in present if label not in changed)
            if not wanted:
                raise LabelError(f"the pool of {name} would be empty; add another label first")
            pool, _ = await self._set_pool(name, wanted)
            self._notify(name)
            log.info("event=pool_changed environment=%s labels=%d pool=%s", name, len(wanted), pool.version)
            return pool

    async def rollback(self, environment: str, version: int | None) -> StudentManifest:
        self.student(environment)
        async with self._change:
            manifest = await self._in_thread(self.registry.rollback, environment, version)
            self._students[environment] = manifest
            self._notify(environment)
            log.info("event=rolled_back environment=%s version=%d", environment, manifest.version)
            return manifest

    async def keep(
        self, environment: str, image: bytes, embedding: np.ndarray, propensity: float, device_id: str
    ) -> tuple[str, bool]:
        """Stores a sample with what the FM said of it; starts customization when enough have come.

        Raises:
            InputError: no device has registered there, or the propensity is no probability.
        """
        self.student(environment)
        if not 0 < propensity <= 1:
            raise InputError(f"a sample's propensity is a probability above 0, got {propensity}")
        pool, _ = self.pool(environment)
        recognition = pool.recognise(embedding[None], top_k=1)
        labelled = Labelled(embedding, pool.answers(recognition)[0], float(recognition.margins[0]), pool.version)
        sha256, duplicate = await self._in_thread(self.store.add, environment, image, labelled, propensity, device_id)
        if not duplicate:
            self._counts[environment] = self.samples_labelled(environment) + 1
            self._customize_if_due(environment)
        return sha256, duplicate

    # ---- watching

    def watch(self, environment: str) -> asyncio.Event:
        """An event that is set whenever the student or pool of the environment changes."""
        event = asyncio.Event()
        self._watchers[environment].add(event)
        return event

    def unwatch(self, environment: str, event: asyncio.Event) -> None:
        self._watchers[environment].discard(event)

    def _notify(self, environment: str) -> None:
        for event in self._watchers[environment]:
            event.set()

    # ---- inside

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    def _load(self, name: str) -> None:
        self._pools[name] = self.registry.pool(name)
        made_with = self._pools[name][0].foundation_model
        if made_with != self.model.name:
            raise ConfigError(
                f"{self._config.data_dir} was made with {made_with}, not {self.model.name}; "
                "start the cloud with that FM or with another --data-dir"
            )
        # A registration that was cut short has left a pool and no version: it is repeated by the next device.
        if name != BASE and self.registry.versions(name):
            self._students[name] = self.registry.current(name)
            self._counts[name] = self.store.count(name)
            latest = self.registry.manifest(name, self.registry.versions(name)[-1])
            self._schedules[name] = Schedule(self._config.customization, latest.samples)

    async def _set_pool(self, name: str, labels: Sequence[str]) -> tuple[LabelPool, BlobRef]:
        pool = await self._in_thread(build_pool, self.model, labels)
        ref = await self._in_thread(self.registry.set_pool, name, pool)
        self._pools[name] = (pool, ref)
        return pool, ref

    def _publish_version0(self, environment: str, profile_name: str, pool_version: str) -> StudentManifest:
        profile = student_profile(profile_name)
        manifest = StudentManifest(
            environment=environment,
            version=0,
            parent=None,
            profile=profile.name,
            preprocess=profile.preprocess,
            embedding_dim=self.model.dim,
            temperature=VERSION0_TEMPERATURE * self.model.temperature,
            foundation_model=self.model.name,
            pool_version=pool_version,
            samples=0,
            agreement=None,
            parent_agreement=None,
            method="classifier-ridge",
            calibration=Calibration(),
            files=[],
            created_at=_now(),
        )
        return self.registry.publish(manifest, student_files(profile, version0_head(profile, self.model)))

    def _customize_if_due(self, environment: str) -> None:
        samples, schedule = self.samples_labelled(environment), self._schedules[environment]
        if self._runs or not schedule.due(samples):
            return
        schedule.started(samples)
        run = asyncio.create_task(self._customize(environment), name=f"customize-{environment}")
        self._runs.add(run)
        run.add_done_callback(self._run_ended)

    def _run_ended(self, run: asyncio.Task[None]) -> None:
        self._runs.discard(run)
        if not run.cancelled():  # closing cancels; otherwise another environment may have become due meanwhile
            for environment in self._schedules:
                self._customize_if_due(environment)

    async def _customize(self, environment: str) -> None:
        started = asyncio.get_running_loop().time()
        try:
            outcome, files, parent = await customize(
                self.registry, self._store_path, environment, self._config.customization
            )
            async with self._change:
                published = await self._in_thread(self._publish, environment, outcome, files, parent)
        except EdgeFMError as error:
            log.error("event=customization_failed environment=%s reason=%s", environment, error)
            return
        seconds = asyncio.get_running_loop().time() - started
        log.info(
            "event=customized environment=%s accepted=%s version=%s samples=%d agreement=%.4f parent=%.4f quality=%.4f "
            "parent_quality=%.4f method=%s "
            "seconds=%.1f",
            environment,
            outcome.accepted,
            published.version if published else None,
            outcome.samples,
            outcome.agreement,
            outcome.parent_agreement,
            outcome.quality,
            outcome.parent_quality,
            outcome.method,
            seconds,
        )
        if published:
            self._students[environment] = published
            self._notify(environment)

    def _publish(
        self, environment: str, outcome: Outcome, weights: dict[str, bytes], parent: StudentManifest
    ) -> StudentManifest | None:
        if not outcome.accepted or self.registry.current(environment).version != parent.version:
            return None  # refused by the gate, or rolled back while it learned
        successor = parent.model_copy(
            update={
                "parent": parent.version,
                "pool_version": outcome.pool_version,
                "samples": outcome.samples,
                "agreement": outcome.agreement,
                "parent_agreement": outcome.parent_agreement,
                "temperature": outcome.temperature,
                "method": outcome.method,
                "calibration": outcome.calibration,
                "created_at": _now(),
            }
        )
        if outcome.files == (HEAD_FILE,):  # the head was fitted to the pretrained tail, which the parent may not have
            pretrained = {ref.name: ref for ref in self.registry.manifest(environment, 0).files}
            files = [pretrained[ref.name] for ref in parent.files]
            successor = successor.model_copy(update={"files": files})
        return self.registry.publish(successor, weights)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
