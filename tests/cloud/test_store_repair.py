"""What a killed process, a lost file or a damaged index leaves, and what the next start makes of it."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from edgefm.cloud.store import Labelled, NewSample, SampleStore
from edgefm.cloud.store_repair import Repairs, open_store
from edgefm.models.errors import StoreError
from edgefm.models.pool import normalise
from edgefm.models.versions import sha256_hex

SAMPLES = 40


def sample(number: int, environment: str = "yard") -> NewSample:
    rng = np.random.default_rng(number)
    embedding = normalise(rng.standard_normal(320))
    image = rng.bytes(int(rng.integers(500, 3000)))
    return NewSample(environment, image, Labelled(embedding, "cat", 0.5, "pool"), 0.25, "device")


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    store, repairs = open_store(tmp_path)
    assert repairs == Repairs()
    store.add([sample(number) for number in range(SAMPLES)])
    store.add([sample(0, "street")])
    store.close()
    return tmp_path


def image_of(root: Path, number: int) -> Path:
    digest = sha256_hex(sample(number).image)
    return root / "images" / digest[:2] / digest


def test_a_process_killed_at_any_moment_loses_nothing_it_had_acknowledged(tmp_path: Path):
    """Killed again and again at seeded moments while it keeps samples, evicts for its quota and repairs its start."""
    script = tmp_path / "keeps.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from pathlib import Path
            import numpy as np
            from edgefm.cloud.store import Labelled, NewSample
            from edgefm.cloud.store_repair import open_store

            store, _ = open_store(Path(sys.argv[1]), quota_bytes=200_000)
            rng = np.random.default_rng(int(sys.argv[2]))
            vector = np.eye(1, 64, dtype=np.float32)[0]
            while True:
                images = [rng.bytes(2000) for _ in range(rng.integers(1, 9))]
                said = Labelled(vector, "cat", 0.5, "pool")
                kept = store.add([NewSample("yard", image, said, 1.0, "d", durable=True) for image in images])
                sys.stdout.write("".join(f"{one.sha256}\\n" for one in kept))
                sys.stdout.flush()
            """
        )
    )
    folder = tmp_path / "store"
    rng = random.Random(3)
    found: list[Repairs] = []
    acknowledged: list[str] = []
    for round_number in range(5):
        out = tmp_path / f"out-{round_number}"
        with out.open("wb") as file:
            process = subprocess.Popen([sys.executable, str(script), str(folder), str(round_number)], stdout=file)
        told_bytes = 65 * rng.randint(30, 100)
        while out.stat().st_size < told_bytes:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        acknowledged += [line for line in out.read_text().split("\n") if len(line) == 64]
        store, repairs = open_store(folder, 200_000)
        found.append(repairs)
        stored = set(store.samples("yard").sha256)
        evicted = store.labelled()["yard"] - len(stored)
        # Oldest first, so what is stored is what was acknowledged last, and of each round a group told to nobody.
        unheard = 8 * (round_number + 2)
        assert set(acknowledged[-max(len(stored) - unheard, 1) :]) <= stored and evicted >= 0
        assert all(sha256_hex(store.image_path(digest).read_bytes()) == digest for digest in stored)
        assert {path.name for path in (folder / "images").glob("*/*")} == stored
        store.close()
    assert len(acknowledged) >= 150 and evicted > 0 and len(stored) > 60
    assert all(repairs.rows_removed == 0 for repairs in found)


def test_what_a_crash_leaves_is_cleared_away_and_counted(filled: Path, caplog):
    image_of(filled, 1).unlink()
    image_of(filled, 2).write_bytes(b"cut short")
    orphan = filled / "images" / "ab" / ("ab" * 32)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"written, and its row was not")
    (orphan.parent / ".half").write_bytes(b"half")
    with sqlite3.connect(filled / "features.db") as features:
        features.execute("CREATE TABLE features (backbone TEXT, sha256 TEXT, vector BLOB)")
        rows = [(image_of(filled, number).name,) for number in (1, 3)]
        features.executemany("INSERT INTO features VALUES ('b', ?, x'00')", rows)
    features.close()
    store, repairs = open_store(filled)
    # The image that was cut short has lost its row, and is then without one itself.
    assert repairs == Repairs(rows_removed=2, images_removed=2, temporaries_removed=1)
    assert store.count("yard") == SAMPLES - 2 and store.count("street") == 1
    assert store.usage["yard"].samples == SAMPLES - 2
    store.close()
    with sqlite3.connect(filled / "features.db") as features:
        assert features.execute("SELECT sha256 FROM features").fetchall() == rows[1:]
    features.close()
    assert "event=store_repaired rows_removed=2 images_removed=2 temporaries_removed=1" in caplog.text
    again, repairs = open_store(filled)
    assert repairs == Repairs()
    assert not again.add([sample(1)])[0].duplicate  # and it can come again
    again.close()


