"""The sample store: an SQLite index and one file an image, deduplicated by content.

A row holds what the FM said and nothing else: there is no column, parameter or file name for a ground-truth label.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..models.cache import write_atomic
from ..models.errors import StoreError
from ..models.versions import sha256_hex

_SCHEMA = """
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
    PRIMARY KEY (environment, sha256)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Labelled:
    """What the FM said of one image."""

    embedding: np.ndarray  # (D,) float32
    pseudo_label: str
    margin: float
    pool_version: str


@dataclass(frozen=True)
class StoredSamples:
    """The samples of one environment, ordered by content hash; N samples."""

    sha256: list[str]
    embeddings: np.ndarray  # (N, D) float32
    propensities: np.ndarray  # (N,) float64
    received_at: np.ndarray  # (N,) float64, Unix seconds

    def at(self, rows: list[int]) -> StoredSamples:
        return StoredSamples(
            [self.sha256[row] for row in rows], self.embeddings[rows], self.propensities[rows], self.received_at[rows]
        )


def image_path(root: Path, sha256: str) -> Path:
    return root / "images" / sha256[:2] / sha256


class SampleStore:
    """One folder; safe to call from several threads. `StoreError` says what the disk refused."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(root / "samples.db", check_same_thread=False)
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot open the sample store in {root}: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def image_path(self, sha256: str) -> Path:
        return image_path(self._root, sha256)

    def add(
        self, environment: str, image: bytes, labelled: Labelled, propensity: float, device_id: str
    ) -> tuple[str, bool]:
        """Keeps a sample; returns its sha256 and whether the environment had it already.

        The file is written before the row: a row never points at nothing.
        """
        sha256 = sha256_hex(image)
        if self.has(environment, sha256):
            return sha256, True
        path = self.image_path(sha256)
        if not path.exists():
            write_atomic(path, image)
        row = (
            environment,
            sha256,
            time.time(),
            device_id,
            propensity,
            labelled.embedding.astype("<f4").tobytes(),
            labelled.pseudo_label,
            labelled.margin,
            labelled.pool_version,
        )
        try:
            with self._lock, self._db:
                marks = ", ".join("?" * len(row))
                cursor = self._db.execute(f"INSERT OR IGNORE INTO samples VALUES ({marks})", row)
                return sha256, cursor.rowcount == 0
        except sqlite3.Error as error:
            raise StoreError(f"cannot index a sample in {self._root}: {error}") from error

    def has(self, environment: str, sha256: str) -> bool:
        return bool(self._read("SELECT 1 FROM samples WHERE environment = ? AND sha256 = ?", environment, sha256))

    def count(self, environment: str) -> int:
        """Samples labelled by the FM and kept."""
        return self._read("SELECT COUNT(*) FROM samples WHERE environment = ?", environment)[0][0]

    def samples(self, environment: str) -> StoredSamples:
        query = "SELECT sha256, embedding, propensity, received_at FROM samples WHERE environment = ? ORDER BY sha256"
        rows = self._read(query, environment)
        embeddings = np.stack([np.frombuffer(row[1], "<f4") for row in rows]) if rows else np.empty((0, 0), "<f4")
        propensities, received_at = (np.array([row[column] for row in rows], np.float64) for column in (2, 3))
        return StoredSamples([row[0] for row in rows], embeddings, propensities, received_at)

    def _read(self, query: str, *parameters: str) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._db.execute(query, parameters).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"cannot read the sample store in {self._root}: {error}") from error
