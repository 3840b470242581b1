"""The sample store: an SQLite index and one file an image, deduplicated by content.

A row holds what the FM said and nothing else: there is no column, parameter or file name for a ground-truth label.

The image's file is written before its row and removed after it, so that a process killed at any moment leaves at worst
a file without a row, which the next start removes (`store_repair`). Files and rows of samples that a device was told are
kept (`durable`) are synced to the disk before it is told.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..models.clock import SteadyClock
from ..models.errors import StoreError
from ..models.versions import sha256_hex

INDEX_FILE = "samples.db"
FEATURES_FILE = "features.db"
IMAGES_FOLDER = "images"
SCHEMA_VERSION = 2
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS samples (
    environment TEXT NOT NULL,
    sha256 TEXT NOT NULL,            -- of the encoded image; its file is images/<first two digits>/<sha256>
    received_at REAL NOT NULL,       -- Unix seconds
    device_id TEXT NOT NULL,
    propensity REAL NOT NULL,        -- probability with which the device's policy sent it
    embedding BLOB NOT NULL,         -- FM embedding, little-endian float32
    pseudo_label TEXT NOT NULL,      -- the FM's answer under pool_version
    margin REAL NOT NULL,
    pool_version TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,     -- of image and embedding
    number INTEGER NOT NULL,         -- of the environment's samples, in order of arrival from 0; never given twice
    PRIMARY KEY (environment, sha256)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS samples_by_age ON samples (environment, received_at, size_bytes);
CREATE INDEX IF NOT EXISTS samples_by_content ON samples (sha256);
CREATE TABLE IF NOT EXISTS labelled (
    environment TEXT PRIMARY KEY,
    samples INTEGER NOT NULL         -- ever kept, also those evicted since
) WITHOUT ROWID;
PRAGMA user_version={SCHEMA_VERSION};
"""
COLUMNS = (
    "environment, sha256, received_at, device_id, propensity, embedding, pseudo_label, margin, pool_version, size_bytes, "
    "number"
)
INSERT = f"INSERT OR IGNORE INTO samples ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
COUNT = "INSERT INTO labelled VALUES (?, 1) ON CONFLICT DO UPDATE SET samples = samples + 1"
_EVICT_TO = 0.95
"""Eviction goes on to this share of the quota, so that not every sample causes one."""
_PROBE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Labelled:
    """What the FM said of one image."""

    embedding: np.ndarray  # (D,) float32
    pseudo_label: str
    margin: float
    pool_version: str


@dataclass(frozen=True)
class NewSample:
    """A sample to keep. `durable`: whoever sent it forgets it once it hears that it is kept."""

    environment: str
    image: bytes
    labelled: Labelled
    propensity: float
    device_id: str
    durable: bool = False


class Kept(NamedTuple):
    sha256: str
    duplicate: bool  # the environment had it already


@dataclass(frozen=True)
class StoredSamples:
    """The samples of one environment, ordered by content hash; N samples."""

    sha256: list[str]
    embeddings: np.ndarray  # (N, D) float32
    propensities: np.ndarray  # (N,) float64
    received_at: np.ndarray  # (N,) float64, Unix seconds
    numbers: np.ndarray  # (N,) int64, the environment's samples counted in order of arrival

    def at(self, rows: list[int]) -> StoredSamples:
        return StoredSamples(
            [self.sha256[row] for row in rows],
            self.embeddings[rows],
            self.propensities[rows],
            self.received_at[rows],
            self.numbers[rows],
        )


def newest_s(db: sqlite3.Connection) -> float:
    """When the latest sample was received; 0 when there is none."""
    return db.execute("SELECT COALESCE(MAX(received_at), 0.0) FROM samples").fetchone()[0]


def image_path(root: Path, sha256: str) -> Path:
    return root / IMAGES_FOLDER / sha256[:2] / sha256


@dataclass
class Usage:
    samples: int = 0
    size_bytes: int = 0


