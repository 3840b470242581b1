"""The soak's accounts: what it calls lost, answered twice, stuck or broken. The soak itself takes minutes: `make soak`."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
from edgefm.cloud.registry import Registry
from edgefm.cloud.store import Labelled, NewSample, SampleStore, image_path
from edgefm.deploy.bench.soak import bench_soak
from edgefm.deploy.bench.soak_agent import AgentSpec, AnswerSeen, Leg, SoakAgent, Stream
from edgefm.deploy.bench.soak_checks import check_agent, check_store, check_uploads, read_logs
from edgefm.deploy.bench.soak_cloud import SoakLink
from edgefm.deploy.bench.soak_faults import Journal, Lane
from edgefm.deploy.bench.soak_memory import Memory
from edgefm.edge.spool import Spool
from edgefm.models.errors import ConfigError, EdgeFMError
from edgefm.models.pool import LabelPool
from rich.console import Console

DAMAGED = frozenset({2})


def _leg(*positions: int, route: str = "edge", **fields: object) -> Leg:
    answers = [AnswerSeen(position, route, "margin", 0, 100.0 + 0.2 * i) for i, position in enumerate(positions)]
    return Leg([0, 1, 2, 3, 4], answers, exit_code=0, **fields)


@pytest.fixture
def agent(tmp_path):
    """Not started; its frames are five files, and one sample waits in its spool."""
    frames = [tmp_path / f"{position:06d}.jpg" for position in range(5)]
    for position, path in enumerate(frames):
        path.write_bytes(b"frame %d" % position)
    memory = Memory()
    spec = AgentSpec("yard-1", "camera", "uncertain", Stream("yard", ("cat",), frames, DAMAGED))
    made = SoakAgent(spec, tmp_path, SoakLink(1, 1, 0), 1.0, 0, memory)
    made.state_dir.mkdir()
    spool = Spool(made.state_dir, 1000, 1e9)
    spool.add("yard", b"frame 0", 0.1, 1.0, time.time())
    spool.close()
    yield made
    memory.close()


def _summary(frames: int, left: int = 0) -> dict[str, object]:
    return {"frames": frames, "unreadable": 1, "uploads_left": left, "refused": [], "uploads_dropped": 0}


def test_a_leg_that_ran_to_its_end_answers_every_frame_but_the_damaged_ones(agent):
    agent.legs = [_leg(0, 1, 3, 4, summary=_summary(5))]
    assert check_agent(agent) == []
    agent.legs = [_leg(0, 1, 1, 4, summary=_summary(5))]
    assert check_agent(agent) == ["yard-1, leg 0: 1 frames lost", "yard-1, leg 0: 1 frames answered more than once"]


def test_a_leg_that_was_killed_may_have_had_frames_under_way_and_a_stopped_one_not(agent):
    agent.legs = [_leg(0, 3, killed_at_s=101.0), _leg(0, 1, 3, 4, summary=_summary(5))]
    agent.legs[0].exit_code = -9
    assert agent.legs[0].missing(DAMAGED) == 1  # of those before the last answered one; 4 comes again
    assert check_agent(agent) == []
    agent.legs[0].killed_at_s, agent.legs[0].stopped = None, True
    found = check_agent(agent)
    assert found == ["yard-1, leg 0: 1 frames lost", "yard-1, leg 0: it ended by itself with exit code -9"]


def test_an_agent_that_is_stuck_or_does_not_come_back_is_told(agent):
    agent.legs = [_leg(0, 1, 3, 4, route="fallback", summary=_summary(5, left=3))]
    agent.legs[0].answers[-1] = AnswerSeen(4, "fallback", "link", 0, 160.0)
    stuck, waiting, fallbacks = check_agent(agent)
    assert "no answer for 60 s" in stuck and "3 samples still wait" in waiting and "nothing but fallbacks" in fallbacks


def test_a_sample_that_is_neither_in_the_store_nor_in_the_spool_is_lost(agent, tmp_path):
    data_dir = tmp_path / "cloud"
    store = SampleStore(data_dir / "store")
    labelled = Labelled(np.zeros(4, np.float32), "cat", 0.1, "pool")
    store.add([NewSample("yard", b"frame 1", labelled, 1.0, "camera")])
    store.close()
    agent.legs = [_leg(0, 1, route="fallback", summary=_summary(3))]
    assert check_uploads([agent], data_dir) == (2, [])
    agent.legs = [_leg(0, 1, 3, route="fallback", summary=_summary(4))]
    assert check_uploads([agent], data_dir) == (3, ["yard-1: 1 of 3 samples never reached the cloud"])
    agent.disk_full = [(90.0, 110.0)]
    assert check_uploads([agent], data_dir) == (0, [])


def test_a_store_that_lost_an_image_or_kept_one_too_many_is_told(tmp_path):
    store = SampleStore(tmp_path / "store")
    labelled = Labelled(np.zeros(4, np.float32), "cat", 0.1, "pool")
    kept = store.add([NewSample("yard", b"image %d" % i, labelled, 1.0, "camera") for i in range(3)])
    store.close()
    assert check_store(tmp_path, {"yard"}) == []
    image_path(tmp_path / "store", kept[0].sha256).unlink()
    image_path(tmp_path / "store", kept[1].sha256).write_bytes(b"other")
    image_path(tmp_path / "store", kept[2].sha256).with_name("f" * 64).write_bytes(b"nobody's")
    missing, too_many, wrong = check_store(tmp_path, {"yard"})
    assert "1 stored samples without an image" in missing and "1 stored images without a sample" in too_many
    assert "1 stored images are not what their name says" in wrong


def test_an_environment_that_devices_visit_must_run_a_whole_version(tmp_path):
    SampleStore(tmp_path / "store").close()
    registry = Registry(tmp_path / "registry")
    pool = LabelPool(("cat",), np.ones((1, 1), np.float32), "fm")
    for environment in ("yard", "qard"):
        registry.set_pool(environment, pool)
    assert check_store(tmp_path, set()) == []
    (broken,) = check_store(tmp_path, {"yard"})
    assert "yard ends with a version that is not whole" in broken


def test_logs_are_counted_by_kind_and_a_traceback_is_a_broken_promise(tmp_path):
    log = tmp_path / "cloud-0.log"
    line = "time=2026-01-01T00:00:00.000+00:00 level={} logger=edgefm.cloud event={} reason=none\n"
    log.write_text(line.format("info", "serving") + line.format("warning", "unreadable") * 2)
    assert read_logs([log]) == ({"warning unreadable": 2}, [])
    log.write_text("Traceback (most recent call last):\nKeyError: 3\n")
    ((broken,), _) = read_logs([log])[::-1]
    assert "cloud-0.log has 1 tracebacks" in broken and "KeyError" in broken


def test_a_lane_does_every_fault_before_it_repeats_one_and_tells_of_what_does_not_recover():
    journal = Journal()
    lane_of: list[Lane] = []

    def third(rng: np.random.Generator) -> float:
        if len(journal.faults) >= 5:
            lane_of[0].end()
        raise EdgeFMError("does not come back")

    faults = {"first": lambda rng: 0.5, "second": lambda rng: None, "third": third}
    lane = Lane("cloud", faults, 0.001, (0, 1), journal)
    lane_of.append(lane)
    lane.start()
    lane.join(30)
    assert {fault for _, fault, _, _ in journal.faults[:3]} == faults.keys()
    assert journal.broken and "cloud, third, at" in journal.broken[0] and "does not come back" in journal.broken[0]


def test_memory_follows_a_process_through_its_lives():
    memory = Memory()
    try:
        command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline()  # it has its memory
            memory.watch("agent", child.pid)
            memory.forget("agent")
            memory.watch("agent", child.pid)
        memory.watch("gone", child.pid)
    finally:
        memory.close()
    (row,) = memory.report()
    assert row["process"] == "agent" and row["lives"] == 2 and row["peak_mb"] >= row["start_mb"] > 0


def test_a_soak_too_short_to_mean_anything_is_refused():
    with pytest.raises(ConfigError, match="half a minute"):
        bench_soak(0.1, 0, Console())
