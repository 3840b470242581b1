"""Brings new students and pools to the device: fetch, verify, load beside, test, and offer for the swap; and back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from ..models.confidence import Confidence
from ..models.errors import CloudError, EdgeFMError, ModelError, StoreError
from ..models.pool import LabelPool
from ..models.versions import BlobRef, Calibration, StudentManifest
from .circuit import Backoff
from .cloud_client import CloudClient, Registration
from .config import AgentConfig
from .local_state import Fetch, LocalState, fit, no_fetch
from .refusals import Refusal, RefusalKind, RefusedError
from .student import Student
from .swap_test import RecentAnswers, SwapTest

log = logging.getLogger("edgefm.edge.updater")
STALL_TIMEOUT_S = 30.0
EXPORT_PATIENCE_S = 300.0
"""That a cloud may take for a registration: it exports the first student of an environment, on a slow machine for a minute."""
_CLOSE_TIMEOUT_S = 10.0
_PROGRESS_S = 30.0
"""A watch that lasted so long, or brought bytes, was no failure."""


@dataclass(frozen=True)
class Running:
    """What answers: a student and the pool it is asked about."""

    student: Student
    pool: LabelPool

    @property
    def _is_pool_of_student(self) -> bool:
        return self.student.manifest.pool_version == self.pool.version

    @property
    def calibration(self) -> Calibration:
        """Of the student with this pool; empty where it was made with another."""
        return self.student.manifest.calibration if self._is_pool_of_student else Calibration()

    @property
    def confidence(self) -> Confidence:
        """Of the student with this pool, which may be another one than that it was judged with."""
        confidence = self.student.manifest.confidence
        return confidence if self._is_pool_of_student else confidence.with_other_pool()


class Updater:
    """Registers the device and watches the cloud from a thread; `take` gives the agent what is ready, between two frames.

    A version that is refused is remembered and reported, and the next one is taken. A disk or a link that fails is no
    fault of the version: that is tried again.

    Attributes:
        refused: versions and pools refused in this run, with the reason.
        received_bytes: downloaded so far.
    """

    def __init__(self, client: CloudClient, state: LocalState, config: AgentConfig, recent: RecentAnswers) -> None:
        self._client = client
        self._state = state
        self._config = config
        self._lock = threading.Lock()
        self._latest: Running | None = None
        self._pool_ref: BlobRef | None = None
        self._ready: Running | None = None
        self._registered = False
        self._stop = threading.Event()
        self._swap_test = SwapTest(recent, config.slower_than, self._stop.is_set)
        self._backoff = Backoff(f"watch {config.device_id}", longest_s=10.0)
        self._thread = threading.Thread(target=self._run, name="updater", daemon=True)
        self.refused: list[str] = []
        self.received_bytes = 0

    # ---- starting and stopping

    def begin(self) -> Running:
        """Registers and loads what to start with, in the caller's thread.

        Without the cloud, and when what the cloud offers is not fit, that is the last good student and pool.

        Raises:
            CloudError: the cloud cannot be reached, and there is nothing to start from.
            ModelError, StoreError: what there is cannot be loaded. InputError: the cloud refuses a setting.
        """
        config = self._config
        try:
            patience_s = 0.0 if self._state.has_student else EXPORT_PATIENCE_S
            registration = self._register(config.labels, patience_s)
        except CloudError as error:
            running = self._load_last_good()
            if running is None:
                raise CloudError(
                    f"no start with the cloud at {config.cloud}: {error}; and {config.state_dir} holds no student to "
                    "start from without it"
                ) from error
            log.warning("event=started_alone student=%d reason=%s", running.student.manifest.version, str(error))
            return running
        self._registered = True
        if self._load_last_good() is None:
            student = self._load_student(registration.student, self._fetch)
            self._adopt(student, registration.pool, self._state.load_pool(registration.pool, self._fetch))
        else:
            try:
                self._consider(registration.student, registration.pool)
            except (CloudError, StoreError) as error:
                log.warning("event=update_postponed reason=%s", str(error))
        running = self.take() or self._latest
        assert running is not None
        if left := [label for label in config.labels if label not in running.pool.labels]:
            log.warning(
                "event=labels_not_taken labels=%s reason=%s",
                ", ".join(left),
                f"environment {config.environment} has labels already; add to them with 'edgefm labels add'",
            )
        return running

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stops watching; a test or a disk under way may take some seconds."""
        self._stop.set()
        self._client.interrupt()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_TIMEOUT_S)

    def take(self) -> Running | None:
        """What to run from the next frame on, or None when nothing has changed."""
        if self._ready is None:  # unlocked: this is asked for every frame
            return None
        with self._lock:
            ready, self._ready = self._ready, None
            return ready

    def fall_back(self, failed: Running, error: ModelError) -> Running:
        """What to run instead of a student that failed on a frame: a newer one that is ready, or the one before it.

        Raises:
            ModelError: `error`, when there is none.
        """
        manifest = failed.student.manifest
        with self._lock:
            assert self._latest is not None
            self._refuse(manifest, "FAILED", str(error))
            if self._latest.student is not failed.student:
                self._ready = None
                return self._latest
            previous = self._state.previous()
            if previous is None:
                raise error
            try:
                student = self._load_student(previous[0], no_fetch)
                pool, ref = failed.pool, self._pool_ref
                if ref is None or not fit(previous[0], pool):
                    pool, ref = self._state.load_pool(previous[1], no_fetch), previous[1]
                running = Running(student, pool)
                check_dimensions(running)
                self._state.go_back(previous[0], ref)
            except EdgeFMError as other:
                raise error from other
            self._latest, self._ready, self._pool_ref = running, None, ref
        log.error(
            "event=fell_back from=%d to=%d reason=%s", manifest.version, running.student.manifest.version, str(error)
        )
        return running

    def _load_last_good(self) -> Running | None:
        """The last good student and pool; where they are damaged those before them; None where there are none.

        Raises:
            EdgeFMError: there are some, and none can be loaded.
        """
        problem: EdgeFMError | None = None
        for look in (self._state.last_good, self._state.previous):
            try:
                found = look()
                if found is None:
                    continue
                running = Running(
                    self._load_student(found[0], self._fetch), self._state.load_pool(found[1], self._fetch)
                )
                check_dimensions(running)
            except EdgeFMError as error:
                log.error("event=last_good_damaged reason=%s", str(error))
                problem = problem or error
                continue
            self._latest, self._pool_ref = running, found[1]
            return running
        if problem is not None and not self._registered:
            raise problem
        return None

    # ---- the thread

    def _run(self) -> None:
        while not self._stop.is_set():
            began_s, received = time.monotonic(), self.received_bytes
            try:
                if not self._registered:
                    assert self._latest is not None, "begin() comes before start()"
                    # A cloud that has lost its data gets the labels from here.
                    registration = self._register(self._latest.pool.labels, EXPORT_PATIENCE_S)
                    self._consider(registration.student, registration.pool)
                self._report()
                for change in self._client.watch():
                    if isinstance(change, StudentManifest):
                        self._consider(change, None)
                    else:
                        self._consider(None, change)
            except EdgeFMError as error:  # CloudError, StoreError, or a ModelError for an event that makes no sense
                if not self._stop.is_set():
                    log.warning("event=watch_interrupted reason=%s", str(error))
            except Exception as error:  # without this thread the device would get no version any more, and say nothing
                log.exception("event=watch_failed reason=%s", repr(error))
            if self.received_bytes > received or time.monotonic() - began_s > _PROGRESS_S:
                self._backoff.reset()
            self._registered = False
            self._stop.wait(self._backoff.next_s())

    def _register(self, labels: tuple[str, ...], patience_s: float) -> Registration:
        config = self._config
        if self._latest is None:
            log.info("event=registering cloud=%s waiting_s=%.0f", config.cloud, config.connect_timeout_s + patience_s)
        registration = self._client.register(labels, config.student, config.connect_timeout_s, patience_s)
        for warning in registration.warnings:
            log.warning("event=label_warning text=%s", warning)
        log.info(
            "event=registered environment=%s student=%d profile=%s fm=%s",
            config.environment,
            registration.student.version,
            registration.student.profile,
            registration.foundation_model,
        )
        return registration

    def _consider(self, manifest: StudentManifest | None, pool_ref: BlobRef | None) -> None:
        """Takes, leaves or refuses what the cloud offers: a student, a pool, or both.

        Raises:
            CloudError, StoreError: no fault of what is offered; to be tried again.
        """
        latest = self._latest
        assert latest is not None
        pool, student = None, None
        if pool_ref is not None and pool_ref != self._pool_ref and not self._state.refusals.refuses(pool_ref):
            pool = self._load_pool(pool_ref)
        if manifest is not None and manifest != latest.student.manifest:
            if self._state.refusals.refuses(manifest):
                log.info("event=passed_over student=%d", manifest.version)
            else:
                student = self._load_and_test(manifest, latest, pool or latest.pool)
        if pool is not None and student is None and not fit(latest.student.manifest, pool):
            assert pool_ref is not None
            self._refuse(pool_ref, "DAMAGED", _misfit(Running(latest.student, pool)))
            pool = None
        if pool is not None or student is not None:
            self._adopt(student, pool_ref if pool is not None else None, pool)

    def _load_pool(self, ref: BlobRef) -> LabelPool | None:
        try:
            return self._state.load_pool(ref, self._fetch)
        except ModelError as error:
            self._refuse(ref, "DAMAGED", str(error))
            return None

    def _load_and_test(self, manifest: StudentManifest, latest: Running, pool: LabelPool) -> Student | None:
        try:
            student = self._load_student(manifest, self._fetch)
            check_dimensions(Running(student, pool))
            self._swap_test(student, latest.student, pool)
            return student
        except (CloudError, StoreError):
            raise
        except RefusedError as error:
            if self._stop.is_set():
                raise CloudError("the device is stopping") from error
            self._refuse(manifest, error.kind, str(error))
        except ModelError as error:
            self._refuse(manifest, "DAMAGED", str(error))
        except Exception as error:  # whatever a graph of theirs meets in this runtime
            self._refuse(manifest, "DAMAGED", f"it cannot be loaded: {error!r}")
        self._state.collect()
        return None

    def _adopt(self, student: Student | None, pool_ref: BlobRef | None, pool: LabelPool | None) -> None:
        """Makes what is given the last good, and offers it for the swap."""
        with self._lock:
            latest = self._latest
            new_student = student or (latest.student if latest else None)
            new_pool = pool or (latest.pool if latest else None)
            new_ref = pool_ref or self._pool_ref
            assert new_student and new_pool and new_ref
            running = Running(new_student, new_pool)
            check_dimensions(running)
            self._state.remember(running.student.manifest, new_ref)
            self._latest = self._ready = running
            self._pool_ref = new_ref
        if student is not None:
            self._state.refusals.unpin()

    def _load_student(self, manifest: StudentManifest, fetch: Fetch) -> Student:
        """Raises `ModelError`: it is not this environment's, or not fit; else as `LocalState.student_folder`."""
        if manifest.environment != self._config.environment:
            raise ModelError(f"it is of the environment {manifest.environment!r}, not {self._config.environment!r}")
        return Student(manifest, self._state.student_folder(manifest, fetch), self._config.threads)

    def _fetch(self, sha256: str, offset: int) -> Iterator[bytes]:
        for data in self._client.fetch(sha256, offset, STALL_TIMEOUT_S):
            self.received_bytes += len(data)
            yield data

    # ---- refusals

    def _refuse(self, what: StudentManifest | BlobRef, kind: RefusalKind, reason: str) -> None:
        refusal = Refusal.of(what, kind, reason)
        self.refused.append(str(refusal))
        log.error("event=refused what=%s", str(refusal))
        self._state.refusals.add(refusal)
        self._report()

    def _report(self) -> None:
        """Tells the cloud of what it has not heard yet, without waiting; what fails is told at the next registration."""
        refusals = self._state.refusals.unreported()
        if not refusals:
            return
        try:
            self._client.report(refusals, lambda: self._state.refusals.mark_reported(refusals))
        except CloudError as error:  # the client is closed
            log.info("event=report_postponed reason=%s", str(error))


def check_dimensions(running: Running) -> None:
    """Raises `ModelError` when student and pool are of different FMs."""
    if not fit(running.student.manifest, running.pool):
        raise ModelError(_misfit(running))


def _misfit(running: Running) -> str:
    student, pool = running.student.manifest, running.pool
    return (
        f"student version {student.version} speaks {student.foundation_model} ({student.embedding_dim}), "
        f"the pool {pool.foundation_model} ({pool.embeddings.shape[1]})"
    )
