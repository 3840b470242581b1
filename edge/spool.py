"""Samples that wait for upload, on disk: they leave only when the cloud has acknowledged them.

One SQLite file in WAL mode. A transaction survives the death of the process; a power cut may cost the latest ones and
never the file. No clock inside: times are passed in, in seconds since 1970.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..models.clock import mistaken
from ..models.errors import StoreError

log = logging.getLogger("edgefm.edge.spool")
T = TypeVar("T")
SPOOL_FILE = "spool.sqlite"
DAY_S = 86_400
_DAYS_REMEMBERED = 1000  # of what was sent: a clock that jumps back finds its day again
_FORMAT = 1
_SCHEMA = f"""
BEGIN;
CREATE TABLE samples (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    environment TEXT NOT NULL,
    sha256 BLOB NOT NULL,
    created_at REAL NOT NULL,
    margin REAL NOT NULL,
    propensity REAL NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    size_bytes INTEGER NOT NULL,
    image BLOB NOT NULL,
    UNIQUE (environment, sha256)
);
CREATE INDEX by_margin ON samples (margin, size_bytes);
CREATE INDEX by_age ON samples (created_at);
CREATE INDEX by_turn ON samples (environment, attempts, margin, size_bytes);
CREATE TABLE sent (day INTEGER PRIMARY KEY, bytes INTEGER NOT NULL);
PRAGMA user_version = {_FORMAT};
COMMIT;
"""


@dataclass(frozen=True)
class Sample:
    """One that waits."""

    id: int
    image: bytes
    propensity: float


class Spool:
    """Bounded in bytes and in age; past the bytes the most certain sample goes, of whatever environment.

    No method raises for what the disk does: a sample that cannot be kept is dropped and counted, a damaged file is set
    aside and a fresh one begun.

    Args:
        max_bytes: of images. The file is some per cent larger.
        retention_s: samples that have waited longer are deleted.

    Attributes:
        dropped: samples that found no room or that the disk did not take.
        expired: samples deleted for their age.
    """

    def __init__(self, folder: Path, max_bytes: int, retention_s: float) -> None:
        self._path = folder / SPOOL_FILE
        self._aside = folder / f"{SPOOL_FILE}.damaged"
        self._max_bytes = max_bytes
        self._retention_s = retention_s
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._bytes = 0
        self.dropped = 0
        self.expired = 0
        self._run(lambda db: None, None)

    def add(self, environment: str, image: bytes, margin: float, propensity: float, now_s: float) -> None:
        """Keeps a sample, once: what waits already is not stored again."""
        row = (environment, hashlib.sha256(image).digest(), now_s, margin, propensity, len(image), image)

        def insert(db: sqlite3.Connection) -> int:
            added = db.execute(
                "INSERT OR IGNORE INTO samples (environment, sha256, created_at, margin, propensity, size_bytes, image) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            ).rowcount
            self._bytes += len(image) * added
            dropped = 0
            while self._bytes > self._max_bytes:
                # The older of equals: it has less time left.
                most = "SELECT id, size_bytes FROM samples ORDER BY margin DESC, id LIMIT 1"
                number, size = db.execute(most).fetchone()
                db.execute("DELETE FROM samples WHERE id = ?", (number,))
                self._bytes -= size
                dropped += 1
            return dropped

        self.dropped += self._run(insert, 1)

    def batch(self, environment: str, count: int, size_bytes: int, max_bytes: int | None) -> list[Sample]:
        """The next samples to hand over, the most uncertain first; those that failed before come last.

        Args:
            count, size_bytes: enough of them; at least one comes, whatever its size.
            max_bytes: of their images together; a sample that does not fit is passed over. None: no bound.
        """

        def select(db: sqlite3.Connection) -> list[Sample]:
            left = sys.maxsize if max_bytes is None else max_bytes
            rows = db.execute(
                "SELECT id, size_bytes FROM samples WHERE environment = ? AND size_bytes <= ? "
                "ORDER BY attempts, margin LIMIT ?",
                (environment, left, count),
            ).fetchall()
            chosen: list[int] = []
            taken = 0
            for number, size in rows:
                if size > left or (chosen and taken + size > size_bytes):
                    continue
                chosen.append(number)
                left, taken = left - size, taken + size
            read = "SELECT id, image, propensity FROM samples WHERE id = ?"
            return [Sample(*db.execute(read, (number,)).fetchone()) for number in chosen]

        return self._run(select, [])

    def settle(self, done: Sequence[int], failed: Sequence[int], sent_bytes: int, now_s: float) -> None:
        """After an upload: deletes what is acknowledged, puts what is not at the end, and counts the bytes."""

        def write(db: sqlite3.Connection) -> None:
            self._delete(db, f"id IN ({','.join('?' * len(done))})", done)
            db.executemany("UPDATE samples SET attempts = attempts + 1 WHERE id = ?", [(number,) for number in failed])
            if sent_bytes:
                db.execute(
                    "INSERT INTO sent VALUES (?, ?) ON CONFLICT (day) DO UPDATE SET bytes = bytes + excluded.bytes",
                    (_day(now_s), sent_bytes),
                )
                db.execute(
                    "DELETE FROM sent WHERE day NOT IN (SELECT day FROM sent ORDER BY day DESC LIMIT ?)",
                    (_DAYS_REMEMBERED,),
                )

        self._run(write, None)

    def sent_on_day(self, now_s: float) -> int:
        """Bytes sent on that UTC day. Every day has its own count, so that no jump of the clock resets one."""

        def read(db: sqlite3.Connection) -> int:
            row = db.execute("SELECT bytes FROM sent WHERE day = ?", (_day(now_s),)).fetchone()
            return row[0] if row else 0

        return self._run(read, 0)

    def expire(self, now_s: float) -> None:
        """Deletes what has waited too long. Samples that a wrong clock has stamped begin to wait now."""

        def delete(db: sqlite3.Connection) -> int:
            db.execute(f"UPDATE samples SET created_at = :now WHERE {mistaken('created_at')}", {"now": now_s})
            return self._delete(db, "created_at < ?", (now_s - self._retention_s,))

        self.expired += self._run(delete, 0)
        with suppress(OSError):
            since_s = self._aside.stat().st_mtime
            if since_s > now_s:
                os.utime(self._aside, (now_s, now_s))
            elif since_s < now_s - self._retention_s:
                self._aside.unlink()

    def newest_s(self) -> float:
        """When the latest of them came; 0 when none waits."""
        query = "SELECT coalesce(max(created_at), 0.0) FROM samples"
        return self._run(lambda db: db.execute(query).fetchone()[0], 0.0)

    def count(self, environment: str | None = None) -> int:
        """Samples that wait, of one environment or of all."""

        def read(db: sqlite3.Connection) -> int:
            where, values = ("", ()) if environment is None else (" WHERE environment = ?", (environment,))
            return db.execute(f"SELECT count(*) FROM samples{where}", values).fetchone()[0]

        return self._run(read, 0)

    def purge(self) -> int:
        """Deletes all that waits, and its traces in the file; returns how many samples that were. Not the day's bytes.

        Raises:
            StoreError: the disk refused; samples may be left.
        """

        def delete(db: sqlite3.Connection) -> int:
            return self._delete(db, "1", ())

        with self._lock:
            try:
                deleted = self._transaction(self._open(), delete)
                # In WAL mode the old pages lie in two files.
                self._open().execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._open().execute("VACUUM")
                self._open().execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._aside.unlink(missing_ok=True)
            except (sqlite3.Error, OSError) as error:
                raise StoreError(f"cannot purge {self._path}: {error}; delete the file by hand") from error
            return deleted

    def close(self) -> None:
        with self._lock:
            self._shut()

    # ---- the file

    def _delete(self, db: sqlite3.Connection, where: str, values: Sequence[float]) -> int:
        size = db.execute(f"SELECT coalesce(sum(size_bytes), 0) FROM samples WHERE {where}", values).fetchone()[0]
        self._bytes -= size
        return db.execute(f"DELETE FROM samples WHERE {where}", values).rowcount

    def _run(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """Does it in one transaction; `otherwise` is the result where the disk does not let it happen."""
        with self._lock:
            try:
                return self._transaction(self._open(), work)
            except (sqlite3.OperationalError, OSError) as error:  # full, read-only, input or output failed
                log.warning("event=spool_failed file=%s reason=%s", self._path, str(error))
                self._shut()
            except sqlite3.DatabaseError as error:
                if type(error) is not sqlite3.DatabaseError:  # a mistake of this module, not of the file
                    raise
                self._set_aside(error)
            return otherwise

    def _transaction(self, db: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
        before = self._bytes
        try:
            with db:
                return work(db)
        except BaseException:
            self._bytes = before
            raise

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            db = sqlite3.connect(self._path, timeout=5.0, check_same_thread=False)
            try:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = NORMAL")
                db.execute("PRAGMA journal_size_limit = 4194304")
                found = db.execute("PRAGMA user_version").fetchone()[0]
                if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    db.executescript(_SCHEMA)
                elif found != _FORMAT:
                    raise sqlite3.DatabaseError(f"a spool of format {found}, this EdgeFM reads {_FORMAT}")
                self._bytes = db.execute("SELECT coalesce(sum(size_bytes), 0) FROM samples").fetchone()[0]
            except BaseException:
                db.close()
                raise
            self._db = db
        return self._db

    def _shut(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with suppress(sqlite3.Error):
                db.close()

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        """Keeps one damaged file for whoever wants to look; the next call begins a fresh one."""
        self._shut()
        log.error("event=spool_damaged file=%s reason=%s kept_as=%s", self._path, str(error), self._aside)
        with suppress(OSError):
            self._path.replace(self._aside)
            for suffix in ("-wal", "-shm"):
                self._path.with_name(SPOOL_FILE + suffix).unlink(missing_ok=True)


def _day(now_s: float) -> int:
    return int(now_s // DAY_S)
