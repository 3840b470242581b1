from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from edgefm.edge.local_state import LocalState
from edgefm.models.errors import CloudError, ModelError, StoreError
from edgefm.models.images import Preprocess
from edgefm.models.pool import LabelPool, normalise
from edgefm.models.versions import BlobRef, Calibration, StudentManifest

CHUNK = 1000


class Origin:
    """Serves blobs by content as the cloud does; remembers the offsets it was asked for; breaks when told to."""

    def __init__(self, *blobs: bytes) -> None:
        self.blobs = {BlobRef.of("x", data).sha256: data for data in blobs}
        self.asked: list[int] = []
        self.break_after: int | None = None

    def __call__(self, sha256: str, offset: int) -> Iterator[bytes]:
        self.asked.append(offset)
        data = self.blobs[sha256]
        for start in range(offset, len(data), CHUNK):
            if self.break_after is not None and start - offset >= self.break_after:
                raise CloudError("download: the cloud cannot be reached")
            yield data[start : start + CHUNK]


def data_of(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def manifest_of(version: int, *refs: BlobRef) -> StudentManifest:
    return StudentManifest(
        environment="yard",
        version=version,
        parent=None,
        profile="lite0-64",
        preprocess=Preprocess(64),
        temperature=0.05,
        embedding_dim=8,
        foundation_model="test",
        pool_version="0" * 16,
        samples=0,
        agreement=None,
        parent_agreement=None,
        method="test",
        calibration=Calibration(margins=[0.25], agreements=[True], propensities=[0.02]),
        files=list(refs),
        created_at="2026-01-01T00:00:00+00:00",
    )


@pytest.fixture
def state(tmp_path) -> LocalState:
    return LocalState(tmp_path / "state", "yard")


def test_a_broken_download_goes_on_where_it_stopped(tmp_path, state):
    data = data_of(10_500)
    ref, origin = BlobRef.of("head.bin", data), Origin(data)
    origin.break_after = 4000
    with pytest.raises(CloudError):
        state.blob(ref, origin)
    with pytest.raises(CloudError):  # also in a later life of the device
        LocalState(tmp_path / "state", "yard").blob(ref, origin)
    origin.break_after = None
    path = state.blob(ref, origin)
    assert origin.asked == [0, 4000, 8000] and path.read_bytes() == data
    assert state.blob(ref, origin) == path and len(origin.asked) == 3  # there: nobody is asked
    assert not any((tmp_path / "state" / "partial").iterdir())


def test_a_download_that_was_complete_but_not_yet_moved_is_not_repeated(tmp_path, state):
    data = data_of(3000)
    ref, origin = BlobRef.of("head.bin", data), Origin(data)
    (tmp_path / "state" / "partial" / ref.sha256).write_bytes(data)
    assert state.blob(ref, origin).read_bytes() == data and origin.asked == []


def test_what_ends_early_is_kept_for_the_next_time(state):
    data = data_of(5000)
    ref, origin = BlobRef.of("head.bin", data), Origin(data)
    short = Origin()
    short.blobs[ref.sha256] = data[:2000]
    with pytest.raises(ModelError, match=r"head\.bin ended early"):
        state.blob(ref, short)
    assert state.blob(ref, origin).read_bytes() == data and origin.asked == [2000]


@pytest.mark.parametrize("wrong", [data_of(5000, seed=1), data_of(9000, seed=1)], ids=["other bytes", "too long"])
def test_what_is_not_as_promised_is_thrown_away_and_fetched_afresh(state, wrong):
    data = data_of(5000)
    ref, origin = BlobRef.of("head.bin", data), Origin(data)
    liar = Origin()
    liar.blobs[ref.sha256] = wrong
    with pytest.raises(ModelError, match="is damaged"):
        state.blob(ref, liar)
    assert state.blob(ref, origin).read_bytes() == data and origin.asked == [0]


def test_a_longer_leftover_is_not_taken_for_a_part(tmp_path, state):
    data = data_of(5000)
    ref, origin = BlobRef.of("head.bin", data), Origin(data)
    (tmp_path / "state" / "partial" / ref.sha256).write_bytes(data + b"more")
    assert state.blob(ref, origin).read_bytes() == data and origin.asked == [0]


def test_a_blob_that_rots_on_the_disk_is_fetched_again(state):
    data = data_of(5000)
    ref, origin = BlobRef.of("head.bin", data), Origin(data)
    path = state.blob(ref, origin)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert state.blob(ref, origin).read_bytes() == data and origin.asked == [0, 0]


def test_a_student_s_files_lie_side_by_side_and_versions_share_blobs(tmp_path, state):
    graph, heads = data_of(4000, 1), (data_of(500, 2), data_of(500, 3))
    origin = Origin(graph, *heads)
    for version, head in enumerate(heads):
        manifest = manifest_of(version, BlobRef.of("student.onnx", graph), BlobRef.of("head.bin", head))
        folder = state.student_folder(manifest, origin)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"student.onnx": graph, "head.bin": head}
        state.remember_student(manifest)
    assert len(origin.asked) == 3  # the graph once
    environment = tmp_path / "state" / "environments" / "yard"
    assert [path.name for path in environment.glob("student-*")] == ["student-000001"]


def test_the_last_good_state_comes_back_and_is_each_environment_s_own(tmp_path, state):
    assert state.last_good() is None
    rng = np.random.default_rng(0)
    pool = LabelPool(("cat", "dog"), normalise(rng.standard_normal((2, 8))), "test")
    ref = BlobRef.of("pool.npz", pool.to_bytes())
    origin = Origin(pool.to_bytes())
    assert state.load_pool(ref, origin).version == pool.version
    state.remember_pool(ref)
    assert state.last_good() is None  # a pool alone is no state
    manifest = manifest_of(7)
    state.remember_student(manifest)
    again = LocalState(tmp_path / "state", "yard")
    assert again.last_good() == (manifest, ref)
    assert again.load_pool(ref, origin).labels == ("cat", "dog") and origin.asked == [0]
    assert LocalState(tmp_path / "state", "street").last_good() is None


@pytest.mark.parametrize(
    ("name", "text"),
    [("student.json", "{"), ("student.json", '{"format": 99}'), ("pool.json", "[]"), ("pool.json", "\0\0")],
)
def test_a_damaged_state_is_an_error_and_not_a_fresh_start(tmp_path, state, name, text):
    state.remember_student(manifest_of(1))
    state.remember_pool(BlobRef.of("pool.npz", b"pool"))
    assert state.last_good() is not None
    (tmp_path / "state" / "environments" / "yard" / name).write_text(text)
    with pytest.raises(ModelError):
        state.last_good()


def test_a_state_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot open the state folder .*file/state"):
        LocalState(tmp_path / "file" / "state", "yard")


def test_a_disk_that_refuses_is_a_store_error(tmp_path, state):
    data = data_of(100)
    ref = BlobRef.of("head.bin", data)
    (tmp_path / "state" / "partial").rmdir()
    with pytest.raises(StoreError, match="cannot write"):
        state.blob(ref, Origin(data))
    (tmp_path / "state" / "partial").mkdir()
    (tmp_path / "state" / "environments" / "yard" / "student-000000").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write"):
        state.student_folder(manifest_of(0, ref), Origin(data))
