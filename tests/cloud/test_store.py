"""The sample store: what it keeps once, what comes back, and what it has no place for."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from edgefm.cloud.store import Labelled, SampleStore
from edgefm.models.errors import StoreError
from edgefm.models.pool import normalise
from edgefm.models.versions import sha256_hex

DIM = 12


def labelled(seed: int) -> Labelled:
    rng = np.random.default_rng(seed)
    return Labelled(normalise(rng.standard_normal(DIM)), f"label {seed % 3}", float(rng.uniform()), "pool-1")


@pytest.fixture
def store(tmp_path: Path):
    store = SampleStore(tmp_path / "store")
    yield store
    store.close()


def test_a_sample_is_kept_once_in_each_environment(store: SampleStore):
    image = b"an encoded image"
    digest = sha256_hex(image)
    assert store.add("yard", image, labelled(0), 1.0, "a") == (digest, False)
    assert store.add("yard", image, labelled(1), 0.5, "b") == (digest, True)
    assert store.add("street", image, labelled(2), 0.25, "a") == (digest, False)
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
        store.add("yard", image, labelled(i), float(propensities[i]), "device")
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
            store.add("yard", images[i], labelled(i), 1 / (i + 1), "device")
        read.append(store.samples("yard"))
        store.close()
    assert read[0].sha256 == read[1].sha256 == sorted(map(sha256_hex, images))
    assert np.array_equal(read[0].embeddings, read[1].embeddings)
    assert np.array_equal(read[0].propensities, read[1].propensities)


def test_an_environment_without_samples_reads_as_empty(store: SampleStore):
    samples = store.samples("yard")
    assert samples.sha256 == [] and len(samples.embeddings) == len(samples.propensities) == 0


def test_there_is_no_place_for_a_ground_truth_label(store: SampleStore, tmp_path: Path):
    store.add("yard", b"image", labelled(0), 1.0, "device")
    with sqlite3.connect(tmp_path / "store" / "samples.db") as db:
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = [row[1] for row in db.execute("PRAGMA table_info(samples)")]
        pseudo_label = db.execute("SELECT pseudo_label FROM samples").fetchone()[0]
    db.close()
    assert tables == ["samples"]
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
    with pytest.raises(StoreError, match="cannot write"):
        store.add("yard", image, labelled(0), 1.0, "device")
    assert store.count("yard") == 0
    folder.unlink()
    assert store.add("yard", image, labelled(0), 1.0, "device") == (sha256_hex(image), False)


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
        lambda: store.add("yard", b"image", labelled(0), 1.0, "device"),
        lambda: store.count("yard"),
        lambda: store.samples("yard"),
    ):
        with pytest.raises(StoreError, match="no such table"):
            call()


def test_several_threads_may_add_the_same_samples(store: SampleStore):
    images = [f"image {i}".encode() for i in range(25)]
    with ThreadPoolExecutor(4) as pool:
        added = list(pool.map(lambda i: store.add("yard", images[i % 25], labelled(i % 25), 1.0, "d"), range(100)))
    assert store.count("yard") == 25
    assert sum(not duplicate for _, duplicate in added) == 25
