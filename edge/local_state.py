"""The device's own copy of what it runs: blobs by content, and the last good student and pool.

blobs/<sha256>                     complete and verified
partial/<sha256>                   a download under way; it resumes at its length
environments/<name>/student.json   manifest of the last good student
environments/<name>/pool.json      reference of the last good pool
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import ValidationError

from ..models.cache import write_atomic
from ..models.errors import ModelError, StoreError
from ..models.pool import LabelPool
from ..models.versions import BlobRef, StudentManifest, verify_file

Fetch = Callable[[str, int], Iterator[bytes]]
"""(sha256, offset) -> the blob's bytes from there on."""


class LocalState:
    """One folder; one process."""

    def __init__(self, root: Path, environment: str) -> None:
        self._root = root
        self._environment = root / "environments" / environment
        try:
            for folder in (root / "blobs", root / "partial", self._environment):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot open the state folder {root}: {error.strerror}") from error

    def blob(self, ref: BlobRef, fetch: Fetch) -> Path:
        """The verified file of a blob, fetched if it is not there; a broken download goes on where it stopped.

        Raises:
            CloudError: from `fetch`. ModelError: what came is not what was promised (it is thrown away).
            StoreError: the disk refused.
        """
        path, partial = self._root / "blobs" / ref.sha256, self._root / "partial" / ref.sha256
        if path.exists():
            try:
                verify_file(path, ref)
                return path
            except ModelError:
                path.unlink()  # damaged on this disk: fetch it again
        offset = partial.stat().st_size if partial.exists() else 0
        if offset > ref.size_bytes:
            partial.unlink()
            offset = 0
        try:
            with partial.open("ab") as file:
                if offset < ref.size_bytes:
                    for data in fetch(ref.sha256, offset):
                        file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StoreError(f"cannot write {partial}: {error.strerror}; free space on the device") from error
        if partial.stat().st_size < ref.size_bytes:
            raise ModelError(f"the download of {ref.name} ended early; it will go on from there")
        try:
            verify_file(partial, ref)
        except ModelError:
            partial.unlink()
            raise
        partial.replace(path)
        return path

    def student_folder(self, manifest: StudentManifest, fetch: Fetch) -> Path:
        """A folder with the version's files side by side, fetched as needed."""
        folder = self._environment / f"student-{manifest.version:06d}"
        for ref in manifest.files:
            blob, target = self.blob(ref, fetch), folder / ref.name
            try:
                folder.mkdir(exist_ok=True)
                target.unlink(missing_ok=True)
                _link_or_copy(blob, target)
            except OSError as error:
                raise StoreError(f"cannot write {target}: {error.strerror}; free space on the device") from error
        return folder

    def remember_student(self, manifest: StudentManifest) -> None:
        """Makes it the last good student and removes the folders of others (their blobs stay for a rollback)."""
        write_atomic(self._environment / "student.json", manifest.to_json().encode())
        for folder in self._environment.glob("student-[0-9]*"):
            if folder.name != f"student-{manifest.version:06d}":
                shutil.rmtree(folder, ignore_errors=True)

    def remember_pool(self, ref: BlobRef) -> None:
        write_atomic(self._environment / "pool.json", ref.model_dump_json().encode())

    def last_good(self) -> tuple[StudentManifest, BlobRef] | None:
        """What ran last, or None on a fresh device.

        Raises:
            ModelError: the state is damaged.
        """
        student, pool = self._environment / "student.json", self._environment / "pool.json"
        if not student.exists() or not pool.exists():
            return None
        try:
            return StudentManifest.from_json(student.read_bytes()), BlobRef.model_validate_json(pool.read_bytes())
        except (OSError, ValidationError, ModelError) as error:
            raise ModelError(
                f"the state in {self._environment} is damaged: {error}; remove it to start afresh"
            ) from error

    def load_pool(self, ref: BlobRef, fetch: Fetch) -> LabelPool:
        return LabelPool.load(self.blob(ref, fetch))


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
