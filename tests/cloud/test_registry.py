"""The registry: immutable versions, blobs named by content, one pointer that is never half written."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from edgefm.cloud.registry import Registry
from edgefm.models.confidence import Confidence
from edgefm.models.errors import InputError, ModelError, StoreError
from edgefm.models.images import Preprocess
from edgefm.models.pool import LabelPool, normalise
from edgefm.models.versions import Calibration, StudentManifest, sha256_hex


def new_manifest(environment: str = "yard", parent: int | None = None) -> StudentManifest:
    return StudentManifest(
        environment=environment,
        version=0,
        parent=parent,
        profile="lite0-64",
        preprocess=Preprocess(64),
        confidence=Confidence(0.05),
        embedding_dim=8,
        foundation_model="fm",
        pool_version="p",
        samples=0,
        agreement=None,
        parent_agreement=None,
        method="test",
        precision="float",
        calibration=Calibration(margins=[0.1], agreements=[True], propensities=[1.0]),
        files=[],
        created_at="2026-01-01T00:00:00+00:00",
    )


def successor(parent: StudentManifest) -> StudentManifest:
    return parent.model_copy(update={"parent": parent.version})


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def test_versions_keep_what_they_share_and_roll_back(registry: Registry):
    first = registry.publish(new_manifest(), {"graph": b"g", "head": b"h0"})
    second = registry.publish(successor(first), {"head": b"h1"})
    assert (first.version, first.parent, second.version, second.parent) == (0, None, 1, 0)
    shared = {ref.name: ref.sha256 for ref in first.files}
    assert {ref.name for ref in second.files if shared[ref.name] == ref.sha256} == {"graph"}
    assert registry.current("yard") == second
    assert registry.rollback("yard") == first == registry.current("yard")
    with pytest.raises(InputError, match="no parent"):
        registry.rollback("yard")


def test_rolls_back_to_a_given_version_and_goes_on_from_there(registry: Registry):
    version = registry.publish(new_manifest(), {"head": b"h0"})
    for number in (1, 2):
        version = registry.publish(successor(version), {"head": b"h%d" % number})
    assert registry.rollback("yard", 0).version == 0 and registry.current("yard").version == 0
    assert registry.rollback("yard", 2).version == 2 and registry.current("yard").version == 2
    # What is published after a rollback takes a new number and names its true parent; nothing is overwritten.
    back = registry.rollback("yard", 1)
    latest = registry.publish(successor(back), {"head": b"h3"})
    assert (latest.version, latest.parent) == (3, 1)
    assert registry.versions("yard") == [0, 1, 2, 3]
    assert [registry.manifest("yard", n).parent for n in range(4)] == [None, 0, 1, 1]


def test_an_unknown_version_names_those_there_are(registry: Registry):
    with pytest.raises(InputError, match=r"yard has no version 0; there are: none"):
        registry.manifest("yard", 0)
    first = registry.publish(new_manifest(), {"head": b"h0"})
    registry.publish(successor(first), {"head": b"h1"})
    with pytest.raises(InputError, match=r"yard has no version 7; there are: 0, 1"):
        registry.rollback("yard", 7)
    assert registry.current("yard").version == 1


def test_environments_do_not_see_each_other(registry: Registry):
    registry.publish(new_manifest("yard"), {"head": b"same"})
    street = registry.publish(new_manifest("street"), {"head": b"same"})
    registry.publish(successor(street), {"head": b"other"})
    assert (registry.current("yard").version, registry.current("street").version) == (0, 1)


def test_blobs_are_named_by_content_and_stored_once(registry: Registry, tmp_path: Path):
    first = registry.publish(new_manifest(), {"a": b"same", "b": b"same", "c": b"other"})
    names = {ref.name: ref.sha256 for ref in first.files}
    assert names == {"a": sha256_hex(b"same"), "b": sha256_hex(b"same"), "c": sha256_hex(b"other")}
    blobs = {path.name: path.read_bytes() for path in (tmp_path / "registry" / "blobs").iterdir()}
    assert blobs == {sha256_hex(b"same"): b"same", sha256_hex(b"other"): b"other"}


def test_a_published_manifest_is_never_written_again(registry: Registry, tmp_path: Path):
    first = registry.publish(new_manifest(), {"head": b"h0"})
    path = tmp_path / "registry" / "environments" / "yard" / "versions" / "000000.json"
    before = path.read_bytes()
    registry.publish(successor(first), {"head": b"h1"})
    registry.rollback("yard")
    registry.publish(successor(first), {"head": b"h2"})
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="frozen"):
        first.samples = 5


def test_a_version_that_cannot_be_written_leaves_the_current_one(registry: Registry, tmp_path: Path):
    first = registry.publish(new_manifest(), {"head": b"h0"})
    versions = tmp_path / "registry" / "environments" / "yard" / "versions"
    versions.rename(versions.with_name("kept"))
    versions.write_bytes(b"no folder")
    with pytest.raises(StoreError):
        registry.publish(successor(first), {"head": b"h1"})
    versions.unlink()
    versions.with_name("kept").rename(versions)
    assert registry.current("yard") == first and registry.versions("yard") == [0]


def test_readers_of_the_pointer_see_a_whole_version_at_any_time(registry: Registry):
    first = registry.publish(new_manifest(), {"head": b"h0"})
    second = registry.publish(successor(first), {"head": b"h1"})
    done = threading.Event()
    seen: set[int] = set()
    errors: list[Exception] = []

    def read() -> None:
        while not done.is_set():
            try:
                seen.add(registry.current("yard").version)
            except Exception as error:
                errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(200):
        registry.rollback("yard", number % 2)
    done.set()
    reader.join()
    assert not errors and seen == {first.version, second.version}
    assert registry.current("yard") == second


def test_materialise_lays_the_files_side_by_side(registry: Registry, tmp_path: Path):
    first = registry.publish(new_manifest(), {"graph": b"g", "head": b"h0"})
    second = registry.publish(successor(first), {"head": b"h1"})
    for manifest, head in ((first, b"h0"), (second, b"h1")):
        folder = tmp_path / f"version{manifest.version}"
        registry.materialise(manifest, folder)
        registry.materialise(manifest, folder)  # again: nothing changes
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"graph": b"g", "head": head}


@pytest.mark.parametrize("damage", [b"hX", b"h0 and more", None], ids=["changed", "longer", "missing"])
def test_a_damaged_blob_is_noticed(registry: Registry, tmp_path: Path, damage: bytes | None):
    manifest = registry.publish(new_manifest(), {"head": b"h0"})
    blob = registry.blob_path(manifest.files[0].sha256)
    blob.unlink()
    if damage is not None:
        blob.write_bytes(damage)
    with pytest.raises(ModelError, match="damaged" if damage else "cannot read"):
        registry.materialise(manifest, tmp_path / "out")
    assert not (tmp_path / "out" / "head").exists()


def test_a_damaged_manifest_or_pointer_is_noticed(registry: Registry, tmp_path: Path):
    registry.publish(new_manifest(), {"head": b"h0"})
    folder = tmp_path / "registry" / "environments" / "yard"
    pointer = folder / "current"
    pointer.write_text("zero")
    with pytest.raises(ModelError, match="no current version"):
        registry.current("yard")
    pointer.unlink()
    with pytest.raises(ModelError, match="no current version"):
        registry.current("yard")
    pointer.write_text("0")
    (folder / "versions" / "000000.json").write_text('{"format": 1}')
    with pytest.raises(ModelError, match="not a student manifest"):
        registry.current("yard")


def test_pools_come_back_and_damaged_ones_are_noticed(registry: Registry):
    rng = np.random.default_rng(1)
    pool = LabelPool(("cat", "dog"), normalise(rng.standard_normal((2, 8))), "fm", warnings=("far",))
    ref = registry.set_pool("yard", pool)
    loaded, loaded_ref = registry.pool("yard")
    assert loaded.version == pool.version and loaded.labels == pool.labels and loaded.warnings == pool.warnings
    assert loaded_ref == ref and np.array_equal(loaded.embeddings, pool.embeddings)
    assert registry.environments() == ["yard"]
    registry.set_pool("yard", LabelPool(("cat",), pool.embeddings[:1], "fm"))
    assert registry.pool("yard")[0].labels == ("cat",)
    registry.set_pool("yard", pool)
    data = bytearray(registry.blob_path(ref.sha256).read_bytes())
    data[len(data) // 2] ^= 1
    registry.blob_path(ref.sha256).write_bytes(data)
    with pytest.raises(ModelError, match="damaged"):
        registry.pool("yard")
    with pytest.raises(ModelError, match="pointer"):
        registry.pool("street")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "x" * 65, "a\n", "a b", "é", "a\0"])
def test_names_cannot_leave_the_folder(registry: Registry, name: str):
    for call in (registry.versions, registry.current, registry.pool):
        with pytest.raises(InputError):
            call(name)
    with pytest.raises(InputError):
        registry.publish(new_manifest(name), {"head": b"h"})


@pytest.mark.parametrize("digest", ["", "../../secret", "g" * 64, "a" * 63, "a" * 65, "A" * 64, "a" * 64 + "\n"])
def test_only_a_hash_names_a_blob(registry: Registry, digest: str):
    with pytest.raises(InputError, match="64 hex digits"):
        registry.blob_path(digest)


def test_a_folder_that_cannot_be_made_is_a_store_error(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot open the registry"):
        Registry(tmp_path / "file" / "registry")
