"""The device's own copy of what it runs: blobs by content, the last good student and pool, and those before them.

lock                                        held by the one process that uses the folder
device-id                                   made once, for a device that is given no name
blobs/<sha256>                              complete and verified; those that nothing below names are deleted
partial/<sha256>                            a download under way; it resumes at its length
environments/<name>/student.json            manifest of the last good student
environments/<name>/pool.json               reference of the last good pool
environments/<name>/previous-student.json   what ran before the last good student: the way back
environments/<name>/previous-pool.json
environments/<name>/refused.json            versions that are not run here
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..models.cache import write_atomic
from ..models.errors import CloudError, InputError, ModelError, StoreError, disk_reason
from ..models.pool import LabelPool
from ..models.versions import BlobRef, StudentManifest, verify_file
from .refusals import Refusal, Refusals

log = logging.getLogger("edgefm.edge.local_state")
Fetch = Callable[[str, int], Iterator[bytes]]
"""(sha256, offset) -> the blob's bytes from there on."""


class StateLock:
    """Keeps a second process out of a state folder; the kernel lets go of it with the process.

    Raises:
        StoreError: another process has it, or the folder cannot be written.
    """

    def __init__(self, root: Path) -> None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._file = (root / "lock").open("w")
        except OSError as error:
            raise StoreError(f"cannot open the state folder {root}: {disk_reason(error)}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise StoreError(
                f"another agent is using the state folder {root}; stop it, or give this one another --state-dir"
            ) from error

    def release(self) -> None:
        self._file.close()


def own_device_id(root: Path) -> str:
    """Made at random once and kept: devices that share a name share one place in the cloud's queue, and pause alike.

    Raises:
        StoreError: the disk refuses.
    """
    path = root / "device-id"
    with _on_disk(path):
        kept = path.read_text(encoding="ascii", errors="ignore").strip() if path.exists() else ""
    if not kept:
        kept = f"device-{secrets.token_hex(6)}"
        write_atomic(path, kept.encode())
    return kept


@contextmanager
def existing_state(root: Path, environment: str = "") -> Iterator[None]:
    """Holds a state folder that is there already, and has that environment if one is given.

    Raises:
        InputError: it is not, or has not. StoreError: an agent is using it.
    """
    environments = root / "environments"
    if not environments.is_dir():
        raise InputError(f"{root} is no agent's state folder; give the agent's --state-dir")
    if environment and not (environments / environment).is_dir():
        there = ", ".join(sorted(path.name for path in environments.iterdir()))
        raise InputError(f"{root} has no environment {environment!r}; it has {there or 'none'}")
    lock = StateLock(root)
    try:
        yield
    finally:
        lock.release()


