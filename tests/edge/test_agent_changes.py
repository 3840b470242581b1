"""What changes under a running device: labels, students, and a cloud that goes away. Every frame is still answered once."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from edgefm.cloud import environments
from edgefm.edge.agent import Agent
from edgefm.edge.frames import Frame
from edgefm.edge.operator import Operator
from edgefm.edge.records import Answer
from edgefm.models.confidence import PRIOR_SHARE, Confidence
from edgefm.models.errors import CloudError, InputError, ModelError
from edgefm.models.versions import GRAPH_FILE, Calibration
from PIL import Image

from .conftest import LOCAL

# ---- labels and students


def test_an_added_label_is_swapped_in_between_two_frames(cloud, configure, frames, until, check_complete):
    stream = frames(60)

    def source() -> Iterator[Frame]:
        yield from stream[:20]
        with Operator(cloud.target) as operator:
            operator.add_labels("growing", ["kettle"])
        until(lambda: agent._updater._ready is not None)
        yield from stream[20:]

    answers: list[Answer] = []
    with Agent(configure("growing", switcher=LOCAL)) as agent:
        before = agent._running
        summary = agent.run(source(), answers.append)
        assert agent._running.pool.labels == (*before.pool.labels, "kettle")
        assert agent._running.student is before.student
    check_complete(summary, answers, stream)
    assert [answer.pool_version for answer in answers] == [before.pool.version] * 20 + [
        agent._running.pool.version
    ] * 40
    assert summary.swaps == 0  # of students


def test_rollback_swaps_the_student_and_a_corrupt_version_is_refused(
    cloud, configure, frames, until, caplog, run, check_complete
):
    stream = frames(60)
    config = configure("versions", switcher=LOCAL)
    run(config, stream[:2])  # registers
    good, bad = cloud.publish_successor("versions"), cloud.publish_successor("versions")
    ref = next(ref for ref in bad.files if ref not in good.files)
    cloud.registry.blob_path(ref.sha256).write_bytes(bytes(ref.size_bytes))

    def source() -> Iterator[Frame]:
        with Operator(cloud.target) as operator:
            yield from stream[:15]
            operator.rollback("versions", good.version)
            until(lambda: agent._updater._ready is not None)
            yield from stream[15:30]
            cloud.announce(bad)
            until(lambda: agent._updater.refused)
            yield from stream[30:45]
            assert operator.rollback("versions", 0) == 0
            until(lambda: agent._updater._ready is not None)
            yield from stream[45:]

    answers: list[Answer] = []
    with caplog.at_level(logging.ERROR), Agent(config) as agent:
        summary = agent.run(source(), answers.append)
    check_complete(summary, answers, stream)
    assert [answer.student_version for answer in answers] == [0] * 15 + [1] * 30 + [0] * 15
    assert summary.swaps == 2
    assert len(summary.refused) == 1 and "is damaged" in summary.refused[0]
    assert "event=refused" in caplog.text


def test_what_was_measured_with_another_pool_counts_no_more(cloud, configure, until):
    """Neither at a swap nor at a start: after a label was added, the version's calibration speaks of the old pool."""
    with Agent(configure("calibrated")) as agent:
        pool = agent._running.pool.version
    manifest = cloud.registry.current("calibrated")
    calibration = Calibration(margins=[0.1] * 300, agreements=[True] * 300, propensities=[1.0] * 300)
    learnt = {"parent": 0, "calibration": calibration, "confidence": Confidence(0.05, share=0.5)}
    learned = cloud.registry.publish(manifest.model_copy(update=learnt), {})
    with Operator(cloud.target) as operator:
        operator.rollback("calibrated", learned.version)
        with Agent(configure("calibrated")) as agent:
            assert agent._running.student.manifest == learned and agent._running.pool.version == pool
            assert agent._router.switcher._evidence._prior.shape == (3, 300)
            assert agent._running.confidence == learned.confidence
        operator.add_labels("calibrated", ["kettle"])
    with Agent(configure("calibrated")) as agent:
        assert agent._running.pool.version != pool == agent._running.student.manifest.pool_version
        assert agent._router.switcher._evidence._prior.shape == (3, 0)
        assert agent._running.confidence == Confidence(0.05, PRIOR_SHARE)  # nor is it judged on these labels


