"""`edgefm replay` as a user runs it: on plain files, with recorded arrivals, from a recording, and live over a real link."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from edgefm.deploy.camera import DAY, walk
from edgefm.deploy.cli import app
from edgefm.models.device_profile import DEVICE_PROFILE_FORMAT, DeviceProfile, StudentCost
from edgefm.models.errors import ConfigError, EdgeFMError
from typer.testing import CliRunner

FRAMES = 24


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, synclip) -> Path:
    """Plain files, with no label in their paths."""
    folder: Path = tmp_path_factory.mktemp("plain")
    for number, frame in enumerate(walk(DAY, 0, FRAMES)):
        (folder / f"{number:02d}.jpg").write_bytes(frame.image_bytes)
    return folder


def replay(source: Path, folder: Path, *flags: str) -> dict[str, Any]:
    """What it wrote; raises what it raised."""
    path = folder / "result.json"
    done = CliRunner().invoke(app, ["replay", str(source), "--student=lite0-64", f"--json={path}", *flags])
    if done.exception is not None:
        raise done.exception
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Seen:
    """A replay of plain files at recorded times, and what it wrote."""

    link: tuple[str, ...]
    result: dict[str, Any]
    recording: Path
    cloud: Path


@pytest.fixture(scope="module")
def seen(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("seen")
    times, recording, cloud = (folder / name for name in ("times.txt", "seen.npz", "cloud.json"))
    times.write_text("".join(f"{second}\n" for second in (5.0, 5.5, 5.5, 7.0, 9.0)))
    link = ("--trace=constant:4", f"--arrivals={times}", "--seed=3")
    flags = ("--labels=cat, coffee cup, rocket", f"--record-to={recording}", f"--cloud-profile-to={cloud}")
    return Seen(link, replay(images, folder, *link, *flags), recording, cloud)


def test_plain_files_at_recorded_times_and_then_without_the_images(seen: Seen, tmp_path: Path) -> None:
    first, device = seen.result, tmp_path / "device.json"
    assert first["virtual"]["samples"] == 5 and first["settings"]["arrivals"] == "times.txt"
    assert first["accuracy"]["fm"] == 1.0  # plain files have no truth: the FM's word stands for it
    assert first["settings"]["cloud"]["call"]["p50_ms"] > 0

    cost = StudentCost(
        student="lite0-64", threads=1, preprocess_ms=0.5, session_p50_ms=2.0, session_p95_ms=2.0, peak_rss_mb=100.0
    )
    DeviceProfile(format=DEVICE_PROFILE_FORMAT, source="by hand", device="a test", students=[cost]).save(device)
    flags = (f"--device-profile={device}", f"--cloud-profile={seen.cloud}")
    again = [replay(seen.recording, tmp_path, *seen.link, *flags) for _ in range(2)]
    assert again[0]["virtual"] == again[1]["virtual"] and again[0]["parts_ms"]["device"] >= 2.5


def test_a_recording_needs_profiles_and_plain_files_need_labels(images: Path, seen: Seen, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--device-profile"):
        replay(seen.recording, tmp_path)
    for flag in ("--labels=cat", f"--record-to={tmp_path / 'more.npz'}", f"--cloud-profile-to={tmp_path / 'c.json'}"):
        with pytest.raises(ConfigError, match="need images"):
            replay(seen.recording, tmp_path, flag)
    with pytest.raises(EdgeFMError, match="--labels"):
        replay(images, tmp_path)
    with pytest.raises(ConfigError, match="--live"):
        replay(images, tmp_path, "--labels=cat, rocket", "--reset-after-ms=500")


def test_live_beside_virtual(images: Path, seen: Seen, tmp_path: Path) -> None:
    """Both are there, of the same frames; whether they agree says how idle this machine is, and exit code and result say it."""
    flags = ("--labels=cat, coffee cup, rocket", "--trace=constant:4", "--samples=40", "--rate=8", "--live")
    try:
        result = replay(images, tmp_path, *flags, f"--cloud-profile={seen.cloud}", "--reset-after-ms=2000")
        assert result["disagreements"] == []
    except EdgeFMError as error:
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["disagreements"] and result["disagreements"][0] in str(error)
    live = result["live"]
    assert live["samples"] == result["virtual"]["samples"] == 40
    assert live["cloud_share"] > 0 and live["mean_ms"] > 0 and result["live_parts_ms"]["network"] > 0
