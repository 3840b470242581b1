"""Mends at start what a crash or a damaged file has left of the registry.

A version is whole when its manifest can be read and its files have their size and hash. A pointer that is missing, cannot
be read or names a version that is not whole is set to the nearest whole ancestor, or else to the highest whole version,
and that is logged as an error. The versions of an environment without a whole one are set aside, and it starts anew.
Temporary files and blobs that nothing names are removed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..models.errors import EdgeFMError, ModelError, StoreError
from ..models.versions import BlobRef, StudentManifest, verify_file
from .registry import Registry

log = logging.getLogger("edgefm.cloud.registry")


@dataclass
class Repairs:
    """What was found. `unusable`: environments without a readable pool or without a whole version; they start anew
    when a device registers there."""

    temporaries_removed: int = 0
    blobs_removed: int = 0
    repointed: dict[str, int] = field(default_factory=dict)
    unusable: list[str] = field(default_factory=list)


def repair(registry: Registry) -> Repairs:
    """Only for the one process that writes to the registry. Raises `StoreError` when the disk refuses."""
    try:
        return _repair(registry)
    except OSError as error:
        raise StoreError(f"cannot repair the registry in {registry.root}: {error}; check its permissions") from error


def _repair(registry: Registry) -> Repairs:
    repairs = Repairs()
    for path in registry.root.rglob(".*"):
        if path.is_file():
            path.unlink()
            repairs.temporaries_removed += 1
    named: set[str] | None = set()  # None: something cannot be read, so nobody knows what it names
    for name in registry.names():
        manifests = _manifests(registry, name)
        try:
            _, pool = registry.pool(name)
            pools = {pool.sha256}
        except EdgeFMError as error:
            log.error("event=pool_damaged environment=%s reason=%s", name, error)
            repairs.unusable.append(name)
            pools = None
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
