"""Profiling real graphs, in processes of their own, from an agent's state and from an exported folder."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import pytest
from edgefm.edge.agent import Agent
from edgefm.edge.config import AgentConfig
from edgefm.edge.local_state import StateLock
from edgefm.edge.machine import peak_rss_mb, usable_cores
from edgefm.edge.profiler import ProfileOptions, find_students, measure_student, profile_students
from edgefm.models.errors import InputError, ModelError, StoreError

QUICK = ProfileOptions(threads=(1,), frame_size=(320, 240), runs=30)


@pytest.fixture(scope="module")
def state(cloud, tmp_path_factory) -> Path:
    """The state folder of an agent that has run."""
    folder = tmp_path_factory.mktemp("device")
    Agent(AgentConfig(cloud=cloud.target, environment="profiled", connect_timeout_s=60, state_dir=folder)).close()
    return folder


@pytest.fixture(scope="module")
def exported(state, tmp_path_factory) -> Path:
    """The same student as `edgefm students export` lays it out."""
    folder = tmp_path_factory.mktemp("students")
    shutil.copytree(find_students(state)["lite0-64"], folder / "lite0-64")
    return folder


def test_students_are_found_in_an_agent_s_state_and_in_an_exported_folder(state, exported):
    assert list(find_students(state)) == ["lite0-64"]
    assert find_students(exported) == {"lite0-64": exported / "lite0-64"}


def test_a_running_agent_s_files_are_left_alone(state):
    lock = StateLock(state)
    with pytest.raises(StoreError, match="another agent is using"):
        find_students(state)
    lock.release()


def test_a_folder_without_students(tmp_path):
    (tmp_path / "environments" / "yard").mkdir(parents=True)  # an agent that never reached its cloud
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="holds no student; make some with 'edgefm students export DIR'"):
            find_students(folder)


def test_a_state_that_lost_its_files_says_so(state, tmp_path):
    copy = tmp_path / "state"
    shutil.copytree(state, copy)
    for blob in (copy / "blobs").iterdir():
        blob.unlink()
    with pytest.raises(ModelError, match="the agent's state lacks the file"):
        find_students(copy)


def test_each_measurement_is_of_a_real_run(exported):
    said: list[str] = []
    options = ProfileOptions(threads=(1, 2), frame_size=(320, 240), runs=30)
    costs = profile_students(find_students(exported), options, said.append)
    assert said == ["lite0-64, 1 thread", "lite0-64, 2 threads"]
    assert [(cost.student, cost.threads) for cost in costs] == [("lite0-64", 1), ("lite0-64", 2)]
    for cost in costs:
        assert 0 < cost.session_p50_ms <= cost.session_p95_ms and cost.preprocess_ms > 0 and cost.load_ms
        assert cost.frame_ms == cost.preprocess_ms + cost.session_p95_ms
        # Python with numpy and onnxruntime takes some 60 MB, this process with torch far more.
        assert 40 < cost.peak_rss_mb < min(400, peak_rss_mb() or 400)
    assert not multiprocessing.active_children()


def test_a_slow_device_is_measured_with_fewer_frames(exported):
    impatient = ProfileOptions(frame_size=(320, 240), runs=1_000_000, patience_s=0.0)
    assert measure_student("lite0-64", exported / "lite0-64", 1, impatient).session_p95_ms > 0  # it ends


def test_a_graph_that_cannot_be_loaded_is_a_model_error(tmp_path):
    (tmp_path / "lite0-64").mkdir()
    (tmp_path / "lite0-64" / "student.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match=r"cannot load .*student\.onnx"):
        profile_students(find_students(tmp_path), QUICK, lambda _: None)


def test_threads_are_tried_up_to_all_cores():
    assert ProfileOptions(threads=(3,)).tried_threads == (3,)
    tried = ProfileOptions().tried_threads
    assert tried[0] == 1 and tried[-1] == usable_cores() and tried == tuple(sorted(set(tried)))