def test_a_file_that_is_no_index_is_set_aside_with_its_images(filled: Path):
    (filled / "samples.db").write_bytes(b"not a database, but long enough to be read as one" * 100)
    for suffix in ("-wal", "-shm"):
        (filled / f"samples.db{suffix}").unlink(missing_ok=True)
    store, repairs = open_store(filled)
    assert repairs == Repairs(images_set_aside=SAMPLES) and store.count("yard") == 0
    aside = {path.name for path in (filled / "damaged-0" / "images").glob("*/*")}
    assert aside == {image_of(filled, number).name for number in range(SAMPLES)}
    assert (filled / "damaged-0" / "samples.db").read_bytes().startswith(b"not a database")
    store.add([sample(0)])  # it goes on
    store.close()


def test_what_can_be_read_of_a_damaged_index_is_taken_over(filled: Path):
    """A run of pages in its middle is overwritten."""
    with sqlite3.connect(filled / "samples.db") as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        page = db.execute("PRAGMA page_size").fetchone()[0]
    db.close()
    data = bytearray((filled / "samples.db").read_bytes())
    middle = len(data) // page // 2
    data[middle * page : (middle + 3) * page] = b"\xff" * (3 * page)
    (filled / "samples.db").write_bytes(data)
    store, repairs = open_store(filled)
    assert 0 < repairs.rows_salvaged < SAMPLES + 1
    assert store.count("yard") + store.count("street") == repairs.rows_salvaged
    assert store.labelled()["yard"] == 1 + store.samples("yard").numbers.max()  # no number is given twice
    by_digest = {sha256_hex(sample(number).image): sample(number) for number in range(SAMPLES)}
    samples = store.samples("yard")
    for digest, embedding in zip(samples.sha256, samples.embeddings, strict=True):
        assert np.array_equal(embedding, by_digest[digest].labelled.embedding)
        assert store.image_path(digest).read_bytes() == by_digest[digest].image
    lost = by_digest.keys() - set(samples.sha256) - set(store.samples("street").sha256)
    assert repairs.images_set_aside == len(lost) > 0
    assert {path.name for path in (filled / "damaged-0" / "images").glob("*/*")} == lost
    store.close()
    again, repairs = open_store(filled)
    assert repairs == Repairs()
    again.close()


def test_a_damaged_feature_cache_is_removed(filled: Path):
    (filled / "features.db").write_bytes(b"not a database, but long enough to be read as one" * 100)
    store, _ = open_store(filled)
    store.close()
    assert not (filled / "features.db").exists()


def test_a_folder_that_cannot_be_made_is_a_store_error(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="sample store"):
        open_store(tmp_path / "file" / "store")


def test_the_process_that_only_reads_repairs_nothing(filled: Path):
    orphan = filled / "images" / "ab" / ("ab" * 32)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"being written by the cloud just now")
    SampleStore(filled).close()
    assert orphan.exists()


def test_samples_that_a_wrong_clock_has_stamped_count_as_received_now(filled: Path):
    """Of 40, one each from 1970 and from 2096; retention then takes what is old by a right clock, and nothing else."""
    stamps = {1: 500.0, 2: 4e9, 3: time.time() - 40 * 86_400}
    with closing(sqlite3.connect(filled / "samples.db")) as db, db:
        for number, at in stamps.items():
            name = image_of(filled, number).name
            db.execute("UPDATE samples SET received_at = ? WHERE sha256 = ?", (at, name))
    store, repairs = open_store(filled)
    assert repairs == Repairs(times_mended=2)
    now = store.clock.now_s()
    assert store.purge(now - 30 * 86_400) == 1 and store.count("yard") == SAMPLES - 1
    assert store.purge(now + 1) == SAMPLES  # and one of another environment
    store.close()
