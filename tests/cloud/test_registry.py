from __future__ import annotations

import pytest
from edgefm.cloud.registry import Registry
from edgefm.models.errors import InputError, ModelError
from edgefm.models.images import Preprocess
from edgefm.models.versions import Calibration, StudentManifest


def _manifest(parent: int | None = None) -> StudentManifest:
    return StudentManifest(
        environment="yard",
        version=0,
        parent=parent,
        profile="lite0-64",
        preprocess=Preprocess(64),
        embedding_dim=8,
        foundation_model="fm",
        pool_version="p",
        samples=0,
        agreement=None,
        parent_agreement=None,
        method="test",
        calibration=Calibration(),
        files=[],
        created_at="2026-01-01T00:00:00+00:00",
    )


def test_versions_keep_what_they_share_and_roll_back(tmp_path):
    registry = Registry(tmp_path)
    first = registry.publish(_manifest(), {"graph": b"g", "head": b"h0"})
    second = registry.publish(first.model_copy(update={"parent": 0}), {"head": b"h1"})
    assert (first.version, second.version) == (0, 1)
    shared = {ref.name: ref.sha256 for ref in first.files}
    assert {ref.name for ref in second.files if shared[ref.name] == ref.sha256} == {"graph"}
    assert registry.current("yard") == second
    assert registry.rollback("yard").version == 0
    with pytest.raises(InputError, match="no parent"):
        registry.rollback("yard")
    with pytest.raises(InputError, match="there are: 0, 1"):
        registry.rollback("yard", 7)


def test_a_damaged_blob_is_noticed(tmp_path):
    registry = Registry(tmp_path)
    manifest = registry.publish(_manifest(), {"head": b"h0"})
    registry.blob_path(manifest.files[0].sha256).write_bytes(b"hX")
    with pytest.raises(ModelError, match="damaged"):
        registry.materialise(manifest, tmp_path / "out")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 65])
def test_names_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(InputError):
        Registry(tmp_path).versions(name)
