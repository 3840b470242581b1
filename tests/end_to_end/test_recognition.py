"""Two processes and a real link: a cloud, an agent, labels changed while it runs, the cloud killed in mid-run."""

from __future__ import annotations

import signal
import threading
import time

import pytest
from edgefm.deploy.camera import DAY, PHOTOGRAPHS, walk
from edgefm.edge.agent import Agent
from edgefm.edge.config import AgentConfig
from edgefm.edge.frames import Frame
from edgefm.edge.operator import Operator
from edgefm.edge.records import Answer
from edgefm.models.errors import CloudError

LABELS = tuple(sorted({photograph.label for photograph in PHOTOGRAPHS}))


def _config(target: str, tmp_path, **settings) -> AgentConfig:
    return AgentConfig(
        cloud=target,
        environment="yard",
        labels=LABELS[:-1],
        state_dir=tmp_path / "agent",
        student="lite0-64",
        **settings,
    )


def test_recognises_takes_a_new_label_and_survives_the_clouds_death(start_cloud, tmp_path):
    cloud = start_cloud()
    frames = [Frame(f"{i:03d}", f.image_bytes) for i, f in enumerate(walk(DAY, 0, 120))]
    frames[5] = Frame("broken", b"no image")
    answers: list[Answer] = []

    def stream():
        yield from frames[:40]
        with Operator(cloud.target) as operator:
            assert LABELS[-1] in operator.add_labels("yard", [LABELS[-1]]).labels
        deadline = time.monotonic() + 60
        pool = agent._running.pool.version
        while agent._updater._ready is None and agent._running.pool.version == pool:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield from frames[40:80]
        cloud.stop(signal.SIGKILL)
        yield from frames[80:]

    with Agent(_config(cloud.target, tmp_path, deadline_ms=2000, fps=40, connect_timeout_s=60)) as agent:
        summary = agent.run(stream(), answers.append)
        assert agent._running.pool.labels[-1] == LABELS[-1]
    assert summary.unreadable == 1 and len(answers) == summary.frames - 1 == 119
    assert len({answer.sample_id for answer in answers}) == 119
    assert summary.cloud > 50 and {a.reason for a in answers if a.route == "cloud"} == {"cold-start"}
    after = [answer for answer in answers if answer.sample_id >= "080"]
    assert {answer.route for answer in after} == {"fallback"}
    assert not any(thread.name == "query-deadlines" for thread in threading.enumerate())

    answers.clear()  # with no cloud at all the device starts from what it ran last
    with Agent(_config(cloud.target, tmp_path, connect_timeout_s=1.0)) as agent:
        agent.run(iter(frames[:3]), answers.append)
    assert [answer.route for answer in answers] == ["fallback"] * 3
    with pytest.raises(CloudError, match="no student to start from"):
        Agent(_config(cloud.target, tmp_path / "fresh", connect_timeout_s=1.0))


def test_ctrl_c_ends_the_cloud_cleanly(start_cloud):
    assert start_cloud().stop(signal.SIGINT) == 0
