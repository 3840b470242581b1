"""The whole device against a real cloud. Every frame is answered once, whatever happens on the way."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from edgefm.edge.agent import Agent, Summary
from edgefm.edge.config import AgentConfig, SwitcherConfig
from edgefm.edge.frames import Frame, Unreadable
from edgefm.edge.metrics import AgentMetrics
from edgefm.edge.operator import Operator
from edgefm.edge.records import Answer
from edgefm.edge.sinks import JsonLines
from edgefm.edge.sources import frames_of
from edgefm.models.errors import CloudError, InputError, ModelError, StoreError
from edgefm.models.versions import GRAPH_FILE, Calibration
from edgefm.proto.limits import MAX_IMAGE_BYTES
from PIL import Image

LOCAL = SwitcherConfig(objective="latency_bound", latency_bound_ms=0.001, audit_share=0.0)
"""Infeasible: the edge answers everything."""


@pytest.fixture
def configure(cloud, tmp_path):
    def make(environment: str = "yard", **settings) -> AgentConfig:
        settings = {
            "deadline_ms": 20_000.0,
            "connect_timeout_s": 60.0,
            "threads": 1,
            "state_dir": tmp_path / "device",
            **settings,
        }
        return AgentConfig(cloud=cloud.target, environment=environment, **settings)

    return make


def run(config: AgentConfig, source: Iterable[Frame | Unreadable]) -> tuple[Summary, list[Answer]]:
    answers: list[Answer] = []
    with Agent(config) as agent:
        agent.run(source, answers.append)
    return agent.summary, answers


def check_complete(summary: Summary, answers: list[Answer], frames: list[Frame]) -> None:
    """One answer a frame, no frame twice, and a summary that says the same."""
    assert sorted(answer.sample_id for answer in answers) == [frame.sample_id for frame in frames]
    routes = Counter(answer.route for answer in answers)
    assert (summary.edge, summary.cloud, summary.fallback) == (routes["edge"], routes["cloud"], routes["fallback"])
    assert summary.frames == len(answers) + summary.unreadable


def test_a_cold_start_is_answered_by_the_cloud(cloud, configure, frames):
    stream = frames(60)  # more than may be under way at once: the source is taken as fast as they are answered
    summary, answers = run(configure(), stream)
    check_complete(summary, answers, stream)
    assert {(answer.route, answer.reason, answer.threshold) for answer in answers} == {("cloud", "cold-start", None)}
    sizes = {frame.sample_id: len(frame.encoded) for frame in stream}
    for answer in answers:
        assert answer.bytes_sent == sizes[answer.sample_id] and answer.compute_ms > 0 and answer.transit_ms > 0
        parts = answer.decode_ms + answer.preprocess_ms + answer.student_ms
        assert answer.student_ms > 0 and parts + answer.compute_ms <= answer.total_ms
        assert (answer.environment, answer.student_version) == ("yard", 0) and len(answer.pool_version) == 16
    assert summary.bytes_sent == sum(sizes.values()) and summary.bytes_received > 0
    assert max(answer.samples_labelled for answer in answers) == cloud.samples("yard") >= 60
    assert [answer.time_s for answer in answers] == sorted(answer.time_s for answer in answers)


def test_what_the_edge_answers_sends_nothing(configure, frames):
    stream = frames(40)
    summary, answers = run(configure(switcher=LOCAL), stream)
    check_complete(summary, answers, stream)
    assert {(answer.route, answer.reason) for answer in answers} == {("edge", "infeasible")}
    assert [answer.sample_id for answer in answers] == [frame.sample_id for frame in stream]
    for answer in answers:
        assert (answer.label, answer.margin) == (answer.edge_label, answer.edge_margin)
        assert answer.bytes_sent == answer.transit_ms == answer.compute_ms == 0
    assert summary.bytes_sent == 0


def test_margin_and_audits_after_a_cold_start(configure, frames):
    config = configure(switcher=SwitcherConfig(accuracy_target=0.3, audit_share=0.2, min_evidence=20, rebuild_every=1))
    stream = [Frame(f"{lap}{frame.sample_id}", frame.content) for lap in range(3) for frame in frames(60)]
    summary, answers = run(config, stream)
    check_complete(summary, answers, stream)
    routes = Counter((answer.route, answer.reason) for answer in answers)
    assert routes["cloud", "cold-start"] >= 20 and routes["edge", "margin"] > 30 and routes["cloud", "audit"] > 3
    for answer in answers:
        if answer.threshold is not None and answer.reason == "margin":
            assert (answer.edge_margin >= answer.threshold) == (answer.route == "edge")


def test_the_audits_share_reaches_the_store(cloud, configure, frames):
    always = SwitcherConfig(objective="latency_bound", latency_bound_ms=0.001, audit_share=0.5)
    summary, answers = run(configure("audited", switcher=always), frames(40))
    assert {answer.reason for answer in answers} == {"infeasible", "audit"}
    stored = cloud.server.environments.store.samples("audited")
    assert len(stored.propensities) == summary.cloud > 5 and set(stored.propensities) == {0.5}


def test_an_unreadable_frame_is_counted_and_the_rest_answered(configure, frames):
    stream = frames(12)
    stream[3], stream[7] = Frame("003", b"no image"), Frame("007", stream[7].encoded[:200])
    source = [*stream, Unreadable("012", "cannot-read", "the disk refused")]
    summary, answers = run(configure(), source)
    check_complete(summary, answers, [frame for i, frame in enumerate(stream) if i not in (3, 7)])
    assert (summary.frames, summary.unreadable) == (13, 3)
    assert summary.unreadable_by_reason == {"not-an-image": 1, "truncated": 1, "cannot-read": 1}


def test_frames_of_a_python_iterator(configure, make_picture):
    summary, answers = run(configure(), frames_of([make_picture(0), make_picture(1).convert("RGBA")]))
    assert summary.cloud == 2 and [answer.bytes_sent > 0 for answer in answers] == [True, True]


def test_an_image_too_large_for_a_query_is_answered_locally(configure, frames):
    """And it does not cost the queries beside it their answers."""
    stream = frames(6)
    stream[2] = Frame("002", stream[2].encoded + bytes(MAX_IMAGE_BYTES))
    summary, answers = run(configure(), stream)
    check_complete(summary, answers, stream)
    reasons = {answer.sample_id: (answer.route, answer.reason, answer.bytes_sent > 0) for answer in answers}
    assert reasons.pop("002") == ("fallback", "too-large", False)
    assert set(reasons.values()) == {("cloud", "cold-start", True)} and summary.uploads_left == 0


def test_a_deadline_gives_the_edge_s_answer_and_the_sample_goes_later(cloud, configure, frames):
    stream = frames(5)
    summary, answers = run(configure("hurried", deadline_ms=1.0), stream)
    check_complete(summary, answers, stream)
    assert {answer.route for answer in answers} == {"fallback"}
    assert {answer.reason for answer in answers} <= {"deadline", "link"}
    for answer in answers:
        assert answer.label == answer.edge_label
    assert (summary.uploads_left, summary.uploads_dropped) == (0, 0) and cloud.samples("hurried") == 5


def test_nothing_is_uploaded_where_that_is_forbidden(cloud, configure, frames):
    before = cloud.samples("quiet") if "quiet" in cloud.registry.environments() else 0
    tight = SwitcherConfig(objective="latency_bound", latency_bound_ms=0.001, audit_share=0.0)
    run(configure("quiet", upload="never", switcher=tight), frames(10))
    assert cloud.samples("quiet") == before == 0


def test_the_rate_of_frames_is_kept(configure, frames):
    answers = run(configure(switcher=LOCAL, fps=50.0), frames(26))[1]
    assert 0.45 < answers[-1].time_s - answers[0].time_s < 2.0


def test_a_frame_is_taken_when_its_time_has_come(configure, frames):
    """A camera's frame that waits for its turn in the agent is old when it is answered."""
    events: list[float] = []

    def source() -> Iterator[Frame]:
        for frame in frames(4):
            events.append(time.monotonic())
            yield frame

    with Agent(configure(switcher=LOCAL, fps=2.0)) as agent:
        agent.run(source(), lambda _: events.append(time.monotonic()))
    pauses = [taken - answered for answered, taken in zip(events[1::2], events[2::2], strict=False)]
    assert len(pauses) == 3 and max(pauses) > 0.2