def test_a_student_that_fails_on_a_frame_is_gone_back_from_and_the_frame_answered(
    cloud, configure, frames, failing_on, until, run, check_complete
):
    """It has passed all tests: the frames that it fails on come later."""
    stream = frames(30)
    bright = Image.new("RGB", (64, 64), (250, 250, 250))
    stream[20] = Frame("020", bright)
    config = configure("failing", switcher=LOCAL)
    run(config, stream[:2])
    bad = cloud.publish("failing", {GRAPH_FILE: failing_on(cloud.graph("failing"), 0.9)})

    def source() -> Iterator[Frame]:
        yield from stream[:10]
        with Operator(cloud.target) as operator:
            operator.rollback("failing", bad.version)
        until(lambda: agent._updater._ready is not None)
        yield from stream[10:]

    answers: list[Answer] = []
    with Agent(config) as agent:
        summary = agent.run(source(), answers.append)
        until(lambda: not agent._updater._state.refusals.unreported())
    check_complete(summary, answers, stream)
    assert [answer.student_version for answer in answers] == [0] * 10 + [1] * 10 + [0] * 10
    assert summary.refused[0].startswith("student version 1: failed: the model failed") and summary.swaps == 2
    with Agent(config) as agent:  # nor in a later life, though the cloud still offers it
        assert agent._running.student.manifest.version == 0 and agent._updater.refused == []


def test_a_student_that_fails_with_none_before_it_ends_the_run_with_its_error(
    cloud, configure, frames, failing_on, run
):
    config = configure("failing-alone", switcher=LOCAL)
    run(config, frames(1))
    bad = cloud.publish("failing-alone", {GRAPH_FILE: failing_on(cloud.graph("failing-alone"), 0.9)})
    with Operator(cloud.target) as operator:
        operator.rollback("failing-alone", bad.version)
    fresh = replace(config, state_dir=config.state_dir / "fresh")
    bright = Frame("bright", Image.new("RGB", (64, 64), (250, 250, 250)))
    with Agent(fresh) as agent, pytest.raises(ModelError, match="out of data bounds"):
        agent.run([bright], lambda answer: None)


# ---- the cloud goes away


def test_a_cloud_that_lost_its_data_gets_the_device_and_its_labels_back(
    cloud, configure, frames, until, tmp_path, check_complete
):
    stream = [Frame(f"{lap}{frame.sample_id}", frame.content) for lap in range(2) for frame in frames(20)]
    config = configure("lost")
    data_dir = cloud.data_dir
    with Agent(config), Operator(cloud.target) as operator:
        operator.add_labels("lost", ["kettle"])

    def source() -> Iterator[Frame]:
        yield from stream[:20]
        until(lambda: agent._router.link.pending == 0)
        cloud.stop()
        cloud.data_dir = tmp_path / "afresh"
        cloud.start()
        until(lambda: "lost" in cloud.registry.environments() and _reachable(agent))
        until(lambda: agent._updater._ready is not None)
        yield from stream[20:]

    answers: list[Answer] = []
    try:
        with Agent(config) as agent:
            labels = agent._running.pool.labels
            summary = agent.run(source(), answers.append)
            assert set(agent._running.pool.labels) == set(labels) and "kettle" in labels
        assert cloud.samples("lost") == 20
    finally:
        cloud.stop()
        cloud.data_dir = data_dir
        cloud.start()
    check_complete(summary, answers, stream)
    assert [answer.route for answer in answers] == ["cloud"] * 40


