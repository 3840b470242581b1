from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from edgefm.edge.local_state import LocalState, StateLock, own_device_id
from edgefm.models.confidence import Confidence
from edgefm.models.errors import CloudError, InputError, ModelError, StoreError
from edgefm.models.images import Preprocess
from edgefm.models.pool import LabelPool, normalise
from edgefm.models.versions import BlobRef, Calibration, StudentManifest

CHUNK = 1000
POOL = BlobRef.of("pool.npz", b"pool")


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
        confidence=Confidence(0.05),
        embedding_dim=8,
        foundation_model="test",
        pool_version="0" * 16,
        samples=0,
        agreement=None,
        parent_agreement=None,
        method="test",
        precision="float",
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
    with pytest.raises(CloudError, match=r"head\.bin ended early"):
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
        state.remember(manifest, POOL)
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
    manifest = manifest_of(7)
    state.remember(manifest, ref)
    again = LocalState(tmp_path / "state", "yard")
    assert again.last_good() == (manifest, ref)
    assert again.load_pool(ref, origin).labels == ("cat", "dog") and origin.asked == [0]
    assert LocalState(tmp_path / "state", "street").last_good() is None


@pytest.mark.parametrize(
    ("name", "text"),
    [("student.json", "{"), ("student.json", '{"format": 99}'), ("pool.json", "[]"), ("pool.json", "\0\0")],
)
def test_a_damaged_state_is_an_error_and_not_a_fresh_start(tmp_path, state, name, text):
    state.remember(manifest_of(1), POOL)
    assert state.last_good() is not None
    (tmp_path / "state" / "environments" / "yard" / name).write_text(text)
    with pytest.raises(ModelError) as damage:
        state.last_good()
    assert "\n" not in str(damage.value)
    state.remember(manifest_of(2), POOL)  # what the cloud sent takes its place
    assert state.last_good() == (manifest_of(2), POOL) and state.previous() is None


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path, state):
    leftovers = [
        tmp_path / "state" / ".device-id.x1y2",
        tmp_path / "state" / "environments" / "yard" / ".pool.json.x1y2",
    ]
    for path in leftovers:
        path.write_bytes(b"{")
    LocalState(tmp_path / "state", "yard")
    assert not any(path.exists() for path in leftovers)


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


@pytest.mark.parametrize("folder", ["blobs", "partial"])
def test_what_is_in_the_way_of_a_blob_is_a_store_error(tmp_path, state, folder):
    data = data_of(100)
    ref = BlobRef.of("head.bin", data)
    (tmp_path / "state" / folder / ref.sha256).mkdir()
    with pytest.raises(StoreError, match=f"cannot write .*{ref.sha256}"):
        state.blob(ref, Origin(data))


def test_a_state_that_can_be_neither_read_nor_deleted_is_a_store_error(tmp_path, state):
    state.remember(manifest_of(1), POOL)
    (tmp_path / "state" / "environments" / "yard" / "previous-student.json").mkdir()
    (tmp_path / "state" / "environments" / "yard" / "previous-pool.json").write_text("{}")
    with pytest.raises(StoreError, match="cannot read the state"):
        state.previous()
    with pytest.raises(StoreError, match=r"cannot write .*previous-student\.json"):
        state.go_back(manifest_of(1), POOL)


# ---- what is kept, and the way back


def keep(state: LocalState, version: int, origin: Origin, *blobs: bytes, dim: int = 8) -> StudentManifest:
    """A version with these files becomes the last good one, with a pool of its own size."""
    refs = [BlobRef.of(f"{number}.bin", data) for number, data in enumerate(blobs)]
    manifest = manifest_of(version, *refs).model_copy(
        update={"embedding_dim": dim, "created_at": f"2026-01-01T00:00:{version:02d}+00:00"}
    )
    pool = LabelPool(("cat", "dog"), np.eye(2, dim, dtype=np.float32), "test")
    ref = BlobRef.of("pool.npz", pool.to_bytes())
    for data in (*blobs, pool.to_bytes()):
        origin.blobs[BlobRef.of("x", data).sha256] = data
    state.student_folder(manifest, origin)
    state.load_pool(ref, origin)
    state.remember(manifest, ref)
    return manifest