def test_what_waits_and_was_dropped_can_be_scraped_while_it_runs(configure, frames):
    config = configure("scraped", switcher=LOCAL, upload="all", upload_bytes_per_day=1, spool_bytes=4000)
    with Agent(config) as agent:
        metrics = AgentMetrics(agent.current_summary)
        agent.run(iter(frames(10)), lambda _: None)
        waiting = metrics.registry.get_sample_value("edgefm_agent_spool_samples") or 0
        dropped = metrics.registry.get_sample_value("edgefm_agent_uploads_dropped_total") or 0
    assert waiting > 0 < dropped and waiting + dropped == 10
    assert (agent.summary.uploads_left, agent.summary.uploads_dropped) == (waiting, dropped)


def test_a_run_that_is_stopped_answers_what_it_has_taken(configure, frames):
    answers: list[Answer] = []

    def source() -> Iterator[Frame]:
        for number, frame in enumerate(frames(20)):
            if number == 5:
                threading.Thread(target=agent.stop).start()
            yield frame

    with Agent(configure(fps=20.0)) as agent:
        summary = agent.run(source(), answers.append)
    assert 6 <= summary.frames == len(answers) < 20


# ---- changes while it runs


def test_an_added_label_is_swapped_in_between_two_frames(cloud, configure, frames, until):
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


