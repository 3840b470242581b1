"""The sample store: what it keeps once, what comes back, and what it has no place for."""

from __future__ import annotations

import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from edgefm.cloud.store import Kept, Labelled, NewSample, SampleStore
from edgefm.cloud.store_repair import Repairs, open_store
from edgefm.models.errors import StoreError
from edgefm.models.pool import normalise
from edgefm.models.versions import sha256_hex

DIM = 12


def labelled(seed: int) -> Labelled:
    rng = np.random.default_rng(seed)
    return Labelled(normalise(rng.standard_normal(DIM)), f"label {seed % 3}", float(rng.uniform()), "pool-1")


def add(store: SampleStore, environment: str, image: bytes, labelled: Labelled, propensity: float, device: str) -> Kept:
    (kept,) = store.add([NewSample(environment, image, labelled, propensity, device)])
    return kept


@pytest.fixture
def store(tmp_path: Path):
    store = SampleStore(tmp_path / "store")
    yield store
    store.close()


def test_a_sample_is_kept_once_in_each_environment(store: SampleStore):
    image = b"an encoded image"
    digest = sha256_hex(image)
    assert add(store, "yard", image, labelled(0), 1.0, "a") == (digest, False)
    assert add(store, "yard", image, labelled(1), 0.5, "b") == (digest, True)
    assert add(store, "street", image, labelled(2), 0.25, "a") == (digest, False)
    assert (store.count("yard"), store.count("street"), store.count("elsewhere")) == (1, 1, 0)
    assert store.has("yard", digest) and not store.has("elsewhere", digest)
    assert store.image_path(digest).read_bytes() == image
    # The first word of the FM stays, and one file serves both environments.
    assert np.array_equal(store.samples("yard").embeddings[0], labelled(0).embedding)
    assert store.samples("street").propensities.tolist() == [0.25]
    files = [path for path in store.image_path(digest).parents[1].rglob("*") if path.is_file()]
    assert files == [store.image_path(digest)]


def test_what_was_stored_comes_back_bit_by_bit_also_after_a_restart(tmp_path: Path):
    images = [f"image {i}".encode() for i in range(20)]
    propensities = np.random.default_rng(3).uniform(0.01, 1, 20)
    store = SampleStore(tmp_path)
    for i, image in enumerate(images):
        add(store, "yard", image, labelled(i), float(propensities[i]), "device")
    store.close()
    store = SampleStore(tmp_path)
    samples = store.samples("yard")
    store.close()
    place = {digest: position for position, digest in enumerate(samples.sha256)}
    order = [place[sha256_hex(image)] for image in images]
    assert samples.embeddings.dtype == np.float32 and samples.embeddings.shape == (20, DIM)
    assert np.array_equal(samples.embeddings[order], np.stack([labelled(i).embedding for i in range(20)]))
    assert np.array_equal(samples.propensities[order], propensities)


def test_the_order_of_samples_does_not_depend_on_their_arrival(tmp_path: Path):
    images = [f"image {i}".encode() for i in range(30)]
    read = []
    for name, order in (("a", range(30)), ("b", np.random.default_rng(5).permutation(30))):
        store = SampleStore(tmp_path / name)
        for i in order:
            add(store, "yard", images[i], labelled(i), 1 / (i + 1), "device")
        read.append(store.samples("yard"))
        store.close()
    assert read[0].sha256 == read[1].sha256 == sorted(map(sha256_hex, images))
    assert np.array_equal(read[0].embeddings, read[1].embeddings)
    assert np.array_equal(read[0].propensities, read[1].propensities)


def test_an_environment_without_samples_reads_as_empty(store: SampleStore):
    samples = store.samples("yard")
    assert samples.sha256 == [] and len(samples.embeddings) == len(samples.propensities) == 0


def test_there_is_no_place_for_a_ground_truth_label(store: SampleStore, tmp_path: Path):
    add(store, "yard", b"image", labelled(0), 1.0, "device")
    with sqlite3.connect(tmp_path / "store" / "samples.db") as db:
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = [row[1] for row in db.execute("PRAGMA table_info(samples)")]
        pseudo_label = db.execute("SELECT pseudo_label FROM samples").fetchone()[0]
    db.close()
    assert tables == ["samples", "labelled"]
    assert columns == [
        "environment",
        "sha256",
        "received_at",
        "device_id",
        "propensity",
        "embedding",
        "pseudo_label",
        "margin",
        "pool_version",
        "size_bytes",
        "number",
    ]
    assert pseudo_label == "label 0"
    # Nor in the file names: nothing but content hashes.
    names = {path.name for path in (tmp_path / "store" / "images").rglob("*") if path.is_file()}
    assert names == {sha256_hex(b"image")}


