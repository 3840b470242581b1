"""Brings new students and pools to the device: fetch, verify, load beside, warm up, and offer for the swap."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..models.errors import CloudError, EdgeFMError, ModelError
from ..models.pool import LabelPool
from ..models.versions import BlobRef, StudentManifest
from .cloud_client import CloudClient
from .local_state import LocalState
from .student import Student

log = logging.getLogger("edgefm.edge.updater")
STALL_TIMEOUT_S = 30.0
_PAUSE_S = (0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Running:
    """What answers: a student and the pool it is asked about."""

    student: Student
    pool: LabelPool


class Updater:
    """Watches the cloud from a thread; `take` gives the agent what is ready, between two frames.

    Attributes:
        refused: versions and pools that could not be used, with the reason.
        received_bytes: downloaded so far.
    """

    def __init__(self, client: CloudClient, state: LocalState, threads: int) -> None:
        self._client = client
        self._state = state
        self._threads = threads
        self._lock = threading.Lock()
        self._latest: Running | None = None
        self._ready: Running | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="updater", daemon=True)
        self.refused: list[str] = []
        self.received_bytes = 0

    def load(self, manifest: StudentManifest, pool: BlobRef) -> Running:
        """Fetches and loads in the caller's thread. Raises `EdgeFMError`."""
        running = Running(self._load_student(manifest), self._state.load_pool(pool, self._fetch))
        check_dimensions(running)
        self._state.remember_student(manifest)
        self._state.remember_pool(pool)
        self._latest = running
        return running

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stops watching; the thread ends with its channel."""
        self._stop.set()

    def take(self) -> Running | None:
        """What to run from the next frame on, or None when nothing has changed."""
        if self._ready is None:  # unlocked: this is asked for every frame
            return None
        with self._lock:
            ready, self._ready = self._ready, None
            return ready

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                for change in self._client.watch():
                    failures = 0
                    self._prepare(change)
            except EdgeFMError as error:  # CloudError, or a ModelError for an event that makes no sense
                if not self._stop.is_set():
                    log.warning("event=watch_interrupted reason=%r", str(error))
            self._stop.wait(_PAUSE_S[min(failures, len(_PAUSE_S) - 1)])
            failures += 1

    def _prepare(self, change: StudentManifest | BlobRef) -> None:
        """Loads one change beside what runs. A transfer that broke is taken up again when watching resumes."""
        latest = self._latest
        assert latest is not None, "load() comes before start()"
        try:
            if isinstance(change, StudentManifest):
                if change.version == latest.student.manifest.version:
                    return
                prepared = replace(latest, student=self._load_student(change))
                check_dimensions(prepared)
                self._state.remember_student(change)
            else:
                pool = self._state.load_pool(change, self._fetch)
                if pool.version == latest.pool.version:
                    return
                prepared = replace(latest, pool=pool)
                check_dimensions(prepared)
                self._state.remember_pool(change)
        except CloudError:
            raise
        except EdgeFMError as error:
            self.refused.append(str(error))
            log.error("event=refused reason=%r", str(error))
            return
        with self._lock:
            self._latest = self._ready = prepared

    def _load_student(self, manifest: StudentManifest) -> Student:
        return Student(manifest, self._state.student_folder(manifest, self._fetch), self._threads)

    def _fetch(self, sha256: str, offset: int) -> Iterator[bytes]:
        for data in self._client.fetch(sha256, offset, STALL_TIMEOUT_S):
            if self._stop.is_set():
                raise CloudError("download: the agent is stopping")
            self.received_bytes += len(data)
            yield data


def check_dimensions(running: Running) -> None:
    """Raises `ModelError` when student and pool are of different FMs."""
    student, pool = running.student.manifest, running.pool
    if student.embedding_dim != pool.embeddings.shape[1] or student.foundation_model != pool.foundation_model:
        raise ModelError(
            f"student version {student.version} speaks {student.foundation_model} ({student.embedding_dim}), "
            f"the pool {pool.foundation_model} ({pool.embeddings.shape[1]})"
        )
