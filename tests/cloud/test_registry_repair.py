"""What a crash or a damaged file leaves of the registry, and what the next start makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edgefm.cloud.registry import RUNS_FOLDER, Registry
from edgefm.cloud.registry_repair import Repairs, repair
from edgefm.models.confidence import Confidence
from edgefm.models.errors import ModelError, StoreError
from edgefm.models.images import Preprocess
from edgefm.models.pool import LabelPool, normalise
from edgefm.models.versions import Calibration, StudentManifest


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """`yard` with versions 0 to 3, each with a head of its own and a graph in common; 3 is current."""
    registry = Registry(tmp_path / "registry")
    rng = np.random.default_rng(1)
    registry.set_pool("yard", LabelPool(("cat", "dog"), normalise(rng.standard_normal((2, 8))), "fm"))
    manifest = StudentManifest(
        environment="yard",
        version=0,
        parent=None,
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
        calibration=Calibration(),
        files=[],
        created_at="2026-01-01T00:00:00+00:00",
    )
    manifest = registry.publish(manifest, {"graph": b"graph", "head": b"head 0"})
    for number in (1, 2, 3):
        successor = manifest.model_copy(update={"parent": manifest.version})
        manifest = registry.publish(successor, {"head": b"head %d" % number})
    assert repair(registry) == Repairs()
    return registry


def pointer(registry: Registry) -> Path:
    return registry.root / "environments" / "yard" / "current"


def head_of(registry: Registry, version: int) -> Path:
    (head,) = (ref for ref in registry.manifest("yard", version).files if ref.name == "head")
    return registry.blob_path(head.sha256)


@pytest.mark.parametrize("damage", [None, b"", b"three", b"7"], ids=["missing", "empty", "no-number", "no-version"])
def test_a_pointer_that_leads_nowhere_goes_to_the_highest_version(registry: Registry, damage: bytes | None):
    """Missing: killed between a manifest and its pointer."""
    pointer(registry).unlink()
    if damage is not None:
        pointer(registry).write_bytes(damage)
    assert repair(registry).repointed == {"yard": 3}
    assert registry.current("yard").version == 3


def test_a_version_that_no_pointer_ever_reached_stays_and_does_not_become_current(registry: Registry):
    """Killed after the manifest of version 3 and before the pointer: nobody can tell it from a rollback."""
    pointer(registry).write_text("2")
    assert repair(registry) == Repairs() and registry.current("yard").version == 2


def test_a_damaged_version_falls_back_to_its_nearest_whole_ancestor(registry: Registry, caplog):
    head_of(registry, 3).write_bytes(b"head X")
    head_of(registry, 2).unlink()
    assert repair(registry).repointed == {"yard": 1}
    assert registry.current("yard").version == 1
    assert "event=current_version_replaced environment=yard was=3 version=1" in caplog.text
    for version, says in ((3, "damaged"), (2, "cannot read")):
        with pytest.raises(ModelError, match=says):
            registry.rollback("yard", version)  # nor can it become current by hand
    assert registry.current("yard").version == 1
    assert repair(registry) == Repairs()  # once is enough


def test_an_unreadable_manifest_falls_back_and_no_blob_is_collected_for_it(registry: Registry):
    (registry.root / "environments" / "yard" / "versions" / "000003.json").write_text("{")
    before = sorted((registry.root / "blobs").iterdir())
    assert repair(registry).repointed == {"yard": 2}
    assert sorted((registry.root / "blobs").iterdir()) == before


def test_an_environment_without_a_whole_version_is_set_aside(registry: Registry):
    (graph,) = (ref for ref in registry.manifest("yard", 0).files if ref.name == "graph")
    registry.blob_path(graph.sha256).write_bytes(b"grXph")
    assert repair(registry).unusable == ["yard"]
    assert registry.versions("yard") == [] and not pointer(registry).exists()
    folder = registry.root / "environments" / "yard"
    assert len(list((folder / "versions.damaged-0").iterdir())) == 4


def test_publishing_a_damaged_file_again_mends_it(registry: Registry):
    blob = head_of(registry, 0)
    blob.write_bytes(b"hXad 0")
    registry.put_blob("head", b"head 0")
    assert blob.read_bytes() == b"head 0"


def test_leftovers_are_removed_and_what_is_named_stays(registry: Registry):
    named = sorted((registry.root / "blobs").iterdir())
    (registry.root / "blobs" / f".{'a' * 64}.x1y2").write_bytes(b"half")
    (registry.root / "environments" / "yard" / ".current.abc").write_bytes(b"")
    registry.put_blob("head", b"of a version that was never published")
    registry.materialise(registry.current("yard"), registry.root / RUNS_FOLDER / "killed" / "running")
    note = registry.root / RUNS_FOLDER / "somebody's note"
    note.write_text("kept")
    assert repair(registry) == Repairs(temporaries_removed=3, blobs_removed=1)
    assert list((registry.root / RUNS_FOLDER).iterdir()) == [note]
    assert sorted((registry.root / "blobs").iterdir()) == named


def pool_of(*labels: str) -> LabelPool:
    return LabelPool(labels, normalise(np.random.default_rng(2).standard_normal((len(labels), 8))), "fm")


def damage_pool_pointer(registry: Registry, name: str) -> None:
    (registry.root / "environments" / name / "pool.json").write_text("{}")


def test_a_pool_whose_pointer_is_damaged_is_found_among_the_blobs(registry: Registry, caplog):
    registry.set_pool("street", pool_of("bus"))
    registry.set_pool("yard", pool_of("cat", "dog", "owl"))
    damage_pool_pointer(registry, "yard")
    repairs = repair(registry)
    assert repairs.pools_found == {"yard": 3} and not repairs.unusable
    assert registry.pool("yard")[0].labels == ("cat", "dog", "owl") and registry.pool("street")[0].labels == ("bus",)
    assert "event=pool_found_again environment=yard labels=cat, dog, owl" in caplog.text
    assert repair(registry) == Repairs()


def test_of_two_lost_pools_only_the_one_that_a_version_learned_with_is_taken(registry: Registry):
    learned_with = registry.set_pool("yard", pool_of("cat", "dog", "owl"))
    running = registry.current("yard").model_copy(update={"pool_version": pool_of("cat", "dog", "owl").version})
    registry.publish(running.model_copy(update={"parent": 3}), {})
    registry.set_pool("street", pool_of("bus"))
    for name in ("street", "yard"):
        damage_pool_pointer(registry, name)
    repairs = repair(registry)
    assert repairs.unusable == ["street"] and repairs.pools_found == {"yard": 3} and repairs.blobs_removed == 0
    assert registry.pool("yard")[1] == learned_with


def test_a_damaged_pool_makes_the_environment_unusable_and_costs_no_blob(registry: Registry, caplog):
    registry.put_blob("head", b"of nothing")
    registry.blob_path(registry.pool("yard")[1].sha256).write_bytes(b"damaged")
    repairs = repair(registry)
    assert repairs.unusable == ["yard"] and repairs.blobs_removed == 0 and repairs.repointed == {}
    assert "event=pool_damaged environment=yard" in caplog.text


def test_a_disk_that_refuses_is_a_store_error(registry: Registry):
    (registry.root / "blobs" / "a folder where no folder should be").mkdir()
    with pytest.raises(StoreError, match="cannot repair the registry"):
        repair(registry)


def test_a_registration_that_was_cut_short_is_no_damage(registry: Registry):
    registry.set_pool("street", pool_of("cat"))
    assert repair(registry) == Repairs()