def test_a_cloud_that_goes_in_mid_run_costs_no_answer_and_is_used_again_when_back(
    cloud, configure, frames, until, check_complete
):
    stream = [Frame(f"{lap}{frame.sample_id}", frame.content) for lap in range(3) for frame in frames(20)]

    def source() -> Iterator[Frame]:
        yield from stream[:20]
        until(lambda: agent._router.link.pending == 0)
        cloud.stop()
        yield from stream[20:40]
        cloud.start()
        until(lambda: _reachable(agent))
        yield from stream[40:]

    answers: list[Answer] = []
    with Agent(configure()) as agent:
        summary = agent.run(source(), answers.append)
    check_complete(summary, answers, stream)
    by_lap = {lap: Counter(a.route for a in answers if a.sample_id[0] == lap) for lap in "012"}
    assert by_lap["0"] == {"cloud": 20} and by_lap["1"] == {"fallback": 20} and by_lap["2"]["cloud"] == 20
    assert {a.reason for a in answers if a.route == "fallback"} <= {"cloud-error", "link"}
    assert summary.uploads_left == 0  # handed over once the cloud was back
    assert (
        agent._router.link.rtt_ms < 1000 and agent._router.link.bits_per_ms > 100
    )  # refused connections are no measurement


def _reachable(agent: Agent) -> bool:
    """Asks as the agent would; True once an answer comes."""
    if not agent._client.available:
        return False
    done = threading.Event()
    results = []
    agent._client.query(b"no image", 1.0, lambda result: (results.append(result), done.set()), keep=False)
    return done.wait(10) and "not a JPEG" in str(results[0])


def test_without_a_cloud_it_starts_from_what_ran_last(cloud, configure, frames, tmp_path, caplog, run, check_complete):
    stream = frames(10)
    with Operator(cloud.target) as operator:
        run(configure("alone"), stream[:1])
        operator.add_labels("alone", ["kettle"])
    _, last = run(configure("alone", switcher=LOCAL), stream[:1])
    cloud.stop()
    try:
        config = configure("alone", connect_timeout_s=0.5, upload="never")
        summary, answers = run(config, stream)
        assert "event=started_alone" in caplog.text
        with pytest.raises(
            CloudError, match=r"127\.0\.0\.1:\d+: .*in time; and .*fresh holds no student to start from"
        ):
            Agent(configure("alone", connect_timeout_s=0.5, state_dir=tmp_path / "fresh"))
    finally:
        cloud.start()
    check_complete(summary, answers, stream)
    assert {(answer.route, answer.bytes_sent > 0) for answer in answers} <= {("fallback", False), ("fallback", True)}
    assert {answer.pool_version for answer in answers} == {last[0].pool_version}


def test_a_new_device_waits_for_a_cloud_that_exports_its_first_student(cloud, configure, frames, run, monkeypatch):
    publish = environments.publish_version0

    def slowly(*arguments):
        time.sleep(4.0)
        return publish(*arguments)

    monkeypatch.setattr(environments, "publish_version0", slowly)
    summary, _ = run(configure("cold", connect_timeout_s=2.0), frames(1))
    assert summary.frames == 1


def test_what_an_agent_could_not_hand_over_the_next_one_does(cloud, configure, frames, run, check_complete):
    stream = frames(20)
    run(configure("later"), stream[:1])
    cloud.stop()
    try:
        summary, answers = run(configure("later", connect_timeout_s=0.3), stream)
    finally:
        cloud.start()
    check_complete(summary, answers, stream)
    assert (summary.fallback, summary.uploads_left, summary.uploads_dropped) == (20, 20, 0)
    before = cloud.samples("later")
    summary, _ = run(configure("later", switcher=LOCAL), stream[:1])
    assert summary.uploads_left == 0 and cloud.samples("later") == before + 19  # one was known already


def test_a_refusal_says_what_the_cloud_minds(configure):
    with pytest.raises(InputError, match="unknown student 'lite9'"):
        Agent(configure("refused", student="lite9"))
    assert not any(thread.name in ("query-deadlines", "updater") for thread in threading.enumerate())