def blobs_of(root) -> set[bytes]:
    return {path.read_bytes() for path in (root / "blobs").iterdir()}


def test_only_the_running_and_the_previous_version_s_blobs_are_kept(tmp_path, state):
    root, origin, graph = tmp_path / "state", Origin(), data_of(4000)
    heads = [data_of(500, seed) for seed in range(1, 6)]
    for version, head in enumerate(heads):
        keep(state, version, origin, graph, head)
        pools = {blob for blob in blobs_of(root) if blob.startswith(b"PK")}
        assert blobs_of(root) - pools == {graph, *heads[max(version - 1, 0) : version + 1]} and len(pools) == 1
    (root / "partial" / ("0" * 64)).write_bytes(b"broken off")
    last, _ = state.last_good() or pytest.fail("nothing remembered")
    state.remember(last, POOL)  # a new pool only: the download may be the next student's
    assert any((root / "partial").iterdir())
    keep(state, 9, origin, graph, data_of(500, 9))
    assert not any((root / "partial").iterdir())


def test_what_another_environment_runs_stays(tmp_path, state):
    origin, other = Origin(), LocalState(tmp_path / "state", "street")
    keep(other, 0, origin, data_of(300, 1))
    for version in range(3):
        keep(state, version, origin, data_of(300, 10 + version))
    assert data_of(300, 1) in blobs_of(tmp_path / "state")


def test_rolling_back_needs_no_network_and_holds_until_a_newer_version_comes(tmp_path, state):
    origin = Origin()
    first, second = (keep(state, version, origin, data_of(500, version)) for version in (1, 2))
    origin.blobs.clear()
    assert state.roll_back("it was worse") == (second, first)
    again = LocalState(tmp_path / "state", "yard")
    assert again.last_good() is not None and again.last_good()[0] == first
    older, newer = manifest_of(0), second.model_copy(update={"version": 3})
    afresh = first.model_copy(update={"created_at": "2026-02-02T00:00:00+00:00"})  # a cloud that counts from 0 again
    assert [again.refusals.refuses(m) for m in (older, second, newer, afresh)] == [True, True, False, False]
    (refusal,) = again.refusals.unreported()
    assert (refusal.kind, refusal.student_version, refusal.reason) == ("ROLLED_BACK", 2, "it was worse")
    again.refusals.unpin()
    assert [again.refusals.refuses(m) for m in (older, second)] == [False, True]
    with pytest.raises(InputError, match="no earlier student"):
        again.roll_back("further")


def test_rolling_back_to_a_damaged_version_changes_nothing(tmp_path, state):
    origin = Origin()
    _, second = (keep(state, version, origin, data_of(500, version)) for version in (1, 2))
    (tmp_path / "state" / "blobs" / BlobRef.of("x", data_of(500, 1)).sha256).write_bytes(b"rotten")
    with pytest.raises(ModelError, match="missing or damaged on this device"):
        state.roll_back("it was worse")
    assert state.last_good() is not None and state.last_good()[0] == second
    assert not state.refusals.refuses(second)


def test_rolling_back_takes_the_previous_pool_where_the_present_one_does_not_fit(state):
    origin = Origin()
    first = keep(state, 1, origin, data_of(500, 1), dim=8)
    before = state.last_good()
    keep(state, 2, origin, data_of(500, 2), dim=16)
    state.roll_back("it was worse")
    assert state.last_good() == before and before is not None and before[0] == first


def test_a_device_s_own_name_is_made_once(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    names = [own_device_id(tmp_path / folder) for folder in ("a", "b", "a", "b")]
    assert names[:2] == names[2:] and names[0] != names[1] and names[0].startswith("device-")
    (tmp_path / "a" / "device-id").write_bytes(b"")  # a power cut
    assert own_device_id(tmp_path / "a") not in ("", names[0])
    with pytest.raises(StoreError, match=r"cannot write .*device-id"):
        own_device_id(tmp_path / "nowhere" / ("x" * 300))


def test_a_state_folder_is_one_process_s(tmp_path):
    lock = StateLock(tmp_path / "state")
    with pytest.raises(StoreError, match=r"another agent is using the state folder .*; stop it"):
        StateLock(tmp_path / "state")
    lock.release()
    StateLock(tmp_path / "state").release()