class SampleStore:
    """One folder; safe to call from several threads. `StoreError` says what the disk refused.

    Args:
        quota_bytes: of images and embeddings together; 0: none. Past it, the environment that occupies most loses its
            oldest samples, down to 95 % of the quota. Age is the only criterion: a choice by margin or propensity would
            make the samples' inverse-propensity weights wrong, and one by hash would shrink the held-out slice faster
            than the others. What remains is what a store begun later would hold.

    Attributes:
        clock: tells when samples were received.
    """

    def __init__(self, root: Path, quota_bytes: int = 0) -> None:
        self.root = root
        self._quota_bytes = quota_bytes
        self._lock = threading.Lock()
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(root / INDEX_FILE, check_same_thread=False)
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _SCHEMA)
            rows = self._db.execute("SELECT environment, COUNT(*), SUM(size_bytes) FROM samples GROUP BY environment")
            self._usage = {environment: Usage(samples, size) for environment, samples, size in rows}
            self.clock = SteadyClock(newest_s(self._db))
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot open the sample store in {root}: {error}") from error
        self.evicted = 0

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def image_path(self, sha256: str) -> Path:
        return image_path(self.root, sha256)

    # ---- reading

    @property
    def usage(self) -> dict[str, Usage]:
        """What each environment occupies now."""
        return dict(self._usage)

    def has(self, environment: str, sha256: str) -> bool:
        return bool(self._read("SELECT 1 FROM samples WHERE environment = ? AND sha256 = ?", environment, sha256))

    def count(self, environment: str, since: float = 0.0) -> int:
        """Samples labelled by the FM and kept, received at `since` (Unix seconds) or later."""
        query = "SELECT COUNT(*) FROM samples WHERE environment = ? AND received_at >= ?"
        return self._read(query, environment, since)[0][0]

    def labelled(self) -> dict[str, int]:
        """Samples of each environment ever labelled by the FM and kept, also those evicted since."""
        return dict(self._read("SELECT environment, samples FROM labelled"))

    def samples(self, environment: str) -> StoredSamples:
        columns = "sha256, embedding, propensity, received_at, number"
        rows = self._read(f"SELECT {columns} FROM samples WHERE environment = ? ORDER BY sha256", environment)
        embeddings = np.stack([np.frombuffer(row[1], "<f4") for row in rows]) if rows else np.empty((0, 0), "<f4")
        propensities, received_at = (np.array([row[column] for row in rows], np.float64) for column in (2, 3))
        numbers = np.array([row[4] for row in rows], np.int64)
        return StoredSamples([row[0] for row in rows], embeddings, propensities, received_at, numbers)

    def _read(self, query: str, *parameters: str | float) -> list[Any]:
        try:
            with self._lock:
                return self._db.execute(query, parameters).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"cannot read the sample store in {self.root}: {error}") from error

    # ---- writing

    def add(self, samples: Sequence[NewSample]) -> list[Kept]:
        """Keeps samples in one transaction, all or none; then evicts what is over the quota."""
        written: list[Path] = []
        try:
            with self._lock:
                kept = self._insert(samples, written)
                self._evict()
                return kept
        except (OSError, sqlite3.Error) as error:
            for path in written:
                with suppress(OSError):  # then the next start removes it
                    path.unlink()
            raise StoreError(f"cannot keep a sample in {self.root}: {error}; free space") from error

    def _insert(self, samples: Sequence[NewSample], written: list[Path]) -> list[Kept]:
        durable = any(sample.durable for sample in samples)
        self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        now, kept, added = self.clock.now_s(), [], []
        with self._db:
            for sample in samples:
                sha256 = sha256_hex(sample.image)
                embedding = sample.labelled.embedding.astype("<f4").tobytes()
                size_bytes = len(sample.image) + len(embedding)
                row = (
                    sample.environment,
                    sha256,
                    now,
                    sample.device_id,
                    sample.propensity,
                    embedding,
                    sample.labelled.pseudo_label,
                    sample.labelled.margin,
                    sample.labelled.pool_version,
                    size_bytes,
                    self._ever_kept(sample.environment),
                )
                duplicate = self._db.execute(INSERT, row).rowcount == 0
                kept.append(Kept(sha256, duplicate))
                if not duplicate:
                    self._db.execute(COUNT, (sample.environment,))
                    added.append((sample.environment, size_bytes))
                path = self.image_path(sha256)
                if not path.exists():
                    _write(path, sample.image, sample.durable)
                    written.append(path)
                elif sample.durable:
                    _sync(path)  # a query's sample, or another environment's, was perhaps not
            if durable:  # a transaction of duplicates alone would leave the log unsynced, with their rows in it
                self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        written.clear()  # rows name them now
        for environment, size_bytes in added:
            usage = self._usage.setdefault(environment, Usage())
            usage.samples += 1
            usage.size_bytes += size_bytes
        return kept

    def _ever_kept(self, environment: str) -> int:
        row = self._db.execute("SELECT samples FROM labelled WHERE environment = ?", (environment,)).fetchone()
        return row[0] if row else 0

    def probe(self) -> None:
        """A real write to the folder and to the index. Raises `StoreError`."""
        path = self.root / ".probe"
        try:
            with self._lock:
                path.write_bytes(b"\0" * _PROBE_BYTES)
                path.unlink()
                self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot write to the sample store in {self.root}: {error}; free space") from error

    # ---- removing

    def purge(self, before: float) -> int:
        """Removes the samples received before `before` (Unix seconds); returns how many."""
        try:
            with self._lock:
                query = "SELECT environment, sha256, size_bytes FROM samples WHERE received_at < ?"
                return self._remove(self._db.execute(query, (before,)).fetchall())
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot remove samples from {self.root}: {error}") from error

    def _evict(self) -> None:
        total = sum(usage.size_bytes for usage in self._usage.values())
        if not self._quota_bytes or total <= self._quota_bytes:
            return
        excess = total - _EVICT_TO * self._quota_bytes
        while excess > 0:
            environment = max(self._usage, key=lambda name: self._usage[name].size_bytes)
            victims = []
            query = "SELECT sha256, size_bytes FROM samples WHERE environment = ? ORDER BY received_at LIMIT 64"
            for sha256, size_bytes in self._db.execute(query, (environment,)).fetchall():
                if excess > 0:
                    victims.append((environment, sha256, size_bytes))
                    excess -= size_bytes
            if not victims:
                return
            self.evicted += self._remove(victims)

    def _remove(self, rows: Iterable[tuple[str, str, int]]) -> int:
        """Rows first, then files that no row names any more."""
        rows = list(rows)
        with self._db:
            self._db.executemany("DELETE FROM samples WHERE environment = ? AND sha256 = ?", [row[:2] for row in rows])
        for environment, _, size_bytes in rows:
            self._usage[environment].samples -= 1
            self._usage[environment].size_bytes -= size_bytes
        gone = [
            sha256
            for sha256 in {row[1] for row in rows}
            if not self._db.execute("SELECT 1 FROM samples WHERE sha256 = ?", (sha256,)).fetchone()
        ]
        for sha256 in gone:
            self.image_path(sha256).unlink(missing_ok=True)
        self._forget_features(gone)
        return len(rows)

    def _forget_features(self, sha256: list[str]) -> None:
        """Cached features of samples that are gone go too; what a run holds locked is left to the next start."""
        path = self.root / FEATURES_FILE
        if not path.exists():
            return
        try:
            with closing(sqlite3.connect(path)) as db, db:
                db.executemany("DELETE FROM features WHERE sha256 = ?", [(digest,) for digest in sha256])
        except sqlite3.Error:
            return


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, data: bytes, durable: bool) -> None:
    """Beside the target, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
