"""Selection on hand-made profiles: each limit, each reason, and the accuracies of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from edgefm.models.device_profile import DeviceProfile, Limits, StudentCost
from edgefm.models.errors import ConfigError
from edgefm.models.selection import select_student
from edgefm.models.students import INT8_SUFFIX, PROFILES, measured_accuracy

ROOT = Path(__file__).resolve().parents[2]


def _cost(student: str, frame_ms: float, memory_mb: float, threads: int = 1) -> StudentCost:
    return StudentCost(
        student=student,
        threads=threads,
        preprocess_ms=1.0,
        session_p50_ms=(frame_ms - 1.0) / 2,
        session_p95_ms=frame_ms - 1.0,
        peak_rss_mb=memory_mb,
    )


def _device(*costs: StudentCost) -> DeviceProfile:
    return DeviceProfile(source="by hand", device="gate", students=list(costs))


DEVICE = _device(
    _cost("lite0-64", 5, 150),
    _cost("lite0-64", 3, 155, threads=4),
    _cost("lite0-96", 8, 160),
    _cost("lite0-96", 4, 240, threads=4),
    _cost("lite0-160", 20, 170),
)


@pytest.mark.parametrize(
    ("limits", "taken"),
    [
        (Limits(), ("lite0-160", 1)),
        (Limits(latency_ms=20), ("lite0-160", 1)),
        (Limits(latency_ms=19.9), ("lite0-96", 4)),
        (Limits(latency_ms=19.9, memory_mb=239), ("lite0-96", 1)),  # with fewer threads, slower and smaller
        (Limits(latency_ms=7, memory_mb=239), ("lite0-64", 4)),
        (Limits(latency_ms=7, memory_mb=154), ("lite0-64", 1)),
        (Limits(memory_mb=150), ("lite0-64", 1)),
        (Limits(memory_mb=149), None),
        (Limits(latency_ms=2.9), None),
    ],
    ids=str,
)
def test_the_most_accurate_that_keeps_both_limits(limits, taken):
    selection = select_student(DEVICE, limits)
    assert (selection.taken and (selection.taken.student, selection.taken.threads)) == taken
    assert [verdict.student for verdict in selection.verdicts] == list(PROFILES)
    assert sum(verdict.reason.startswith("taken") for verdict in selection.verdicts) == (taken is not None)


def test_every_verdict_says_why():
    selection = select_student(DEVICE, Limits(latency_ms=7, memory_mb=165))
    reasons = {verdict.student: verdict.reason for verdict in selection.verdicts}
    assert reasons == dict.fromkeys(PROFILES, "not measured on this device") | {
        "lite0-64": "taken: the most accurate that fits",
        "lite0-96": "too slow: 8.00 ms of 7",
        "lite0-160": "too large: 170 MB of 165",
    }
    unlimited = select_student(DEVICE, Limits())
    assert unlimited.verdicts[0].reason == "fits; lite0-160 is more accurate"


def test_none_that_fits_is_an_error_with_every_reason():
    selection = select_student(DEVICE, Limits(latency_ms=2))
    with pytest.raises(
        ConfigError, match=r"no student fits 2 ms a frame, any memory on gate: lite0-64: too slow: 3.00"
    ):
        selection.require("gate")


def test_accuracies_are_those_of_the_benchmark_s_results():
    files = sorted((ROOT / "models").glob("students-*.json"))
    assert len(files) >= 2
    for file in files:
        result = json.loads(file.read_bytes())
        for row in result["students"]:
            (found,) = [one for one in measured_accuracy(row["student"]) if one.data == result["data"]]
            assert (found.version0, found.customized) == (row["version0_accuracy"], row["accuracy"])
    assert all(len(measured_accuracy(name)) == len(files) for name in PROFILES)
    assert measured_accuracy("lite9") == ()


def test_the_page_of_students_has_the_same_accuracies():
    page = (ROOT / "deploy" / "docs" / "students.md").read_text("utf-8")
    for name in PROFILES:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        for one in measured_accuracy(name):
            assert f"{one.version0:.3f} → {one.customized:.3f}" in row, (name, one)


def test_a_quantised_student_is_taken_only_where_it_is_faster_than_itself_in_float():
    accurate = max((name for name in PROFILES if PROFILES[name].int8), key=lambda n: measured_accuracy(n)[0].customized)
    in_float = accurate.removesuffix(INT8_SUFFIX)
    limits = Limits(latency_ms=10)
    faster = _device(_cost(in_float, 12, 150), _cost(accurate, 6, 150), _cost("lite0-64", 3, 150))
    taken = select_student(faster, limits).taken
    assert taken is not None and taken.student == accurate
    slower = _device(_cost(in_float, 8, 150), _cost(accurate, 9, 150), _cost("lite0-64", 3, 150))
    selection = select_student(slower, limits)
    assert selection.taken is not None and selection.taken.student == in_float
    (verdict,) = [verdict for verdict in selection.verdicts if verdict.student == accurate]
    assert verdict.reason == f"no faster here than {in_float}: 8.00 ms"
