"""The whole device against a real cloud: every frame is answered once, and what is uploaded of them."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from edgefm.edge.agent import Agent
from edgefm.edge.config import SwitcherConfig
from edgefm.edge.frames import Frame, Unreadable
from edgefm.edge.metrics import AgentMetrics
from edgefm.edge.records import Answer
from edgefm.edge.sinks import JsonLines
from edgefm.edge.sources import frames_of
from edgefm.models.errors import InputError, StoreError
from edgefm.proto.limits import MAX_IMAGE_BYTES

from .conftest import LOCAL


def test_a_cold_start_is_answered_by_the_cloud(cloud, configure, frames, run, check_complete):
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


def test_what_the_edge_answers_sends_nothing(configure, frames, run, check_complete):
    stream = frames(40)
    summary, answers = run(configure(switcher=LOCAL), stream)
    check_complete(summary, answers, stream)
    assert {(answer.route, answer.reason) for answer in answers} == {("edge", "infeasible")}
    assert [answer.sample_id for answer in answers] == [frame.sample_id for frame in stream]
    for answer in answers:
        assert (answer.label, answer.margin) == (answer.edge_label, answer.edge_margin)
        assert answer.bytes_sent == answer.transit_ms == answer.compute_ms == 0
    assert summary.bytes_sent == 0


def test_margin_and_audits_after_a_cold_start(configure, frames, run, check_complete):
    config = configure(switcher=SwitcherConfig(accuracy_target=0.3, audit_share=0.2, min_evidence=20, rebuild_every=1))
    stream = [Frame(f"{lap}{frame.sample_id}", frame.content) for lap in range(3) for frame in frames(60)]
    summary, answers = run(config, stream)
    check_complete(summary, answers, stream)
    routes = Counter((answer.route, answer.reason) for answer in answers)
    assert routes["cloud", "cold-start"] >= 20 and routes["edge", "margin"] > 30 and routes["cloud", "audit"] > 3
    for answer in answers:
        if answer.threshold is not None and answer.reason == "margin":
            assert (answer.edge_margin >= answer.threshold) == (answer.route == "edge")


def test_an_unreadable_frame_is_counted_and_the_rest_answered(configure, frames, run, check_complete):
    stream = frames(12)
    stream[3], stream[7] = Frame("003", b"no image"), Frame("007", stream[7].encoded[:200])
    source = [*stream, Unreadable("012", "cannot-read", "the disk refused")]
    summary, answers = run(configure(), source)
    check_complete(summary, answers, [frame for i, frame in enumerate(stream) if i not in (3, 7)])
    assert (summary.frames, summary.unreadable) == (13, 3)
    assert summary.unreadable_by_reason == {"not-an-image": 1, "truncated": 1, "cannot-read": 1}


def test_frames_of_a_python_iterator(configure, make_picture, run):
    summary, answers = run(configure(), frames_of([make_picture(0), make_picture(1).convert("RGBA")]))
    assert summary.cloud == 2 and [answer.bytes_sent > 0 for answer in answers] == [True, True]


def test_an_image_too_large_for_a_query_is_answered_locally(configure, frames, run, check_complete):
    """And it does not cost the queries beside it their answers."""
    stream = frames(6)
    stream[2] = Frame("002", stream[2].encoded + bytes(MAX_IMAGE_BYTES))
    summary, answers = run(configure(), stream)
    check_complete(summary, answers, stream)
    reasons = {answer.sample_id: (answer.route, answer.reason, answer.bytes_sent > 0) for answer in answers}
    assert reasons.pop("002") == ("fallback", "too-large", False)
    assert set(reasons.values()) == {("cloud", "cold-start", True)} and summary.uploads_left == 0


def test_a_deadline_gives_the_edge_s_answer_and_the_sample_goes_later(cloud, configure, frames, run, check_complete):
    stream = frames(5)
    summary, answers = run(configure("hurried", deadline_ms=1.0), stream)
    check_complete(summary, answers, stream)
    assert {answer.route for answer in answers} == {"fallback"}
    assert {answer.reason for answer in answers} <= {"deadline", "link"}
    for answer in answers:
        assert answer.label == answer.edge_label
    assert (summary.uploads_left, summary.uploads_dropped) == (0, 0) and cloud.samples("hurried") == 5


def test_the_rate_of_frames_is_kept(configure, frames, run):
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


def test_the_audits_share_reaches_the_store(cloud, configure, frames, run):
    always = SwitcherConfig(objective="latency_bound", latency_bound_ms=0.001, audit_share=0.5)
    summary, answers = run(configure("audited", switcher=always), frames(40))
    assert {answer.reason for answer in answers} == {"infeasible", "audit"}
    stored = cloud.server.environments.store.samples("audited")
    assert len(stored.propensities) == summary.cloud > 5 and set(stored.propensities) == {0.5}


def test_nothing_is_uploaded_where_that_is_forbidden(cloud, configure, frames, run):
    before = cloud.samples("quiet") if "quiet" in cloud.registry.environments() else 0
    tight = SwitcherConfig(objective="latency_bound", latency_bound_ms=0.001, audit_share=0.0)
    run(configure("quiet", upload="never", switcher=tight), frames(10))
    assert cloud.samples("quiet") == before == 0


def test_what_waits_and_was_dropped_can_be_scraped_while_it_runs(configure, frames):
    config = configure("scraped", switcher=LOCAL, upload="all", upload_bytes_per_day=1, spool_bytes=4000)
    with Agent(config) as agent:
        metrics = AgentMetrics(agent.current_summary)
        agent.run(iter(frames(10)), lambda _: None)
        waiting = metrics.registry.get_sample_value("edgefm_agent_spool_samples") or 0
        dropped = metrics.registry.get_sample_value("edgefm_agent_uploads_dropped_total") or 0
    assert waiting > 0 < dropped and waiting + dropped == 10
    assert (agent.summary.uploads_left, agent.summary.uploads_dropped) == (waiting, dropped)


def test_with_upload_all_the_cloud_gets_every_sample_with_propensity_one(cloud, configure, frames, run):
    """Audits too: all samples reach the cloud, so that none stands for others. Drift hears of queries alone: there an
    audit stands for those that were not asked about."""
    audited = SwitcherConfig(objective="latency_bound", latency_bound_ms=0.001, audit_share=0.3)
    summary, _ = run(configure("all", switcher=audited, upload="all"), frames(30))
    stored = cloud.server.environments.store.samples("all")
    assert summary.edge > 10 and summary.cloud > 3 and summary.uploads_left == 0
    assert len(stored.propensities) == 30 and set(stored.propensities) == {1.0}
    observed = json.loads(cloud.server.environments.drift.snapshot("all"))["first"]
    assert [round(observation["propensity"], 6) for observation in observed] == [0.3] * summary.cloud


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
