"""The FM on the device itself: measured for real, and advised where it keeps the limits."""

from __future__ import annotations

import pytest
from edgefm.deploy.fm_cost import advise, measure_foundation_model
from edgefm.edge.profiler import ProfileOptions
from edgefm.models.device_profile import DEVICE_PROFILE_FORMAT, DeviceProfile, FoundationModelCost, Limits, StudentCost
from edgefm.models.errors import ConfigError

STUDENT = StudentCost(
    student="lite0-64", threads=1, preprocess_ms=0.5, session_p50_ms=2.0, session_p95_ms=3.0, peak_rss_mb=100.0
)
FM = FoundationModelCost(name="synclip", frame_p50_ms=20.0, frame_p95_ms=25.0, peak_rss_mb=900.0)


def profile(fm: FoundationModelCost | None) -> DeviceProfile:
    return DeviceProfile(
        format=DEVICE_PROFILE_FORMAT, source="a test", device="here", students=[STUDENT], foundation_model=fm
    )


def test_it_is_measured_and_kept_in_the_profile(tmp_path) -> None:
    cost = measure_foundation_model("synclip", ProfileOptions(frame_size=(96, 64), runs=5))
    assert cost.name == "synclip" and 0 < cost.frame_p50_ms <= cost.frame_p95_ms and cost.peak_rss_mb > 200
    profile(cost).save(tmp_path / "device.json")
    assert DeviceProfile.load(tmp_path / "device.json").foundation_model == cost
    with pytest.raises(ConfigError, match="clap"):
        measure_foundation_model("clap", ProfileOptions(runs=5))


@pytest.mark.parametrize(
    ("limits", "there"),
    [
        (Limits(), True),
        (Limits(latency_ms=25.0, memory_mb=900.0), True),
        (Limits(latency_ms=24.0), False),
        (Limits(memory_mb=899.0), False),
    ],
)
def test_the_device_runs_it_where_it_keeps_the_limits(limits: Limits, there: bool) -> None:
    advice = advise(profile(FM), limits)
    assert advice is not None and "25.0 ms a frame" in advice and ("--cloud 127.0.0.1" in advice) == there


def test_what_was_not_measured_is_not_advised() -> None:
    assert advise(profile(None), Limits()) is None