def test_rollback_swaps_the_student_and_a_corrupt_version_is_refused(cloud, configure, frames, until, caplog):
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


def test_a_calibration_made_with_another_pool_is_no_evidence(cloud, configure, until):
    """Neither at a swap nor at a start: after a label was added, the version's calibration speaks of the old pool."""
    with Agent(configure("calibrated")) as agent:
        pool = agent._running.pool.version
    manifest = cloud.registry.current("calibrated")
    calibration = Calibration(margins=[0.1] * 300, agreements=[True] * 300, propensities=[1.0] * 300)
    learned = cloud.registry.publish(manifest.model_copy(update={"parent": 0, "calibration": calibration}), {})
    with Operator(cloud.target) as operator:
        operator.rollback("calibrated", learned.version)
        with Agent(configure("calibrated")) as agent:
            assert agent._running.student.manifest == learned and agent._running.pool.version == pool
            assert agent._router.switcher._evidence._prior.shape == (3, 300)
        operator.add_labels("calibrated", ["kettle"])
    with Agent(configure("calibrated")) as agent:
        assert agent._running.pool.version != pool == agent._running.student.manifest.pool_version
        assert agent._router.switcher._evidence._prior.shape == (3, 0)


def test_a_student_that_fails_on_a_frame_is_gone_back_from_and_the_frame_answered(
    cloud, configure, frames, failing_on, until
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


def test_a_student_that_fails_with_none_before_it_ends_the_run_with_its_error(cloud, configure, frames, failing_on):
    config = configure("failing-alone", switcher=LOCAL)
    run(config, frames(1))
    bad = cloud.publish("failing-alone", {GRAPH_FILE: failing_on(cloud.graph("failing-alone"), 0.9)})
    with Operator(cloud.target) as operator:
        operator.rollback("failing-alone", bad.version)
    fresh = replace(config, state_dir=config.state_dir / "fresh")
    bright = Frame("bright", Image.new("RGB", (64, 64), (250, 250, 250)))
    with Agent(fresh) as agent, pytest.raises(ModelError, match="out of data bounds"):
        agent.run([bright], lambda answer: None)


def test_a_device_without_a_name_makes_one_and_keeps_it(configure, caplog):
    caplog.set_level(logging.INFO, "edgefm.cloud")
    for _ in range(2):
        with Agent(configure("named")) as agent:
            assert f"event=device device={agent._config.device_id} environment=named" in caplog.text
            caplog.clear()
            name = (agent._config.state_dir / "device-id").read_text()
            assert agent._config.device_id == name
    with Agent(configure("named", device_id="cam-7")) as agent:
        assert agent._config.device_id == "cam-7"


def test_a_second_agent_on_the_same_state_is_told_so(configure):
    with Agent(configure()), pytest.raises(StoreError, match="another agent is using the state folder"):
        Agent(configure())
    with Agent(configure()):  # the first has let go of it
        pass


# ---- what is uploaded


def test_with_upload_all_the_cloud_gets_every_sample_with_propensity_one(cloud, configure, frames):
    """Audits too: all samples reach the cloud, so that none stands for others. Drift hears of queries alone: there an
    audit stands for those that were not asked about."""
    audited = SwitcherConfig(objective="latency_bound", latency_bound_ms=0.001, audit_share=0.3)
    summary, _ = run(configure("all", switcher=audited, upload="all"), frames(30))
    stored = cloud.server.environments.store.samples("all")
    assert summary.edge > 10 and summary.cloud > 3 and summary.uploads_left == 0
    assert len(stored.propensities) == 30 and set(stored.propensities) == {1.0}
    observed = json.loads(cloud.server.environments.drift.snapshot("all"))["first"]
    assert [round(observation["propensity"], 6) for observation in observed] == [0.3] * summary.cloud


def test_what_an_agent_could_not_hand_over_the_next_one_does(cloud, configure, frames):
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


# ---- the cloud goes away


def test_a_cloud_that_lost_its_data_gets_the_device_and_its_labels_back(cloud, configure, frames, until, tmp_path):
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


def test_a_cloud_that_goes_in_mid_run_costs_no_answer_and_is_used_again_when_back(cloud, configure, frames, until):
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


def test_without_a_cloud_it_starts_from_what_ran_last(cloud, configure, frames, tmp_path, caplog):
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


def test_a_refusal_says_what_the_cloud_minds(configure):
    with pytest.raises(InputError, match="unknown student 'lite9'"):
        Agent(configure("refused", student="lite9"))
    assert not any(thread.name in ("query-deadlines", "updater") for thread in threading.enumerate())


# ---- sinks and sources that fail


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("switcher", [LOCAL, SwitcherConfig()], ids=["edge", "cloud"])
def test_a_full_disk_under_the_answers_ends_the_run(configure, frames, switcher):
    sink = JsonLines(Path("/dev/full"))
    with Agent(configure(switcher=switcher)) as agent:
        with pytest.raises(StoreError, match="cannot write answers to /dev/full: No space left"):
            agent.run(frames(60), sink)
        assert agent.summary.frames < 60 or switcher is not LOCAL
    with pytest.raises(StoreError):
        sink.close()


def test_a_sink_that_fails_on_the_last_answers_is_not_passed_over(configure, frames):
    """The frames have all been taken when it happens; and the threads that answer live on."""

    def sink(answer: Answer) -> None:
        raise ValueError(f"no room for {answer.sample_id}")

    with Agent(configure()) as agent:
        for _ in range(2):
            with pytest.raises(ValueError, match="no room for 000"):
                agent.run(frames(1), sink)
            agent._sink_error = None
        assert agent.summary.cloud == 2


def test_a_source_that_fails_ends_the_run_after_all_asked_is_answered(configure, frames):
    def source() -> Iterator[Frame]:
        yield from frames(10)
        raise InputError("the camera is gone")

    answers: list[Answer] = []
    with Agent(configure()) as agent, pytest.raises(InputError, match="the camera is gone"):
        agent.run(source(), answers.append)
    assert len(answers) == 10 and {answer.route for answer in answers} == {"cloud"}
