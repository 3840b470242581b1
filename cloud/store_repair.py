"""Opens the sample store and mends what a crash, a full disk or a damaged file has left.

A row whose image is missing or has another size is removed. An image without a row is removed: its sender was never told
that it is kept, and nothing says to which environment it belongs or with which propensity it was sent. Temporary files
are removed. A damaged index is set aside with its images, never deleted: the rows that can still be read are taken over,
and images whose row is lost are moved beside the damaged index instead of being labelled again by guess. Samples that a
wrong clock has stamped count as received now: retention neither takes them at once nor keeps them for ever.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..models.clock import SteadyClock, mistaken
from ..models.errors import StoreError
from .store import COLUMNS, FEATURES_FILE, IMAGES_FOLDER, INDEX_FILE, INSERT, SCHEMA_VERSION, SampleStore, newest_s

log = logging.getLogger("edgefm.cloud.store")
_SUFFIXES = ("", "-wal", "-shm")


@dataclass(frozen=True)
class Repairs:
    """What was found, in numbers; all zero when the store was whole."""

    rows_removed: int = 0
    images_removed: int = 0
    temporaries_removed: int = 0
    rows_salvaged: int = 0
    images_set_aside: int = 0
    times_mended: int = 0


def open_store(root: Path, quota_bytes: int = 0) -> tuple[SampleStore, Repairs]:
    """Only for the one process that writes to the store: what another is writing would look like a leftover.

    Raises:
        StoreError: the disk refuses.
    """
    try:
        aside = _set_aside(root) if _damaged(root / INDEX_FILE) else None
        SampleStore(root).close()  # makes the index if there is none
        with closing(sqlite3.connect(root / INDEX_FILE)) as db:
            sizes, temporaries = _scan(root / IMAGES_FOLDER)
            salvaged = _salvage(aside, db, sizes) if aside else 0
            rows = _remove_rows(db, sizes)
            orphans = sizes.keys() - {sha256 for (sha256,) in db.execute("SELECT sha256 FROM samples")}
            _clear_images(root, orphans, aside)
            _clear_features(root, db)
            times = _mend_times(db)
        store = SampleStore(root, quota_bytes)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"cannot repair the sample store in {root}: {error}") from error
    moved = len(orphans) if aside else 0
    repairs = Repairs(rows, len(orphans) - moved, temporaries, salvaged, moved, times)
    if repairs != Repairs() or aside:
        log.warning(
            "event=store_repaired rows_removed=%d images_removed=%d temporaries_removed=%d set_aside=%s "
            "rows_salvaged=%d images_set_aside=%d times_mended=%d",
            repairs.rows_removed,
            repairs.images_removed,
            repairs.temporaries_removed,
            aside,
            repairs.rows_salvaged,
            repairs.images_set_aside,
            repairs.times_mended,
        )
    return store, repairs


def _damaged(index: Path) -> bool:
    """Also an index of another schema: what it holds is taken over in the same way."""
    if not index.exists():
        return False
    try:
        with closing(sqlite3.connect(index)) as db:
            sound = db.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
            version = db.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.OperationalError:
        raise  # locked or unreadable: not the file's fault
    except sqlite3.DatabaseError:
        return True
    return not sound or version != SCHEMA_VERSION


def _set_aside(root: Path) -> Path:
    number = sum(1 for _ in root.glob("damaged-*"))
    aside = root / f"damaged-{number}"
    aside.mkdir()
    for suffix in _SUFFIXES:
        with suppress(FileNotFoundError):
            (root / f"{INDEX_FILE}{suffix}").rename(aside / f"{INDEX_FILE}{suffix}")
    return aside


def _scan(images: Path) -> tuple[dict[str, int], int]:
    """Bytes of each image by name; removes temporary files and counts them."""
    sizes, temporaries = {}, 0
    for path in images.glob("*/*"):
        if path.name.startswith("."):
            path.unlink()
            temporaries += 1
        else:
            sizes[path.name] = path.stat().st_size
    return sizes, temporaries


def _salvage(aside: Path, db: sqlite3.Connection, sizes: dict[str, int]) -> int:
    with closing(sqlite3.connect(aside / INDEX_FILE)) as damaged, db:
        damaged.text_factory = lambda data: data.decode("utf-8", "replace")  # one bad text must not end the reading
        for row in _readable_rows(damaged):
            if _sound(row, sizes):
                db.execute(INSERT, row)
    with db:
        db.execute(
            "INSERT OR REPLACE INTO labelled SELECT environment, MAX(number) + 1 FROM samples GROUP BY environment"
        )
    return db.execute("SELECT COUNT(*) FROM samples").fetchone()[0]


def _readable_rows(damaged: sqlite3.Connection) -> Iterator[tuple]:
    """From both ends up to where reading fails."""
    for order in ("ASC", "DESC"):
        try:
            yield from damaged.execute(
                f"SELECT {COLUMNS} FROM samples NOT INDEXED ORDER BY environment {order}, sha256 {order}"
            )
            return
        except sqlite3.DatabaseError as error:
            log.warning("event=index_unreadable order=%s reason=%s", order, error)


def _sound(row: tuple, sizes: dict[str, int]) -> bool:
    """The image is there and the embedding is one."""
    _, sha256, _, _, propensity, embedding, label, *_, size_bytes, number = row
    try:
        vector = np.frombuffer(embedding, "<f4")
        norm = float(np.linalg.norm(vector))
        whole = sizes.get(sha256) == size_bytes - len(embedding) and abs(norm - 1) < 0.01 and 0 < propensity <= 1
        return whole and number >= 0 and "\ufffd" not in label
    except (TypeError, ValueError):
        return False


def _remove_rows(db: sqlite3.Connection, sizes: dict[str, int]) -> int:
    query = "SELECT environment, sha256, size_bytes - LENGTH(embedding) FROM samples"
    broken = [(environment, sha256) for environment, sha256, size in db.execute(query) if sizes.get(sha256) != size]
    with db:
        db.executemany("DELETE FROM samples WHERE environment = ? AND sha256 = ?", broken)
    return len(broken)


def _mend_times(db: sqlite3.Connection) -> int:
    now = {"now": SteadyClock(newest_s(db)).now_s()}
    with db:
        return db.execute(f"UPDATE samples SET received_at = :now WHERE {mistaken('received_at')}", now).rowcount


def _clear_images(root: Path, orphans: set[str], aside: Path | None) -> None:
    for sha256 in orphans:
        path = root / IMAGES_FOLDER / sha256[:2] / sha256
        if aside is None:
            path.unlink()
        else:
            target = aside / IMAGES_FOLDER / sha256[:2]
            target.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target / sha256)


def _clear_features(root: Path, db: sqlite3.Connection) -> None:
    """Features of samples that are gone; a damaged cache is removed, the next run fills it again."""
    path = root / FEATURES_FILE
    if not path.exists():
        return
    with closing(sqlite3.connect(path)) as features:
        try:
            known = {sha256 for (sha256,) in db.execute("SELECT sha256 FROM samples")}
            cached = {sha256 for (sha256,) in features.execute("SELECT DISTINCT sha256 FROM features")}
            with features:
                features.executemany("DELETE FROM features WHERE sha256 = ?", [(gone,) for gone in cached - known])
            return
        except sqlite3.OperationalError:
            return  # no table yet
        except sqlite3.DatabaseError:
            log.warning("event=features_removed path=%s reason=damaged", path)
    for suffix in _SUFFIXES:
        path.with_name(path.name + suffix).unlink(missing_ok=True)
