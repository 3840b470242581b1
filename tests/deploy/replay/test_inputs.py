"""Recordings, timings, arrivals, settings: what a replay is made of, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edgefm.deploy.replay import arrivals
from edgefm.deploy.replay.recording import Recording
from edgefm.deploy.replay.settings import Outcome, ReplaySettings, disagreements
from edgefm.deploy.replay.timing import BatchCost, CloudProfile, Timing
from edgefm.deploy.traces import constant_trace
from edgefm.models.errors import ConfigError, InputError

RECORDING = Recording([0.1, 0.2], [1.0, 0.5], [True, False], [True, True], [100, 200])


def test_a_recording_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "some.npz"
    RECORDING.save(path)
    again = Recording.load(path)
    for name, values in vars(RECORDING).items():
        assert np.array_equal(getattr(again, name), values), name


def test_a_recording_begins_again() -> None:
    assert list(RECORDING.repeated(5).size_bytes) == [100, 200, 100, 200, 100]
    assert list(RECORDING.with_payload(7).size_bytes) == [7, 7]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"text"])
def test_what_is_no_recording_says_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.npz"):
        Recording.load(path)


def test_a_recording_with_any_byte_changed_is_read_or_refused(tmp_path: Path) -> None:
    path, refused = tmp_path / "seen.npz", 0
    RECORDING.save(path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            Recording.load(path)
        except InputError:
            refused += 1
    assert refused > len(whole) / 2


def test_another_archive_is_no_recording(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, margins=np.zeros(3))
    with pytest.raises(InputError, match="no recording"):
        Recording.load(path)
    with pytest.raises(InputError, match="cannot read"):
        Recording.load(tmp_path / "missing.npz")


@pytest.mark.parametrize(
    "change",
    [{"margins": [0.1]}, {"margins": [np.nan, 0.2]}, {"size_bytes": [0, 1]}, {"agreements": [[1.0, 2.0]]}],
)
def test_a_recording_refuses_what_no_stream_gives(change: dict[str, list[float]]) -> None:
    with pytest.raises(InputError):
        Recording(**{**vars(RECORDING), **change})


def test_a_timing_has_the_two_quantiles_that_were_measured() -> None:
    drawn = Timing(10.0, 30.0).draw(np.random.default_rng(0), 200_000)
    assert np.percentile(drawn, 50) == pytest.approx(10.0, rel=0.01)
    assert np.percentile(drawn, 95) == pytest.approx(30.0, rel=0.02)
    assert drawn.mean() == pytest.approx(Timing(10.0, 30.0).mean_ms, rel=0.01)
    assert np.all(Timing(5.0, 5.0).draw(np.random.default_rng(0), 3) == 5.0)
    with pytest.raises(ConfigError):
        Timing(10.0, 9.0)


def profile(*costs: tuple[int, float]) -> CloudProfile:
    batches = tuple(BatchCost(size=size, p50_ms=ms, p95_ms=ms) for size, ms in costs)
    return CloudProfile(source="a test", foundation_model="none", batches=batches)


def test_a_cloud_profile_tells_every_batch(tmp_path: Path) -> None:
    measured = profile((1, 10.0), (3, 20.0))
    assert [measured.timing(size).p50_ms for size in (1, 2, 3, 6)] == pytest.approx([10.0, 15.0, 20.0, 40.0])
    measured.save(tmp_path / "cloud.json")
    assert CloudProfile.load(tmp_path / "cloud.json") == measured
    (tmp_path / "bad.json").write_text('{"source": "me"}')
    with pytest.raises(ConfigError, match="no cloud profile"):
        CloudProfile.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="ascending"):
        profile((3, 10.0), (1, 20.0))


def test_arrivals(tmp_path: Path) -> None:
    assert list(arrivals.fixed_rate(3, 4.0)) == [0.0, 250.0, 500.0]
    gaps = np.diff(arrivals.poisson(50_000, 5.0, seed=1))
    assert gaps.mean() == pytest.approx(200.0, rel=0.03) and gaps.std() == pytest.approx(200.0, rel=0.03)
    path = tmp_path / "times.txt"
    path.write_text("100.5\n101\n101\n103.25\n")
    assert list(arrivals.recorded(path)) == [0.0, 500.0, 500.0, 2750.0]
    for text, what in (("1\n0.5\n", "line 2.*sort"), ("1\nx\n", "line 2"), ("", "empty"), ("1\nnan\n", "line 2")):
        path.write_text(text)
        with pytest.raises(InputError, match=what):
            arrivals.recorded(path)
    with pytest.raises(ConfigError):
        arrivals.fixed_rate(3, 0.0)


def test_settings_refuse_what_cannot_be_replayed() -> None:
    link = constant_trace(1.0)
    for bad in ({"samples": 0}, {"rate": 0.0}, {"payload_bytes": 0}, {"propagation_ms": -1.0}, {"deadline_ms": 0.0}):
        with pytest.raises(ConfigError):
            ReplaySettings(link, link, **bad)  # pyright: ignore[reportArgumentType]


def outcome(mean_ms: float, p95_ms: float, edge_share: float) -> Outcome:
    return Outcome(100, mean_ms, 10.0, p95_ms, edge_share, 1 - edge_share, 0.0)


def test_live_and_virtual_agree_within_their_tolerances() -> None:
    live = outcome(100.0, 200.0, 0.5)
    assert disagreements(live, outcome(109.0, 181.0, 0.519)) == []
    found = disagreements(live, outcome(111.0, 170.0, 0.53))
    assert [text.split(":")[0] for text in found] == ["mean latency", "95th percentile of latency", "edge share"]
