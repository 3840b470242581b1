"""The device profile: what is written is read again, what is wrong is named, and the documented example holds."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from edgefm.models.device_profile import DeviceProfile, Limits, StudentCost
from edgefm.models.errors import ConfigError, StoreError

ROOT = Path(__file__).resolve().parents[2]
COST = {
    **{"student": "lite0-64", "threads": 2, "preprocess_ms": 1.0},
    **{"session_p50_ms": 2.0, "session_p95_ms": 3.0, "peak_rss_mb": 150},
}
PROFILE = {"source": "datasheet", "device": "gate", "students": [COST]}


def test_what_is_saved_is_loaded(tmp_path):
    profile = DeviceProfile(
        source="edgefm profile",
        device="gate",
        students=[StudentCost(**COST, load_ms=30.5)],  # pyright: ignore[reportArgumentType]
        limits=Limits(latency_ms=5),
        machine={"cores": 4, "board": None},
    )
    profile.save(tmp_path / "new" / "device.json")
    assert DeviceProfile.load(tmp_path / "new" / "device.json") == profile
    with pytest.raises(StoreError):
        profile.save(tmp_path / "new" / "device.json" / "below")


def test_a_frame_takes_preprocessing_and_the_slow_student():
    assert StudentCost.model_validate(COST).frame_ms == 4.0


def test_a_hand_written_file_needs_no_more_than_the_documented_example(tmp_path):
    page = (ROOT / "deploy" / "docs" / "students.md").read_text("utf-8")
    (example,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (tmp_path / "device.json").write_text(example)
    profile = DeviceProfile.load(tmp_path / "device.json")
    assert profile.limits == Limits(latency_ms=25, memory_mb=300) and profile.machine == {}
    for kind in (DeviceProfile, StudentCost, Limits):
        for name in kind.model_fields:
            assert re.search(rf"`[^`|]*\b{name}\b[^`|]*`", page), name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "format: .*this EdgeFM reads format 1"),
        ({"source": ""}, "source: "),
        ({"students": []}, "students: "),
        ({"spare": 1}, "spare: "),
        ({"limits": {"latency_ms": 0}}, r"limits\.latency_ms: "),
        ({"limits": {"latency_ms": math.nan}}, r"limits\.latency_ms: "),
        ({"limits": {"memory_mb": math.inf}}, r"limits\.memory_mb: "),
        ({"students": [COST | {"student": "lite9"}]}, r"students\.0\.student: .*there are lite0-64"),
        ({"students": [COST | {"threads": 0}]}, r"students\.0\.threads: "),
        ({"students": [COST | {"session_p95_ms": -1}]}, r"students\.0\.session_p95_ms: "),
        ({"students": [{k: v for k, v in COST.items() if k != "peak_rss_mb"}]}, r"students\.0\.peak_rss_mb: "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_named(tmp_path, change, says):
    path = tmp_path / "device.json"
    path.write_text(json.dumps(PROFILE))
    assert DeviceProfile.load(path).device == "gate"
    path.write_text(json.dumps(PROFILE | change))
    with pytest.raises(ConfigError, match=rf"device\.json is no device profile: {says}"):
        DeviceProfile.load(path)


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "text").write_text("no JSON")
    with pytest.raises(ConfigError, match="text is no device profile: file: "):
        DeviceProfile.load(tmp_path / "text")
    with pytest.raises(ConfigError, match=r"cannot read the device profile .*: No such file"):
        DeviceProfile.load(tmp_path / "none")
