"""Mends at start what a crash or a damaged file has left of the registry.

A version is whole when its manifest can be read and its files have their size and hash. A pointer that is missing, cannot
be read or names a version that is not whole is set to the nearest whole ancestor, or else to the highest whole version,
and that is logged as an error. The versions of an environment without a whole one are set aside, and it starts anew. A pool
whose pointer is damaged is found again among the blobs.
Temporary files, what killed customizations left, and blobs that nothing names are removed.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from ..models.errors import EdgeFMError, ModelError, StoreError
from ..models.pool import LabelPool
from ..models.versions import BlobRef, StudentManifest, sha256_hex, verify_file
from .registry import RUNS_FOLDER, Registry

log = logging.getLogger("edgefm.cloud.registry")


@dataclass
class Repairs:
    """What was found.

    Attributes:
        repointed: version now current, by environment.
        pools_found: labels of the pool that is current again, by environment.
        unusable: environments without a readable pool or without a whole version; they start anew when a device registers
            there.
    """

    temporaries_removed: int = 0
    blobs_removed: int = 0
    repointed: dict[str, int] = field(default_factory=dict)
    pools_found: dict[str, int] = field(default_factory=dict)
    unusable: list[str] = field(default_factory=list)


def repair(registry: Registry) -> Repairs:
    """Only for the one process that writes to the registry. Raises `StoreError` when the disk refuses."""
    try:
        return _repair(registry)
    except OSError as error:
        raise StoreError(f"cannot repair the registry in {registry.root}: {error}; check its permissions") from error


def _repair(registry: Registry) -> Repairs:
    repairs = Repairs()
    runs = registry.root / RUNS_FOLDER
    for left in runs.iterdir() if runs.is_dir() else ():
        if left.is_dir():
            # What is in the way of removing it, such as the run's process in its last half second, stops no start.
            shutil.rmtree(left, ignore_errors=True)
            repairs.temporaries_removed += not left.exists()
    for path in registry.root.rglob(".*"):
        if path.is_file():
            path.unlink()
            repairs.temporaries_removed += 1
    named: set[str] | None = set()  # None: something cannot be read, so nobody knows what it names
    for name in registry.names():
        manifests = _manifests(registry, name)
        pool = _usable_pool(registry, name, manifests, repairs)
        pools = None if pool is None else {pool.sha256}
        if named is None or pools is None or len(manifests) < len(registry.versions(name)):
            named = None
        else:
            named |= pools | {ref.sha256 for manifest in manifests.values() for ref in manifest.files}
        _repair_pointer(registry, name, manifests, repairs)
    if named is not None:
        for blob in (registry.root / "blobs").iterdir():
            if blob.name not in named:
                blob.unlink()
                repairs.blobs_removed += 1
    if repairs.temporaries_removed or repairs.blobs_removed:
        log.warning(
            "event=registry_repaired temporaries_removed=%d blobs_removed=%d",
            repairs.temporaries_removed,
            repairs.blobs_removed,
        )
    return repairs


def _usable_pool(
    registry: Registry, name: str, manifests: Mapping[int, StudentManifest], repairs: Repairs
) -> BlobRef | None:
    """The environment's pool; None where there is none any more."""
    try:
        return registry.pool(name)[1]
    except EdgeFMError as error:
        log.error("event=pool_damaged environment=%s reason=%s", name, error)
    found = _last_pool(registry, name, {manifest.pool_version for manifest in manifests.values()})
    if found is None:
        repairs.unusable.append(name)
        return None
    ref = registry.set_pool(name, found)
    repairs.pools_found[name] = len(found.labels)
    log.error(
        "event=pool_found_again environment=%s labels=%s advice=%s",
        name,
        ", ".join(found.labels),
        "if labels are missing, add them with 'edgefm labels add'",
    )
    return ref


def _last_pool(registry: Registry, name: str, learned_with: Set[str]) -> LabelPool | None:
    """The blob written last that is a pool of no other environment, or one that versions of this one learned with."""
    others, told_apart = set(), True
    for other in registry.environments():
        if other != name:
            try:
                others.add(registry.pool(other)[1].sha256)
            except EdgeFMError:
                told_apart = False  # a pool that nobody names may be the other's
    blobs = sorted((registry.root / "blobs").iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for blob in blobs:
        try:
            pool = LabelPool.load(blob)
        except ModelError:
            continue
        theirs = pool.version in learned_with or (told_apart and blob.name not in others)
        if theirs and sha256_hex(blob.read_bytes()) == blob.name:
            return pool
    return None


def _manifests(registry: Registry, name: str) -> dict[int, StudentManifest]:
    """Those that can be read."""
    manifests = {}
    for version in registry.versions(name):
        try:
            manifests[version] = registry.manifest(name, version)
        except EdgeFMError as error:
            log.error("event=version_damaged environment=%s version=%d reason=%s", name, version, error)
    return manifests


def _repair_pointer(registry: Registry, name: str, manifests: Mapping[int, StudentManifest], repairs: Repairs) -> None:
    if not registry.versions(name):
        return  # a registration that was cut short; the next device repeats it
    whole = {version for version, manifest in manifests.items() if _is_whole(registry, manifest)}
    try:
        pointed = registry.pointed(name)
    except ModelError as error:
        log.error("event=pointer_damaged environment=%s reason=%s", name, error)
        pointed = None
    if pointed in whole:
        return
    if not whole:
        aside = registry.set_versions_aside(name)
        log.error("event=no_whole_version environment=%s set_aside=%s", name, aside)
        repairs.unusable.append(name)
        return
    fallback = pointed
    while fallback is not None and fallback not in whole:
        fallback = manifests[fallback].parent if fallback in manifests else None
    chosen = max(whole) if fallback is None else fallback
    registry.point(name, chosen)
    repairs.repointed[name] = chosen
    log.error("event=current_version_replaced environment=%s was=%s version=%d", name, pointed, chosen)


def _is_whole(registry: Registry, manifest: StudentManifest) -> bool:
    for ref in manifest.files:
        if not _file_is_whole(registry, ref):
            log.error(
                "event=version_damaged environment=%s version=%d file=%s",
                manifest.environment,
                manifest.version,
                ref.name,
            )
            return False
    return True


def _file_is_whole(registry: Registry, ref: BlobRef) -> bool:
    try:
        verify_file(registry.blob_path(ref.sha256), ref)
    except ModelError:
        return False
    return True