class LocalState:
    """One folder; one process (see `StateLock`).

    Attributes:
        refusals: versions that are not run here.
    """

    def __init__(self, root: Path, environment: str) -> None:
        self._root = root
        self._environment = root / "environments" / environment
        try:
            for folder in (root / "blobs", root / "partial", self._environment):
                folder.mkdir(parents=True, exist_ok=True)
            # Of a process that was killed while it wrote (`write_atomic`).
            for leftover in (*root.glob(".device-id.*"), *self._environment.glob(".*.json.*")):
                leftover.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot open the state folder {root}: {disk_reason(error)}") from error
        self.refusals = Refusals(self._environment / "refused.json")

    def blob(self, ref: BlobRef, fetch: Fetch) -> Path:
        """The verified file of a blob, fetched if it is not there; a broken download goes on where it stopped.

        Raises:
            CloudError: from `fetch`, or it ended early. ModelError: what came is not what was promised (it is thrown
                away). StoreError: the disk refused.
        """
        path, partial = self._root / "blobs" / ref.sha256, self._root / "partial" / ref.sha256
        with _on_disk(path):
            return self._blob(ref, fetch, path, partial)

    def _blob(self, ref: BlobRef, fetch: Fetch, path: Path, partial: Path) -> Path:
        if path.exists():
            try:
                verify_file(path, ref)
                return path
            except ModelError as error:  # damaged on this disk: fetch it again
                log.error("event=blob_damaged name=%s reason=%s", ref.name, str(error))
                path.unlink()
        offset = partial.stat().st_size if partial.exists() else 0
        if offset > ref.size_bytes:
            partial.unlink()
            offset = 0
        with partial.open("ab") as file:
            if offset < ref.size_bytes:
                for data in fetch(ref.sha256, offset):
                    file.write(data)
                    if file.tell() >= ref.size_bytes:  # whoever sends more is not listened to
                        break
            file.flush()
            os.fsync(file.fileno())
        if partial.stat().st_size < ref.size_bytes:
            raise CloudError(f"the download of {ref.name} ended early; it will go on from there")
        try:
            verify_file(partial, ref)
        except ModelError:
            partial.unlink()
            raise
        partial.replace(path)
        return path

    def student_folder(self, manifest: StudentManifest, fetch: Fetch) -> Path:
        """A folder with the version's files side by side, fetched as needed."""
        folder = self._environment / _folder_name(manifest)
        for ref in manifest.files:
            blob, target = self.blob(ref, fetch), folder / ref.name
            with _on_disk(target):
                folder.mkdir(exist_ok=True)
                target.unlink(missing_ok=True)
                _link_or_copy(blob, target)
        return folder

    def remember(self, student: StudentManifest, pool: BlobRef) -> None:
        """Makes them the last good ones. A new student makes the one before, with its pool, the way back."""
        try:
            last = self.last_good()
        except ModelError:  # damaged: these take its place
            last = None
        if last is not None and last[0] != student:
            self._write("previous-", *last)
        self._write("", student, pool)
        self.collect(downloads=last is None or last[0] != student)

    def last_good(self) -> tuple[StudentManifest, BlobRef] | None:
        """What ran last, or None on a fresh device.

        Raises:
            ModelError: the state is damaged. StoreError: it cannot be read.
        """
        return _read(self._environment, "")

    @property
    def has_student(self) -> bool:
        """There is a last good one, sound or damaged."""
        return (self._environment / "student.json").exists()

    def previous(self) -> tuple[StudentManifest, BlobRef] | None:
        """What ran before the last good student, or None. Raises `ModelError` when the state is damaged."""
        return _read(self._environment, "previous-")

    def go_back(self, student: StudentManifest, pool: BlobRef) -> None:
        """Makes the previous student, with one of the pools, the last good one; there is no way back any more."""
        self._write("", student, pool)
        for name in ("previous-student.json", "previous-pool.json"):
            with _on_disk(self._environment / name):
                (self._environment / name).unlink(missing_ok=True)
        self.collect()

    def roll_back(self, reason: str) -> tuple[StudentManifest, StudentManifest]:
        """Goes back to the previous student and stays there until a newer one than the present comes. No network.

        Returns the manifests (from, to).

        Raises:
            InputError: there is no previous student.
            ModelError: its files are missing or damaged. StoreError: the disk refused.
        """
        last, previous = self.last_good(), self.previous()
        if last is None or previous is None:
            raise InputError(f"{self._environment} holds no earlier student to go back to")
        self.student_folder(previous[0], no_fetch)
        fits = fit(previous[0], self.load_pool(last[1], no_fetch))
        self.refusals.pin_from(Refusal.of(last[0], "ROLLED_BACK", reason))
        self.go_back(previous[0], last[1] if fits else previous[1])
        return last[0], previous[0]

    def collect(self, downloads: bool = True) -> None:
        """Deletes blobs and unpacked students that neither a last good nor a previous version needs.

        Args:
            downloads: broken ones too; False while one may be wanted again.
        """
        wanted: set[str] = set()
        try:
            for environment in self._environment.parent.iterdir():
                for prefix in ("", "previous-"):
                    if (found := _read(environment, prefix)) is not None:
                        wanted |= {ref.sha256 for ref in (*found[0].files, found[1])}
            last = self.last_good()
        except (ModelError, StoreError, OSError):
            return  # nobody knows what that one needs
        with suppress(OSError):
            for folder in (self._root / "blobs", self._root / "partial")[: 1 + downloads]:
                for path in folder.iterdir():
                    if path.name not in wanted:
                        path.unlink(missing_ok=True)
            for folder in self._environment.glob("student-[0-9]*"):
                if last is None or folder.name != _folder_name(last[0]):
                    shutil.rmtree(folder, ignore_errors=True)

    def _write(self, prefix: str, student: StudentManifest, pool: BlobRef) -> None:
        write_atomic(self._environment / f"{prefix}student.json", student.to_json().encode())
        write_atomic(self._environment / f"{prefix}pool.json", pool.model_dump_json().encode())

    def load_pool(self, ref: BlobRef, fetch: Fetch) -> LabelPool:
        return LabelPool.load(self.blob(ref, fetch))


@contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    """Raises `StoreError` when the disk refuses."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write {path}: {disk_reason(error)}; free space or mend the disk") from error


def fit(student: StudentManifest, pool: LabelPool) -> bool:
    """Student and pool are of one FM."""
    return student.embedding_dim == pool.embeddings.shape[1] and student.foundation_model == pool.foundation_model


def no_fetch(sha256: str, offset: int) -> Iterator[bytes]:
    """Where the disk must have it all. Raises `ModelError`."""
    raise ModelError(f"blob {sha256[:12]}... is missing or damaged on this device")


def _read(folder: Path, prefix: str) -> tuple[StudentManifest, BlobRef] | None:
    student, pool = folder / f"{prefix}student.json", folder / f"{prefix}pool.json"
    try:
        if not student.exists() or not pool.exists():
            return None
        return StudentManifest.from_json(student.read_bytes()), BlobRef.from_json(pool.read_bytes())
    except OSError as error:
        raise StoreError(f"cannot read the state in {folder}: {disk_reason(error)}") from error
    except ModelError as error:
        raise ModelError(f"the state in {folder} is damaged: {error}; remove it to start afresh") from error


def _folder_name(manifest: StudentManifest) -> str:
    return f"student-{manifest.version:06d}"


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
