"""`edgefm replay` as a user runs it: on plain files, with recorded arrivals, from a recording, and live over a real link."""

from __future__ import annotations

import json
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


def test_plain_files_at_recorded_times_and_then_without_the_images(images: Path, tmp_path: Path) -> None:
    times, recording, cloud = (tmp_path / name for name in ("times.txt", "seen.npz", "cloud.json"))
    times.write_text("".join(f"{second}\n" for second in (5.0, 5.5, 5.5, 7.0, 9.0)))
    link = ("--trace=constant:4", f"--arrivals={times}", "--seed=3")
    first = replay(
        images,
        tmp_path,
        "--labels=cat, coffee cup, rocket",
        *link,
        f"--record-to={recording}",
        f"--cloud-profile-to={cloud}",
    )
    assert first["virtual"]["samples"] == 5 and first["settings"]["arrivals"] == "times.txt"
    assert first["accuracy"]["fm"] == 1.0  # plain files have no truth: the FM's word stands for it
    assert first["settings"]["cloud"]["call"]["p50_ms"] > 0

    device = tmp_path / "device.json"
    cost = StudentCost(
        student="lite0-64", threads=1, preprocess_ms=0.5, session_p50_ms=2.0, session_p95_ms=2.0, peak_rss_mb=100.0
    )
    DeviceProfile(format=DEVICE_PROFILE_FORMAT, source="by hand", device="a test", students=[cost]).save(device)
    flags = (f"--device-profile={device}", f"--cloud-profile={cloud}")
    again = [replay(recording, tmp_path, *link, *flags) for _ in range(2)]
    assert again[0]["virtual"] == again[1]["virtual"] and again[0]["parts_ms"]["device"] >= 2.5


def test_a_recording_needs_profiles_and_plain_files_need_labels(images: Path, tmp_path: Path) -> None:
    recording = tmp_path / "seen.npz"
    replay(images, tmp_path, "--labels=cat, rocket", "--samples=4", f"--record-to={recording}")
    with pytest.raises(ConfigError, match="--device-profile"):
        replay(recording, tmp_path)
    for flag in ("--labels=cat", f"--record-to={tmp_path / 'more.npz'}", f"--cloud-profile-to={tmp_path / 'c.json'}"):
        with pytest.raises(ConfigError, match="need images"):
            replay(recording, tmp_path, flag)
    with pytest.raises(EdgeFMError, match="--labels"):
        replay(images, tmp_path)
    with pytest.raises(ConfigError, match="--live"):
        replay(images, tmp_path, "--labels=cat, rocket", "--reset-after-ms=500")


def test_live_beside_virtual(images: Path, tmp_path: Path) -> None:
    """Both are there, of the same frames; whether they agree says how idle this machine is, and exit code and result say it."""
    flags = ("--labels=cat, coffee cup, rocket", "--trace=constant:4", "--samples=40", "--rate=8", "--live")
    try:
        result = replay(images, tmp_path, *flags, "--reset-after-ms=2000")
        assert result["disagreements"] == []
    except EdgeFMError as error:
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["disagreements"] and result["disagreements"][0] in str(error)
    live = result["live"]
    assert live["samples"] == result["virtual"]["samples"] == 40
    assert live["cloud_share"] > 0 and live["mean_ms"] > 0 and result["live_parts_ms"]["network"] > 0