def test_no_row_points_at_an_image_that_could_not_be_written(store: SampleStore):
    image = b"image"
    folder = store.image_path(sha256_hex(image)).parent
    folder.parent.mkdir(exist_ok=True)
    folder.write_bytes(b"a file where a folder should be")
    with pytest.raises(StoreError, match="cannot keep"):
        add(store, "yard", image, labelled(0), 1.0, "device")
    assert store.count("yard") == 0
    folder.unlink()
    assert add(store, "yard", image, labelled(0), 1.0, "device") == (sha256_hex(image), False)


def test_a_folder_that_cannot_be_made_is_a_store_error(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"cannot open the sample store in .*file"):
        SampleStore(tmp_path / "file" / "store")


def test_a_file_that_is_no_index_is_a_store_error(tmp_path: Path):
    (tmp_path / "samples.db").write_bytes(b"not a database, but long enough to be read as one" * 100)
    with pytest.raises(StoreError, match="cannot open"):
        SampleStore(tmp_path)


def test_a_lost_index_is_a_store_error_wherever_it_is_noticed(store: SampleStore, tmp_path: Path):
    with sqlite3.connect(tmp_path / "store" / "samples.db") as db:
        db.execute("DROP TABLE samples")
    db.close()
    for call in (
        lambda: add(store, "yard", b"image", labelled(0), 1.0, "device"),
        lambda: store.count("yard"),
        lambda: store.samples("yard"),
    ):
        with pytest.raises(StoreError, match="no such table"):
            call()


def test_several_threads_may_add_the_same_samples(store: SampleStore):
    images = [f"image {i}".encode() for i in range(25)]
    with ThreadPoolExecutor(4) as pool:
        added = list(pool.map(lambda i: add(store, "yard", images[i % 25], labelled(i % 25), 1.0, "d"), range(100)))
    assert store.count("yard") == 25
    assert sum(not duplicate for _, duplicate in added) == 25


def test_a_full_disk_loses_the_sample_and_leaves_the_store_whole(tmp_path: Path, full_disk):
    store, _ = open_store(tmp_path)
    add(store, "yard", b"before", labelled(0), 1.0, "d")
    with full_disk():
        for durable in (False, True):
            sample = NewSample("yard", b"during" * 2000, labelled(1), 1.0, "d", durable)
            with pytest.raises(StoreError, match="free space"):
                store.add([sample])
        with pytest.raises(StoreError, match="free space"):
            store.probe()
        assert store.count("yard") == 1 == store.usage["yard"].samples  # reading goes on
    assert [path.name for path in store.image_path("00").parents[1].glob("*/*")] == [sha256_hex(b"before")]
    store.probe()
    assert not add(store, "yard", b"during" * 2000, labelled(1), 1.0, "d").duplicate
    store.close()
    store, repairs = open_store(tmp_path)
    assert repairs == Repairs() and store.count("yard") == 2
    store.close()


def test_samples_that_came_together_are_kept_together_or_not_at_all(store: SampleStore):
    blocked = store.image_path(sha256_hex(b"second")).parent
    blocked.parent.mkdir(exist_ok=True)
    blocked.write_bytes(b"a file where a folder should be")
    group = [NewSample("yard", image, labelled(0), 1.0, "d") for image in (b"first", b"second", b"third")]
    with pytest.raises(StoreError):
        store.add(group)
    assert store.count("yard") == 0 == store.labelled().get("yard", 0)
    assert not store.image_path(sha256_hex(b"first")).exists()
    blocked.unlink()
    assert [kept.duplicate for kept in store.add([*group, group[0]])] == [False, False, False, True]
    assert store.labelled() == {"yard": 3}


