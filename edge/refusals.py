"""Versions that this device does not run, remembered across restarts, until the cloud has heard of them and after."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..models.cache import write_atomic
from ..models.errors import EdgeFMError, StoreError
from ..models.versions import BlobRef, StudentManifest, sha256_hex
from ..proto.limits import MAX_REFUSALS_PER_CALL

log = logging.getLogger("edgefm.edge.refusals")
RefusalKind = Literal["DAMAGED", "SLOW", "WORSE", "FAILED", "ROLLED_BACK"]
"""See `Refusal.Kind` in the contract."""


class Refusal(BaseModel):
    """One version and why it is not run: a student's number, or a pool's hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    kind: RefusalKind
    reason: str
    created_at: str = ""
    """Of the student's manifest: tells newer versions from older ones."""
    student_version: int | None = None
    pool_version: str | None = None
    reported: bool = False

    @classmethod
    def of(cls, what: StudentManifest | BlobRef, kind: RefusalKind, reason: str) -> Refusal:
        if isinstance(what, StudentManifest):
            return cls(
                key=key_of(what),
                kind=kind,
                reason=reason,
                created_at=what.created_at,
                student_version=what.version,
            )
        return cls(key=key_of(what), kind=kind, reason=reason, pool_version=what.sha256[:16])

    def __str__(self) -> str:
        what = (
            f"pool {self.pool_version}" if self.student_version is None else f"student version {self.student_version}"
        )
        return f"{what}: {self.kind.lower().replace('_', ' ')}: {self.reason}"


class RefusedError(EdgeFMError):
    """A version is not fit to run here."""

    def __init__(self, kind: RefusalKind, reason: str) -> None:
        super().__init__(reason)
        self.kind: RefusalKind = kind


def key_of(what: StudentManifest | BlobRef) -> str:
    """By content: a cloud that starts afresh counts from 0 again, and its version 3 is another one."""
    return what.sha256 if isinstance(what, BlobRef) else sha256_hex(what.to_json().encode())


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    refusals: list[Refusal] = []
    went_back_from: Refusal | None = None
    """Set while a rollback by the device's operator holds."""


class Refusals:
    """The list on disk. A disk that refuses costs the memory of it, never an answer: what is written is best effort.

    A damaged version is refused for the time of one run only: the fault may have been the disk's or the way's.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._file = _File.model_validate_json(path.read_bytes()) if path.exists() else _File()
        except (OSError, ValidationError) as error:
            log.warning("event=refusals_forgotten file=%s reason=%s", path, str(error))
            self._file = _File()
        self._keys = {refusal.key for refusal in self._file.refusals if refusal.kind != "DAMAGED"}

    def refuses(self, what: StudentManifest | BlobRef) -> bool:
        """It was refused before; or the operator went back, and it is no newer than what the operator went back from."""
        back = self._file.went_back_from
        if back is None or back.student_version is None or isinstance(what, BlobRef):
            return key_of(what) in self._keys
        older = what.version <= back.student_version and what.created_at <= back.created_at
        return older or key_of(what) in self._keys

    def add(self, refusal: Refusal) -> None:
        with self._lock:
            self._keys.add(refusal.key)
            others = [r for r in self._file.refusals if r.key != refusal.key]
            self._write({"refusals": [*others, refusal][-MAX_REFUSALS_PER_CALL:]})

    def pin_from(self, refusal: Refusal) -> None:
        """The operator went back from that version: only a newer one replaces what runs now."""
        self.add(refusal)
        with self._lock:
            self._write({"went_back_from": refusal})

    def unpin(self) -> None:
        """A newer version runs: the rollback has done its work. What it went back from stays refused."""
        with self._lock:
            if self._file.went_back_from is not None:
                self._write({"went_back_from": None})

    def unreported(self) -> list[Refusal]:
        return [refusal for refusal in self._file.refusals if not refusal.reported]

    def mark_reported(self, refusals: Sequence[Refusal]) -> None:
        with self._lock:
            keys = {refusal.key for refusal in refusals}
            marked = [r.model_copy(update={"reported": True}) if r.key in keys else r for r in self._file.refusals]
            self._write({"refusals": marked})

    def _write(self, update: dict[str, object]) -> None:
        self._file = self._file.model_copy(update=update)
        try:
            write_atomic(self._path, self._file.model_dump_json().encode())
        except StoreError as error:
            log.warning("event=refusals_not_written reason=%s", str(error))
