from __future__ import annotations

import numpy as np
import pytest
from edgefm.models.errors import LabelError, ModelError
from edgefm.models.pool import UNKNOWN, LabelPool, check_labels, normalise


def _pool(floor: float = -1.0, count: int = 3) -> LabelPool:
    return LabelPool(("cat", "dog", "owl")[:count], np.eye(4, dtype=np.float32)[:count], "fm", floor)


def test_ranks_labels_with_margin():
    found = _pool().recognise(normalise(np.array([[0.1, 0.9, 0.3, 0.0]])), top_k=2)
    assert found.indices.tolist() == [[1, 2]]
    assert found.margins[0] == pytest.approx(found.similarities[0, 0] - found.similarities[0, 1])


def test_unknown_below_the_floor_only():
    pool = _pool(floor=0.5)
    found = pool.recognise(normalise(np.array([[0.1, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.1]])))
    assert pool.answers(found) == [UNKNOWN, "dog"]


def test_a_pool_of_one_measures_its_margin_from_the_floor():
    found = _pool(floor=0.2, count=1).recognise(np.eye(4, dtype=np.float32)[:1])
    assert found.margins[0] == pytest.approx(0.8)


def test_saved_pool_is_equal_and_equal_pools_have_equal_bytes(tmp_path):
    pool = _pool(0.1)
    pool.save(tmp_path / "pool.npz")
    loaded = LabelPool.load(tmp_path / "pool.npz")
    assert loaded.version == pool.version and loaded.labels == pool.labels
    assert loaded.to_bytes() == pool.to_bytes()
    assert _pool(0.2).version != pool.version


@pytest.mark.parametrize("cut", [0, 10, 400])
def test_a_damaged_pool_is_refused(tmp_path, cut):
    path = tmp_path / "pool.npz"
    path.write_bytes(_pool().to_bytes()[:cut])
    with pytest.raises(ModelError, match=r"pool\.npz"):
        LabelPool.load(path)


@pytest.mark.parametrize("labels", [[""], ["a", " a "], [UNKNOWN], ["x" * 201], ["a\0b"]])
def test_unusable_labels_are_refused(labels):
    with pytest.raises(LabelError):
        check_labels(labels)
