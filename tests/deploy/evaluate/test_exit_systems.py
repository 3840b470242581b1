"""SPINN and PersEPhonEE in virtual time, on a made-up FM of four pieces."""

from __future__ import annotations

import numpy as np
import pytest
from edgefm.deploy.evaluate.exit_systems import PROBE_AFTER, PersEPhonEE, Spinn
from edgefm.deploy.evaluate.exits import ExitRecording, ExitRule
from edgefm.deploy.evaluate.fm_stages import StageCosts
from edgefm.deploy.replay.arrivals import fixed_rate
from edgefm.deploy.replay.engine import Engine, Network
from edgefm.deploy.replay.systems import FRAMING_BYTES
from edgefm.deploy.replay.timing import BatchCost, CloudProfile
from edgefm.deploy.replay.virtual_cloud import VirtualCloud
from edgefm.deploy.replay.virtual_link import VirtualLink
from edgefm.deploy.traces import Trace, constant_trace

FM_MS, DEADLINE_MS, END = 20.0, 1000.0, 4
COSTS = StageCosts(
    names=("image", "a", "b", "c", "end"),
    device_ms=np.array([0.0, 10.0, 40.0, 70.0, 100.0]),
    pack_ms=np.array([0.0, 1.0, 1.0, 1.0, 0.0]),
    size_bytes=np.array([20_000.0, 8000.0, 4000.0, 1000.0, 0.0]),
    work=np.array([1.0, 0.8, 0.5, 0.2, 0.0]),
    whole_ms=100.0,
    spread=1.0,
)


def recording(samples: int, seed: int = 0) -> tuple[ExitRecording, ExitRule]:
    """Exits that are surer and right more often the deeper they are; the FM is right throughout."""
    rng = np.random.default_rng(seed)
    exits = rng.random((samples, END - 1)) ** (1 / np.array([1, 2, 4]))  # (N, 3)
    right = rng.random(exits.shape) < exits
    column = np.zeros((samples, 1))
    sureness = np.hstack([column, exits, column + np.inf])
    edge_right = np.hstack([column > 0, right, column == 0])
    sizes = np.tile(COSTS.size_bytes.astype(int), (samples, 1))
    first = (sureness >= 0.8).argmax(axis=1)
    rule = ExitRule(0.8, np.array([(first > boundary).mean() for boundary in range(END + 1)]), 0.99)
    return ExitRecording(sureness, edge_right, np.ones_like(edge_right), sizes), rule


def engine(uplink: Trace) -> Engine:
    cost = BatchCost(size=1, p50_ms=FM_MS, p95_ms=FM_MS)
    profile = CloudProfile(source="a test", foundation_model="none", batches=(cost,))
    network = Network(VirtualLink(uplink), VirtualLink(constant_trace(12.0)), 10.0)
    return Engine(network, VirtualCloud(profile, 0, max_delay_ms=0.0), DEADLINE_MS)


def spinn(samples: int, slowness: float = 1.0) -> tuple[Spinn, ExitRecording, ExitRule]:
    stream, rule = recording(samples)
    return Spinn(stream, COSTS, rule, np.full(samples, slowness), DEADLINE_MS), stream, rule


def test_persephonee_asks_nobody_and_takes_what_its_exit_takes():
    stream, rule = recording(300)
    factors = np.random.default_rng(1).uniform(0.8, 1.2, 300)
    system = PersEPhonEE(stream, COSTS, rule, factors)
    replayed = engine(constant_trace(12.0)).run(system, fixed_rate(300, 2.0))
    first = (stream.sureness >= rule.threshold).argmax(axis=1)
    assert replayed.share("edge") == 1 and not replayed.bytes_sent.any()
    assert set(first) == {1, 2, 3, END}
    assert replayed.total_ms == pytest.approx(COSTS.device_ms[first] * factors)
    assert replayed.predicted_ms.mean() == pytest.approx(replayed.total_ms.mean(), rel=0.05)
    expected = stream.edge_right[np.arange(300), first]
    assert np.array_equal(replayed.right(system), expected)


