"""The registry: immutable student versions and pools, blobs named by content, one atomic pointer an environment.

blobs/<sha256>                              files of students and pools
environments/<name>/versions/000003.json    a manifest, written once
environments/<name>/current                 number of the running version, replaced atomically
environments/<name>/pool.json               the running pool, replaced atomically
environments/<name>/schedule.json           when its student learned last, replaced atomically (`trainer`)
environments/<name>/descriptions.json       labels still to be described, replaced atomically (`enrichment`)
runs/<some name>/                           what a customization under way works on
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..models.cache import write_atomic
from ..models.checks import ENVIRONMENT_NAME, check_environment_name
from ..models.errors import InputError, ModelError, StoreError, disk_reason
from ..models.pool import LabelPool
from ..models.versions import BlobRef, StudentManifest, verify_file

RUNS_FOLDER = "runs"


class Registry:
    """One folder, one writing process. Its parts are written in the order blobs, manifest, pointer, so that a process
    killed in between leaves the pointer at a whole version; `registry_repair` clears away the rest at the next start."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            (root / "blobs").mkdir(parents=True, exist_ok=True)
            (root / "environments").mkdir(exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot open the registry in {root}: {disk_reason(error)}") from error

    # ---- blobs

    def put_blob(self, name: str, data: bytes) -> BlobRef:
        ref = BlobRef.of(name, data)
        path = self.blob_path(ref.sha256)
        try:
            verify_file(path, ref)
        except ModelError:  # missing, or damaged: then this mends it
            write_atomic(path, data)
        return ref

    def blob_path(self, sha256: str) -> Path:
        """Raises `InputError` for what is no hash, so that no request can name another file."""
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise InputError(f"a blob is named by 64 hex digits, got {sha256[:80]!r}")
        return self.root / "blobs" / sha256

    @contextmanager
    def run_folder(self) -> Iterator[Path]:
        """For one customization: on the registry's disk, so that its files are links; the next start removes what a kill left."""
        runs = self.root / RUNS_FOLDER
        try:
            runs.mkdir(exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=runs)
        except OSError as error:
            raise StoreError(f"no customization can run in {runs}: {disk_reason(error)}") from error
        with folder as name:
            yield Path(name)

    def materialise(self, manifest: StudentManifest, folder: Path) -> None:
        """Lays a version's files side by side in `folder`, verified; hard links where the disk allows."""
        folder.mkdir(parents=True, exist_ok=True)
        for ref in manifest.files:
            source, target = self.blob_path(ref.sha256), folder / ref.name
            verify_file(source, ref)
            if not target.exists():
                try:
                    os.link(source, target)
                except OSError:
                    write_atomic(target, source.read_bytes())

    # ---- environments

    def names(self) -> list[str]:
        """All environments that have left something."""
        return sorted(
            path.name for path in (self.root / "environments").iterdir() if ENVIRONMENT_NAME.fullmatch(path.name)
        )

    def environments(self) -> list[str]:
        """Those with a pool."""
        return [name for name in self.names() if (self._folder(name) / "pool.json").exists()]

    def _folder(self, environment: str) -> Path:
        return self.root / "environments" / check_environment_name(environment)

    def set_pool(self, environment: str, pool: LabelPool) -> BlobRef:
        ref = self.put_blob("pool.npz", pool.to_bytes())
        write_atomic(self._folder(environment) / "pool.json", ref.model_dump_json().encode())
        return ref

    def pool(self, environment: str) -> tuple[LabelPool, BlobRef]:
        path = self._folder(environment) / "pool.json"
        try:
            ref = BlobRef.from_json(path.read_bytes())
        except (OSError, ModelError) as error:
            raise ModelError(f"cannot read the label pool's pointer {path}: {error}") from error
        verify_file(self.blob_path(ref.sha256), ref)
        return LabelPool.load(self.blob_path(ref.sha256)), ref

    def publish(self, manifest: StudentManifest, files: Mapping[str, bytes]) -> StudentManifest:
        """Adds a version and makes it current.

        Args:
            manifest: its `version` is assigned here; its `files` are those it shares with its parent.
            files: new contents by name; a name replaces the parent's file of that name.
        """
        refs = [ref for ref in manifest.files if ref.name not in files]
        refs += [self.put_blob(name, data) for name, data in sorted(files.items())]
        folder = self._folder(manifest.environment) / "versions"
        number = max(self.versions(manifest.environment), default=-1) + 1
        published = manifest.model_copy(update={"version": number, "files": refs})
        path = folder / f"{number:06d}.json"
        if path.exists():
            raise StoreError(f"version {number} of {manifest.environment} exists already; versions are immutable")
        write_atomic(path, published.to_json().encode())
        self.point(manifest.environment, number)
        return published

    def versions(self, environment: str) -> list[int]:
        folder = self._folder(environment) / "versions"
        return sorted(int(path.stem) for path in folder.glob("[0-9]*.json")) if folder.exists() else []

    def manifest(self, environment: str, version: int) -> StudentManifest:
        path = self._folder(environment) / "versions" / f"{version:06d}.json"
        try:
            return StudentManifest.from_json(path.read_bytes())
        except FileNotFoundError:
            there = ", ".join(map(str, self.versions(environment))) or "none"
            raise InputError(f"{environment} has no version {version}; there are: {there}") from None
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from error

    def pointed(self, environment: str) -> int:
        """The number in the pointer. Raises `ModelError` when there is none."""
        path = self._folder(environment) / "current"
        try:
            return int(path.read_text())
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{environment} has no current version: {error}; write one of {self.versions(environment)} into {path}"
            ) from error

    def current(self, environment: str) -> StudentManifest:
        return self.manifest(environment, self.pointed(environment))

    def verify(self, manifest: StudentManifest) -> None:
        """Raises `ModelError` unless every file of the version is there and whole."""
        for ref in manifest.files:
            verify_file(self.blob_path(ref.sha256), ref)

    def rollback(self, environment: str, version: int | None = None) -> StudentManifest:
        """Makes an earlier version current: the given one, or the parent of the current.

        Raises:
            InputError: there is no such version, or no parent.
            ModelError: a file of the version is damaged.
        """
        running = self.current(environment)
        target = running.parent if version is None else version
        if target is None:
            raise InputError(f"version {running.version} of {environment} has no parent to roll back to")
        manifest = self.manifest(environment, target)
        self.verify(manifest)
        self.point(environment, manifest.version)
        return manifest

    def schedule_path(self, environment: str) -> Path:
        return self._folder(environment) / "schedule.json"

    def descriptions_path(self, environment: str) -> Path:
        return self._folder(environment) / "descriptions.json"

    def set_versions_aside(self, environment: str) -> Path:
        """Leaves the environment without versions; returns the folder that has them now."""
        folder = self._folder(environment)
        aside = folder / f"versions.damaged-{sum(1 for _ in folder.glob('versions.damaged-*'))}"
        (folder / "versions").rename(aside)
        (folder / "current").unlink(missing_ok=True)
        self.schedule_path(environment).unlink(missing_ok=True)
        return aside

    def point(self, environment: str, version: int) -> None:
        """Makes the version current, whatever its files are worth."""
        write_atomic(self._folder(environment) / "current", str(version).encode())