def test_a_durable_duplicate_is_synced_like_a_new_sample(store: SampleStore, tmp_path: Path, monkeypatch):
    """Kept from a query first, then uploaded: the device deletes its copy once it hears of the duplicate."""
    synced, fsync = [], os.fsync

    def spy(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    kept = add(store, "yard", b"image", labelled(0), 1.0, "d")
    file, log = store.image_path(kept.sha256), tmp_path / "store" / "samples.db-wal"
    before = log.read_bytes()
    assert add(store, "yard", b"image", labelled(0), 1.0, "d").duplicate
    assert synced == [] and log.read_bytes() == before  # a query's costs nothing
    (again,) = store.add([NewSample("yard", b"image", labelled(0), 1.0, "d", durable=True)])
    assert again.duplicate and synced == [file.stat().st_ino]
    assert log.read_bytes() != before  # a transaction went into the log, which its full commit syncs
    (other,) = store.add([NewSample("street", b"image", labelled(0), 1.0, "d", durable=True)])
    assert not other.duplicate and synced == [file.stat().st_ino] * 2


# ---- quota and retention


def fill(store: SampleStore, environment: str, first: int, count: int, size: int = 1000) -> list[str]:
    """Adds one after the other, so that their ages differ; returns their names in order of age."""
    images = [f"{environment} {i:06d} ".encode().ljust(size, b".") for i in range(first, first + count)]
    return [add(store, environment, image, labelled(i), 1.0, "d").sha256 for i, image in enumerate(images)]


SAMPLE_BYTES = 1000 + 4 * DIM


def test_the_quota_takes_the_oldest_samples_of_the_environment_that_holds_most(tmp_path: Path):
    store = SampleStore(tmp_path, quota_bytes=50 * SAMPLE_BYTES)
    modest = fill(store, "modest", 0, 10)
    greedy = fill(store, "greedy", 0, 200)
    stored = store.samples("greedy").sha256
    assert sorted(modest) == store.samples("modest").sha256  # it never held most
    assert sorted(greedy[-len(stored) :]) == stored and 35 <= len(stored) <= 40
    total = sum(usage.size_bytes for usage in store.usage.values())
    assert total == (10 + len(stored)) * SAMPLE_BYTES <= 50 * SAMPLE_BYTES
    assert store.evicted == 200 - len(stored) and store.labelled() == {"greedy": 200, "modest": 10}
    files = {path.name for path in (tmp_path / "images").glob("*/*")}
    assert files == {*modest, *stored}
    store.close()
    store, repairs = open_store(tmp_path, 50 * SAMPLE_BYTES)
    assert repairs == Repairs() and store.usage["greedy"].samples == len(stored)
    store.close()


def test_eviction_does_not_thin_the_held_out_slice(tmp_path: Path):
    """Nor any other slice that the content's hash chooses: its share among the rest is what it was."""
    store = SampleStore(tmp_path, quota_bytes=300 * SAMPLE_BYTES)
    fill(store, "yard", 0, 900)
    rest = store.samples("yard").sha256
    share = sum(int(sha256[:8], 16) / 2**32 < 0.2 for sha256 in rest) / len(rest)
    store.close()
    assert len(rest) > 250 and abs(share - 0.2) < 3 * (0.2 * 0.8 / len(rest)) ** 0.5


def test_an_image_of_two_environments_stays_until_both_have_lost_it(tmp_path: Path):
    store = SampleStore(tmp_path)
    for environment in ("yard", "street"):
        add(store, environment, b"shared", labelled(0), 1.0, "d")
    add(store, "yard", b"own", labelled(1), 1.0, "d")
    features = sqlite3.connect(tmp_path / "features.db")
    with features:
        features.execute("CREATE TABLE features (backbone TEXT, sha256 TEXT, vector BLOB)")
        features.executemany(
            "INSERT INTO features VALUES ('b', ?, x'00')", [[sha256_hex(b"shared")], [sha256_hex(b"own")]]
        )
    with sqlite3.connect(tmp_path / "samples.db") as db:
        db.execute("UPDATE samples SET received_at = 10 WHERE environment = 'yard'")
    db.close()
    assert store.purge(5) == 0
    assert store.purge(20) == 2
    assert store.image_path(sha256_hex(b"shared")).exists() and not store.image_path(sha256_hex(b"own")).exists()
    assert features.execute("SELECT sha256 FROM features").fetchall() == [(sha256_hex(b"shared"),)]
    features.close()
    assert store.count("street") == 1 and store.usage["yard"].samples == 0
    store.close()


def test_recent_samples_can_be_asked_for(tmp_path: Path):
    store = SampleStore(tmp_path)
    fill(store, "yard", 0, 5)
    with sqlite3.connect(tmp_path / "samples.db") as db:
        db.execute("UPDATE samples SET received_at = 10 WHERE sha256 IN (SELECT sha256 FROM samples LIMIT 2)")
    db.close()
    assert store.count("yard", since=11) == 3
    assert store.count("yard") == 5
    store.close()