def test_the_slower_the_link_the_less_is_sent_and_at_last_nothing():
    system, _, rule = spinn(40)
    expected_bytes, picked = [], []
    for sample, bits_per_ms in enumerate(np.geomspace(1e6, 10, 40)):
        system.link.bits_per_ms, system.link.rtt_ms = bits_per_ms, 5.0
        system.begin(sample, now_ms=0.0)
        split = int(system.splits[sample])
        picked.append(split)
        expected_bytes.append(rule.stay[split] * COSTS.size_bytes[split])
    assert picked[0] == 0 and picked[-1] == END
    assert picked == sorted(picked) and len(set(picked)) >= 3, "features of ever deeper splits in between"
    assert expected_bytes == sorted(expected_bytes, reverse=True)


def test_a_slow_device_sends_the_image_and_a_fast_one_needs_no_cloud():
    slow, fast = spinn(1, slowness=20.0)[0], spinn(1, slowness=0.01)[0]
    for system in (slow, fast):
        system.begin(0, now_ms=0.0)
    assert (slow.splits[0], fast.splits[0]) == (0, END)


def test_an_exit_on_the_way_answers_and_the_rest_goes_on_from_the_split():
    system, stream, rule = spinn(400)
    system.link.bits_per_ms = 1500.0  # the trace's: the image would be too slow
    replayed = engine(constant_trace(1.5)).run(system, fixed_rate(400, 2.0))
    first, split = (stream.sureness >= rule.threshold).argmax(axis=1), system.splits
    on_edge = first <= split
    assert 0.2 < on_edge.mean() < 0.9 and np.array_equal(replayed.route == 0, on_edge)
    device_ms = np.where(on_edge, COSTS.device_ms[first], COSTS.device_ms[split] + COSTS.pack_ms[split])
    assert replayed.device_ms == pytest.approx(device_ms)
    sent = COSTS.size_bytes[split] + FRAMING_BYTES
    assert replayed.bytes_sent.tolist() == np.where(on_edge, 0, sent).tolist()
    asked = replayed.route == 1
    assert replayed.compute_ms[asked] == pytest.approx(FM_MS * COSTS.work[split][asked])
    late = slice(100, None)
    assert replayed.predicted_ms[late].mean() == pytest.approx(replayed.total_ms[late].mean(), rel=0.1)
    expected = np.where(on_edge, stream.edge_right[np.arange(400), first], True)
    assert np.array_equal(replayed.right(system), expected)


@pytest.mark.parametrize(("slowness", "bits_per_ms", "image"), [(20.0, 50_000.0, True), (1.0, 1500.0, False)])
def test_what_meets_its_deadline_has_the_surest_exits_answer_and_none_for_an_image(slowness, bits_per_ms, image):
    system, stream, _ = spinn(8, slowness)
    system.link.bits_per_ms, system.link.rtt_ms = bits_per_ms, 5.0
    replayed = engine(Trace("silent", np.array([100_000_000]))).run(system, np.zeros(8))
    late, splits = np.flatnonzero(replayed.route == 2), system.splits
    assert len(late) and ((splits[late] == 0) == image).all()
    assert (replayed.total_ms[late] == replayed.device_ms[late] + DEADLINE_MS).all()
    for sample in late:
        surest = stream.sureness[sample, : splits[sample] + 1].argmax()
        assert system.edge_right[sample] == stream.edge_right[sample, surest]
        assert (surest > 0) != image, "where the image was sent, no exit has said anything"


def test_a_link_that_was_left_is_tried_again():
    system, *_ = spinn(400, slowness=3.0)
    system.link.bits_per_ms = 10.0  # believed, but wrong
    replayed = engine(constant_trace(50.0)).run(system, fixed_rate(400, 1.0))
    asked = np.flatnonzero(replayed.bytes_sent)
    assert asked[0] >= PROBE_AFTER and (system.splits[:PROBE_AFTER] == END).all()
    assert len(asked) > 100 and (system.splits[asked[-50:]] < END).all()
