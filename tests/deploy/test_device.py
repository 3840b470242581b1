"""From exported students to the one a device runs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from statistics import fmean

import onnxruntime as ort
import pytest
from edgefm.deploy.device import explain, limits_of, profile_device, with_selected_student
from edgefm.deploy.export import export_students
from edgefm.edge.config import AgentConfig
from edgefm.edge.profiler import ProfileOptions
from edgefm.models.device_profile import DeviceProfile, Limits
from edgefm.models.errors import ConfigError
from edgefm.models.selection import select_student
from edgefm.models.students import measured_accuracy
from rich.console import Console


@pytest.fixture(scope="module")
def exported(synclip, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("students")
    told: list[str] = []
    export_students(folder, synclip, ["lite0-64"], told.append)
    assert told == ["lite0-64"]
    return folder


@pytest.fixture(scope="module")
def profile(exported, tmp_path_factory) -> DeviceProfile:
    options = ProfileOptions(threads=(1,), frame_size=(320, 240), runs=30)
    return profile_device(exported, "", Limits(memory_mb=10_000), options, Console(file=io.StringIO()))


def test_what_is_exported_is_version_0_of_the_fm(exported, synclip):
    session = ort.InferenceSession(exported / "lite0-64" / "student.onnx")
    assert session.get_inputs()[0].shape[1:] == [3, 64, 64]
    assert session.get_outputs()[0].shape[1] == synclip.dim


def test_no_such_student(synclip, tmp_path):
    with pytest.raises(ConfigError, match="unknown student 'lite9'"):
        export_students(tmp_path, synclip, ["lite0-64", "lite9"], print)
    assert not list(tmp_path.iterdir())


def test_a_profile_says_on_what_it_was_measured(profile):
    machine = profile.machine
    assert profile.source.startswith("edgefm profile, 20") and profile.device == (
        machine["board"] or machine["processor"]
    )
    assert (machine["frame_size"], machine["runs"], machine["batch"]) == ([320, 240], 30, 1)
    for moment in ("before", "after"):
        assert set(machine[moment]) == {"temperature_c", "clock_share", "busy"}
    assert DeviceProfile.model_validate_json(profile.model_dump_json()) == profile


def test_the_table_explains_every_student(profile):
    out = io.StringIO()
    Console(file=out, width=120).print(explain(profile, select_student(profile, profile.limits)))
    text = out.getvalue()
    (cost,) = profile.students
    for part in (
        f"{profile.device}: any latency, 10000 MB",
        f"{cost.preprocess_ms:.2f} + {cost.session_p95_ms:.2f}",
        f"{fmean(one.customized for one in measured_accuracy(cost.student)):.3f}",
        "taken: the most accurate that fits",
        "not measured on this device",
        "edgefm bench students",
        profile.source,
    ):
        assert part in text, (part, text)


def test_limits_go_over_those_of_the_profile():
    given = Limits(latency_ms=5, memory_mb=200)
    assert limits_of(None, None, given) == given and limits_of(7.0, None, given) == Limits(latency_ms=7, memory_mb=200)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="latency_ms: "):
            limits_of(wrong, None)


def _write(path: Path, **limits: float) -> Path:
    cost = {"threads": 3, "preprocess_ms": 1, "session_p50_ms": 2, "session_p95_ms": 3, "peak_rss_mb": 150}
    slow = {**cost, "student": "lite0-160", "session_p95_ms": 30}
    students = [{**cost, "student": "lite0-96"}, {**cost, "student": "lite0-64", "threads": 1}, slow]
    path.write_text(json.dumps({"source": "by hand", "device": "gate", "students": students, "limits": limits}))
    return path


def test_auto_takes_the_student_and_its_threads(tmp_path):
    config = AgentConfig(student="auto", device_profile=_write(tmp_path / "device.json", latency_ms=10))
    selected = with_selected_student(config)
    assert (selected.student, selected.threads) == ("lite0-96", 3)
    named = AgentConfig(student="lite0-64", threads=2)
    assert with_selected_student(named) is named


def test_auto_that_fits_nothing_or_knows_nothing_is_refused(tmp_path):
    path = _write(tmp_path / "device.json", latency_ms=1)
    for config, says in (
        (AgentConfig(student="auto", device_profile=path), "no student fits 1 ms a frame, any memory on gate"),
        (AgentConfig(student="auto", device_profile=tmp_path / "none"), "cannot read the device profile"),
        (AgentConfig(student="auto"), "go together"),
        (AgentConfig(student="lite0-64", device_profile=path), "go together"),
    ):
        with pytest.raises(ConfigError, match=says):
            with_selected_student(config)
