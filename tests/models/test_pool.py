"""Recognition on a label pool, and the pool as a file."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from edgefm.models.errors import LabelError, ModelError, StoreError
from edgefm.models.pool import (
    MAX_DESCRIPTION_LENGTH,
    MAX_DESCRIPTIONS,
    UNKNOWN,
    LabelPool,
    check_descriptions,
    check_labels,
    normalise,
)


def _pool(floor: float = -1.0, count: int = 3) -> LabelPool:
    return LabelPool(("cat", "dog", "owl")[:count], np.eye(4, dtype=np.float32)[:count], "fm", floor)


def test_ranks_labels_with_margin():
    found = _pool().recognise(normalise(np.array([[0.1, 0.9, 0.3, 0.0], [0.5, 0.2, 0.1, 0.0]])), top_k=2)
    assert found.indices.tolist() == [[1, 2], [0, 1]]
    assert np.allclose(found.similarities[0], np.array([0.9, 0.3]) / np.sqrt(0.91))
    assert np.allclose(found.margins, found.similarities[:, 0] - found.similarities[:, 1])
    assert not found.unknown.any()


def test_the_margin_does_not_depend_on_how_many_labels_come_back():
    sample = normalise(np.array([[0.1, 0.9, 0.3, 0.0]]))
    one, many = _pool().recognise(sample, top_k=1), _pool().recognise(sample, top_k=99)
    assert one.indices.tolist() == [[1]] and many.indices.tolist() == [[1, 2, 0]]
    assert one.margins[0] == many.margins[0] > 0


def test_ranks_as_a_plain_sort_does():
    rng = np.random.default_rng(0)
    pool = LabelPool(tuple(f"label {i}" for i in range(50)), normalise(rng.normal(size=(50, 16))), "fm")
    samples = normalise(rng.normal(size=(40, 16)))
    found = pool.recognise(samples, top_k=5)
    for sample, indices, similarities in zip(samples, found.indices, found.similarities, strict=True):
        ranked = sorted(range(50), key=lambda i, s=sample: -float(s @ pool.embeddings[i]))[:5]
        assert indices.tolist() == ranked
        assert np.allclose(similarities, pool.embeddings[ranked] @ sample, atol=1e-6)


def test_equally_near_labels_have_no_margin_and_the_first_wins():
    found = _pool().recognise(normalise(np.array([[0.0, 1.0, 1.0, 0.0]])), top_k=1)
    assert found.indices.tolist() == [[1]] and found.margins[0] == 0


def test_unknown_below_the_floor_only():
    pool = _pool(floor=0.5)
    found = pool.recognise(normalise(np.array([[0.1, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.1]])))
    assert pool.answers(found) == [UNKNOWN, "dog"]


def test_without_a_floor_the_nearest_label_is_always_given():
    pool = _pool(floor=-1.0)
    assert pool.answers(pool.recognise(-np.ones((1, 4), np.float32) / 2)) == ["cat"]


@pytest.mark.parametrize(("count", "floor"), [(50, 0.5), (50, -1.0), (2, 0.1), (1, 0.2), (1, -1.0)])
def test_one_sample_is_answered_as_in_a_batch(count, floor):
    rng = np.random.default_rng(count)
    embeddings = normalise(rng.normal(size=(count, 16)))
    pool = LabelPool(tuple(f"label {i}" for i in range(count)), embeddings, "fm", floor)
    samples = np.vstack([normalise(rng.normal(size=(40, 16))), embeddings[:1]])
    found = pool.recognise(samples, top_k=1)
    assert (floor == -1.0) != (0 < found.unknown.sum() < len(samples))
    for place, (label, row) in enumerate(zip(pool.answers(found), samples, strict=True)):
        said, similarity, margin = pool.best(row)
        assert said == label
        assert (similarity, margin) == pytest.approx((found.similarities[place, 0], found.margins[place]), abs=1e-6)


def test_the_first_of_equally_near_labels_is_the_best():
    assert _pool().best(normalise(np.array([0.0, 1.0, 1.0, 0.0])))[::2] == (_pool().labels[1], 0.0)


def test_a_pool_of_one_measures_its_margin_from_the_floor():
    found = _pool(floor=0.2, count=1).recognise(np.eye(4, dtype=np.float32)[:1])
    assert found.margins[0] == pytest.approx(0.8)
    assert found.indices.shape == (1, 1)


def test_a_version_is_the_hash_of_the_content():
    pool = _pool(0.1)
    turned = pool.embeddings.copy()
    turned[0] = turned[0, ::-1]
    others = [
        replace(pool, labels=("cat", "dog", "fox")),
        replace(pool, labels=("dog", "cat", "owl")),
        replace(pool, embeddings=turned),
        replace(pool, foundation_model="another"),
        replace(pool, unknown_floor=0.2),
        replace(pool, temperature=0.2),
        _pool(0.1, count=2),
    ]
    assert len({pool.version, *(other.version for other in others)}) == 8
    assert _pool(0.1).version == pool.version == "4acda79655c80845"  # on every machine and in every release


def test_saved_pool_is_equal_and_equal_pools_have_equal_bytes(tmp_path):
    pool = replace(_pool(0.1), labels=("cat", "chien éveillé", "猫頭鷹"), warnings=("'猫頭鷹' is out of reach",))
    path = tmp_path / "a" / "pool.npz"
    pool.save(path)
    loaded = LabelPool.load(path)
    assert (loaded.labels, loaded.warnings, loaded.foundation_model, loaded.unknown_floor, loaded.version) == (
        pool.labels,
        pool.warnings,
        pool.foundation_model,
        pool.unknown_floor,
        pool.version,
    )
    assert np.array_equal(loaded.embeddings, pool.embeddings) and loaded.embeddings.dtype == np.float32
    loaded.save(tmp_path / "again.npz")
    assert path.read_bytes() == (tmp_path / "again.npz").read_bytes() == pool.to_bytes()


def test_a_pool_that_cannot_be_saved_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot write"):
        _pool().save(tmp_path / "file" / "pool.npz")


def test_a_missing_pool_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"none\.npz: No such file"):
        LabelPool.load(tmp_path / "none.npz")


def test_a_truncated_pool_is_refused_wherever_it_ends(tmp_path):
    path, data = tmp_path / "pool.npz", _pool().to_bytes()
    for cut in range(0, len(data), 13):
        path.write_bytes(data[:cut])
        with pytest.raises(ModelError, match=r"pool\.npz: not a label pool"):
            LabelPool.load(path)


def test_a_damaged_byte_is_refused_or_changes_nothing():
    data = _pool(0.1).to_bytes()
    refused = 0
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x41
        try:
            assert LabelPool.from_bytes(bytes(damaged)).to_bytes() == data
        except ModelError:
            refused += 1
    assert refused > len(data) / 2


def _npz(**replaced: np.ndarray | None) -> bytes:
    with np.load(io.BytesIO(_pool().to_bytes())) as file:
        arrays = {**file, **replaced}
    buffer = io.BytesIO()
    np.savez(buffer, **{name: array for name, array in arrays.items() if array is not None})
    return buffer.getvalue()


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.eye(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x05\x06" + bytes(18),
        _npy(),
        _npz(unknown_floor=None),
        _npz(embeddings=np.eye(2)),
        _npz(embeddings=np.zeros(3)),
        _npz(labels=np.array([], dtype=np.str_), embeddings=np.zeros((0, 4))),
        _npz(labels=np.array(["a", "b", None], dtype=object)),
    ],
    ids=["empty", "empty-zip", "npy", "a-field-less", "fewer-embeddings", "flat", "no-label", "pickled"],
)
def test_other_files_are_no_pools(data):
    with pytest.raises(ModelError, match="not a label pool"):
        LabelPool.from_bytes(data)


def test_a_pool_needs_labels_and_an_embedding_for_each():
    with pytest.raises(LabelError, match="at least one"):
        LabelPool((), np.zeros((0, 4), np.float32), "fm")
    with pytest.raises(ModelError, match="3 labels, but embeddings of shape"):
        LabelPool(("a", "b", "c"), np.eye(2, dtype=np.float32), "fm")


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        ([""], "non-empty"),
        (["cat", "  \t"], "non-empty"),
        (["a\0b"], "printable"),
        (["a\x1b[31mb"], "printable"),
        (["cat", "dog", " cat "], "given twice: cat"),
        (["red  fox", "red fox"], "given twice: red fox"),
        ([UNKNOWN], "choose another"),
        (["x" * 201], "at most 200 characters, got 201"),
    ],
)
def test_unusable_labels_are_refused(labels, why):
    with pytest.raises(LabelError, match=why):
        check_labels(labels)


def test_labels_are_tidied():
    assert check_labels([" cup  of\ncoffee ", "Éclair", "x" * 200]) == ("cup of coffee", "Éclair", "x" * 200)


def test_normalise_leaves_zero_at_zero():
    rows = normalise(np.array([[3.0, 4.0], [0.0, 0.0]]))
    assert np.allclose(rows, [[0.6, 0.8], [0, 0]]) and rows.dtype == np.float32


def test_unknown_as_a_label_wins_exactly_below_the_floor():
    pool = _pool(0.1)
    vectors = np.random.default_rng(3).standard_normal((50, pool.embeddings.shape[1])).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    recognition = pool.recognise(vectors, top_k=1)
    best = pool.with_unknown(vectors @ pool.embeddings.T).argmax(axis=1)
    assert ((best == len(pool.labels)) == recognition.unknown).all() and 0 < recognition.unknown.sum() < 50
    assert (best == recognition.indices[:, 0])[~recognition.unknown].all()


@pytest.mark.parametrize(
    "change",
    [{"embeddings": np.full((2, 3), np.nan, np.float32)}, {"embeddings": np.ones((2, 3), np.float32)}]
    + [{"temperature": value} for value in (0.0, np.nan)]
    + [{"unknown_floor": np.inf}],
)
def test_a_file_with_impossible_numbers_is_no_pool(change):
    whole = {"labels": ("a", "b"), "embeddings": np.eye(2, 3, dtype=np.float32), "foundation_model": "fm"}
    assert LabelPool.from_bytes(LabelPool(**whole).to_bytes()).labels == ("a", "b")
    with pytest.raises(ModelError, match="not a label pool"):
        LabelPool.from_bytes(LabelPool(**whole | change).to_bytes())


def test_a_file_that_grows_when_it_is_unpacked_is_no_pool():
    buffer = io.BytesIO()
    np.savez_compressed(buffer, embeddings=np.zeros((10_000, 1000), np.float32))
    assert len(buffer.getvalue()) < 100_000
    with pytest.raises(ModelError, match="grow"):
        LabelPool.from_bytes(buffer.getvalue())


# ---- descriptions

DESCRIBED = {"owl": ("A bird with a flat face.", "Большие глаза"), "cat": ("A small predator.",)}


def test_descriptions_are_kept_with_the_pool_and_are_no_part_of_its_version():
    pool = replace(_pool(0.1), descriptions=DESCRIBED)
    loaded = LabelPool.from_bytes(pool.to_bytes())
    assert loaded.descriptions == DESCRIBED and loaded.version == pool.version == _pool(0.1).version
    assert loaded.to_bytes() == pool.to_bytes()


def test_a_pool_without_descriptions_is_the_file_that_it_always_was():
    with np.load(io.BytesIO(_pool().to_bytes())) as file:
        assert set(file) == {"labels", "embeddings", "foundation_model", "unknown_floor", "temperature", "warnings"}
    assert LabelPool.from_bytes(_pool().to_bytes()).descriptions == {}


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b'{"cat": 3}', b'{"cat": [3]}', b'{"cat": [""]}', b'{"cat": ["a\\u0000b"]}', b"\xff"]
)
def test_a_file_with_impossible_descriptions_is_no_pool(text):
    with pytest.raises(ModelError, match="not a label pool"):
        LabelPool.from_bytes(_npz(descriptions=np.frombuffer(text, np.uint8)))


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ([" "], "non-empty printable text, got '' for 'cat'"),
        (["a\x1b[31mb"], "printable"),
        (["x" * (MAX_DESCRIPTION_LENGTH + 1)], f"at most {MAX_DESCRIPTION_LENGTH} characters, got 301 for 'cat'"),
        ([str(i) for i in range(MAX_DESCRIPTIONS + 1)], f"at most {MAX_DESCRIPTIONS} descriptions, got 17 for 'cat'"),
    ],
)
def test_unusable_descriptions_are_refused(texts, why):
    with pytest.raises(LabelError, match=why):
        check_descriptions("cat", texts)


def test_descriptions_are_tidied():
    assert check_descriptions("cat", [" a  b\nc", "a b c", "d"]) == ("a b c", "d")
