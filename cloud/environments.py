"""The environments a service knows: their pools, students, samples and who watches them."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ..models.checks import check_environment_name
from ..models.errors import (
    ConfigError,
    EnvironmentMissingError,
    InputError,
    LabelError,
    StoreError,
)
from ..models.foundation import FoundationModel
from ..models.pool import LabelPool, check_labels
from ..models.students import student_profile
from ..models.versions import BlobRef, StudentManifest
from .config import CloudConfig
from .data_dir import DataDirLock
from .drift import Observation
from .drift_watch import DriftWatch
from .enrichment import Describer, Enrichment
from .keeper import Keeper
from .label_pools import BASE, LabelPools
from .registry import Registry
from .registry_repair import repair
from .store import Kept, NewSample, SampleStore
from .trainer import Trainer
from .version0 import publish_version0

T = TypeVar("T")
log = logging.getLogger("edgefm.cloud.environments")


class Environments:
    """All state of the service that outlives a request. One per process and data_dir; call it from the event loop only.

    Slow work on versions and pools (text tower, disk, export) runs in a thread of its own, one piece at a time, so that
    changes of one environment happen in order; samples have another thread (`keeper`).
    """

    def __init__(self, model: FoundationModel, config: CloudConfig, describer: Describer | None = None) -> None:
        self.model = model
        self._config = config
        self._lock = DataDirLock(config.data_dir)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="environments")
        self._change = asyncio.Lock()
        self._students: dict[str, StudentManifest] = {}
        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._follow_ups: set[asyncio.Task[None]] = set()

        store = config.data_dir / "store"
        self.registry = Registry(config.data_dir / "registry")
        self.pools = LabelPools(model, self.registry, self._in_thread, self._change, self._pool_changed)
        self.enrichment = Enrichment(self.pools, self.registry, describer)
        self.drift = DriftWatch(config.data_dir / "drift", config.drift)
        self.keeper = Keeper(
            store, config.store_bytes, config.retention_days, lambda name: self.trainer.sample_kept(name)
        )
        self.trainer = Trainer(self.registry, store, config.customization, self.keeper, self._change, self._published)

    async def start(self) -> None:
        """Repairs and loads what the disk has; embeds the base labels.

        Raises:
            StoreError: the disk refuses, or another cloud works in the data_dir.
            ConfigError: the data_dir was made with another FM.
        """
        self._lock.take()
        await self._in_thread(self.drift.clear_leftovers)
        await self.keeper.start()
        unusable = (await self._in_thread(repair, self.registry)).unusable
        for name in self.registry.environments():
            if name not in unusable:
                current = await self._in_thread(self._load, name)
                if current is not None:
                    await self._run_student(current)
        self.enrichment.start()
        if not self._config.labels:
            return
        if BASE not in self.pools:
            await self.pools.put(BASE, self._config.labels)
        elif set(check_labels(self._config.labels)) != set(self.pools.get(BASE)[0].labels):
            log.warning(
                "event=labels_ignored data_dir=%s stored=%s asked=%s advice=%s",
                self._config.data_dir,
                ", ".join(self.pools.get(BASE)[0].labels),
                ", ".join(self._config.labels),
                "the base pool is on the disk already; change it with 'edgefm labels add' and 'edgefm labels remove'",
            )

    async def close(self) -> None:
        await self.trainer.close()
        await self.enrichment.close()
        for task in self._follow_ups:
            task.cancel()
        await asyncio.gather(*self._follow_ups, return_exceptions=True)
        self._worker.shutdown()
        await self.keeper.close()
        self._lock.release()

    # ---- looking things up

    def pool(self, environment: str) -> tuple[LabelPool, BlobRef]:
        """Raises `EnvironmentMissingError` for an environment that no device has registered."""
        return self.pools.get(environment)

    def student(self, environment: str) -> StudentManifest:
        self.pool(environment)
        try:
            return self._students[environment]
        except KeyError:
            text = f"{environment!r} has no student; no device has registered there"
            raise EnvironmentMissingError(text) from None

    def names(self) -> list[str]:
        """Environments with a student."""
        return sorted(self._students)

    @property
    def store(self) -> SampleStore:
        return self.keeper.store

    def now_s(self) -> float:
        """Unix seconds of the clock that stamps samples."""
        return self.store.clock.now_s()

    def samples_labelled(self, environment: str) -> int:
        """Ever labelled by the FM and kept, also those evicted since."""
        return self.keeper.labelled(environment)

    @property
    def has_base(self) -> bool:
        """New environments start from some labels."""
        return BASE in self.pools

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
                return list(self.pool(environment)[0].warnings)
            base = self.pool(BASE)[0] if BASE in self.pools else None
            given = base.labels if base else ()
            wanted = (*given, *(label for label in check_labels(labels) if label not in given))
            if not wanted:
                raise LabelError(f"{environment} is new and has no labels; register with labels or give the cloud some")
            pool = await self.pools.put(environment, wanted, base.descriptions if base else {})
            if self.registry.versions(environment):  # only the pool was lost
                manifest = await self._in_thread(self.registry.current, environment)
            else:
                manifest = await self._in_thread(
                    publish_version0, self.registry, self.model, environment, profile.name, pool.version
                )
            await self._run_student(manifest)
            log.info("event=registered environment=%s labels=%d student=%s", environment, len(wanted), profile.name)
            return list(pool.warnings)

    async def add_labels(self, environment: str, labels: Sequence[str], describe: bool | None = None) -> LabelPool:
        """Adds all or none; the pool is rebuilt later with what the language model says of them.

        Args:
            describe: whether it is asked; None: if there is one.

        Raises:
            LabelExistsError: one is there already.
            NoLanguageModelError: there is none to ask; nothing is added then.
        """
        if describe is None:
            describe = self.enrichment.possible
        return await (self.enrichment if describe else self.pools).add(environment, labels)

    async def remove_labels(self, environment: str, labels: Sequence[str]) -> LabelPool:
        """Removes all or none. Raises `LabelMissingError` for one that is not there."""
        pool = await self.pools.remove(environment, labels)
        await self.enrichment.forget(environment, labels)
        return pool

    async def set_descriptions(self, environment: str, descriptions: Mapping[str, Sequence[str]]) -> LabelPool:
        """By hand, see `LabelPools.describe`; what the language model was asked of these labels is dropped."""
        checked = self.pools.checked(environment, descriptions)
        # First: what it has answered already is then stored before this, or not at all.
        await self.enrichment.forget(environment, tuple(checked))
        return await self.pools.describe(environment, checked)

    async def rollback(self, environment: str, version: int | None) -> StudentManifest:
        self.student(environment)
        async with self._change:
            manifest = await self._in_thread(self.registry.rollback, environment, version)
            self._published(manifest)
            log.info("event=rolled_back environment=%s version=%d", environment, manifest.version)
            return manifest

    async def keep(self, sample: NewSample) -> Kept:
        """Stores a sample; starts customization when enough have come.

        Raises:
            InputError: no device has registered there, or the propensity is no probability.
            StoreError: the disk refuses.
        """
        self.student(sample.environment)
        check_propensity(sample.propensity)
        return await self.keeper.keep(sample)

    def observe(self, environment: str, student_version: int, pool_version: str, observation: Observation) -> None:
        """Takes in a sample that student and FM both answered; an alarm asks for a customization run."""
        student = self._students.get(environment)
        if student is None or (student.version, self.pool(environment)[0].version) != (student_version, pool_version):
            return
        alarm = self.drift.observe(environment, student_version, pool_version, observation)
        if alarm is not None:
            self._follow_up(self._alarmed(environment, alarm.since, self.drift.snapshot(environment)))
        elif self.drift.worth_saving(environment):
            self._follow_up(self._save_drift(environment, self.drift.snapshot(environment)))

    async def _alarmed(self, environment: str, since: float, snapshot: bytes) -> None:
        """The run first: a restart in between raises the alarm again instead of losing the run."""
        await self.trainer.drifted(environment, since)
        await self._save_drift(environment, snapshot)

    async def _save_drift(self, environment: str, snapshot: bytes) -> None:
        try:
            await self._in_thread(self.drift.save, environment, snapshot)
        except StoreError as error:
            log.error("event=drift_state_not_saved environment=%s reason=%s", environment, error)

    def _follow_up(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._follow_ups.add(task)
        task.add_done_callback(self._follow_ups.discard)

    def _published(self, manifest: StudentManifest) -> None:
        self._students[manifest.environment] = manifest
        self.drift.begin(manifest.environment, manifest.version, self.pool(manifest.environment)[0].version)
        self._notify(manifest.environment)

    def _pool_changed(self, environment: str, pool: LabelPool) -> None:
        if environment in self._students:
            self.drift.begin(environment, self._students[environment].version, pool.version)
        self._notify(environment)

    async def _run_student(self, manifest: StudentManifest) -> None:
        """Its first student, or the one found on the disk."""
        self._students[manifest.environment] = manifest
        self.drift.begin(manifest.environment, manifest.version, self.pool(manifest.environment)[0].version)
        await self.trainer.watch(manifest.environment)

    # ---- watching

    def watch(self, environment: str) -> asyncio.Event:
        """An event that is set whenever the student or pool of the environment changes."""
        event = asyncio.Event()
        self._watchers[environment].add(event)
        return event

    def unwatch(self, environment: str, event: asyncio.Event) -> None:
        self._watchers[environment].discard(event)
        if not self._watchers[environment]:  # a name that nobody registered is not remembered either
            del self._watchers[environment]

    def _notify(self, environment: str) -> None:
        for event in self._watchers.get(environment, ()):
            event.set()

    # ---- inside

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    def _load(self, name: str) -> StudentManifest | None:
        made_with = self.pools.load(name).foundation_model
        if made_with != self.model.name:
            raise ConfigError(
                f"{self._config.data_dir} was made with {made_with}, not {self.model.name}; "
                "start the cloud with that FM or with another --data-dir"
            )
        # A registration that was cut short has left a pool and no version: it is repeated by the next device.
        return self.registry.current(name) if name != BASE and self.registry.versions(name) else None


def check_propensity(propensity: float) -> None:
    """Raises `InputError` unless it is a probability above 0."""
    if not 0 < propensity <= 1:
        raise InputError(f"a sample's propensity is a probability above 0, got {propensity}")
