"""Replays in virtual time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from edgefm.deploy.replay.arrivals import fixed_rate, poisson
from edgefm.deploy.replay.engine import ANSWER_BYTES, Engine, Network, Replayed
from edgefm.deploy.replay.recording import Recording
from edgefm.deploy.replay.systems import FRAMING_BYTES, Fixed, edgefm
from edgefm.deploy.replay.timing import BatchCost, CloudProfile
from edgefm.deploy.replay.virtual_cloud import VirtualCloud
from edgefm.deploy.replay.virtual_link import VirtualLink
from edgefm.deploy.traces import Trace, constant_trace, synthetic_trace
from edgefm.edge.config import SwitcherConfig
from edgefm.models.versions import Calibration

FM_MS, DEVICE_MS, PROPAGATION_MS = 20.0, 4.0, 25.0
EVEN = constant_trace(12.0)  # a packet on every ms


def recording(samples: int, size_bytes: int = 2000, seed: int = 0) -> Recording:
    """Margins of a student that is right the more often the surer it is."""
    rng = np.random.default_rng(seed)
    margins = rng.gamma(2.0, 0.1, samples)
    right = rng.random(samples) < 1 - 0.5 * np.exp(-8 * margins)
    return Recording(margins, right.astype(float), right, np.ones(samples, bool), np.full(samples, size_bytes))


def engine(uplink: Trace, downlink: Trace, fm_ms: float = FM_MS, deadline_ms: float = 1000.0, seed: int = 0) -> Engine:
    cost = BatchCost(size=1, p50_ms=fm_ms, p95_ms=fm_ms)
    profile = CloudProfile(source="a test", foundation_model="none", batches=(cost,))
    network = Network(VirtualLink(uplink), VirtualLink(downlink), PROPAGATION_MS)
    return Engine(network, VirtualCloud(profile, seed, max_delay_ms=0.0), deadline_ms)


def closed_form_ms(sent_ms: float, size_bytes: int) -> float:
    """From decision to answer on `EVEN`, where a packet leaves on every full ms after it came."""
    up_ms = math.floor(sent_ms) + math.ceil((size_bytes + FRAMING_BYTES) / 1500)
    done_ms = up_ms + PROPAGATION_MS + FM_MS
    return math.floor(done_ms) + math.ceil(ANSWER_BYTES / 1500) + PROPAGATION_MS - sent_ms


def test_on_a_constant_link_the_latency_is_the_closed_form() -> None:
    stream = recording(200)
    replayed = engine(EVEN, EVEN).run(Fixed(stream, np.full(200, DEVICE_MS), math.inf), fixed_rate(200, 2.0))
    assert replayed.share("cloud") == 1.0
    expected = [DEVICE_MS + closed_form_ms(arrival + DEVICE_MS, 2000) for arrival in replayed.arrival_ms]
    assert replayed.total_ms == pytest.approx(expected, abs=1e-9)
    parts = replayed.device_ms + replayed.transit_ms + replayed.queue_ms + replayed.compute_ms
    assert replayed.total_ms == pytest.approx(parts, abs=1e-9)


def test_on_the_edge_it_is_what_the_device_takes() -> None:
    stream = recording(50)
    replayed = engine(EVEN, EVEN).run(Fixed(stream, np.full(50, DEVICE_MS), 0.0), fixed_rate(50, 10.0))
    assert replayed.share("edge") == 1.0
    assert np.all(replayed.total_ms == DEVICE_MS) and not replayed.bytes_sent.any()


def test_frames_wait_for_a_busy_device_in_order() -> None:
    stream = recording(5)
    replayed = engine(EVEN, EVEN).run(Fixed(stream, np.full(5, 10.0), 0.0), fixed_rate(5, 200.0))
    assert replayed.total_ms == pytest.approx([10, 15, 20, 25, 30])


def test_what_meets_its_deadline_is_fallback_with_the_devices_answer() -> None:
    silent = Trace("silent", np.array([100_000_000]))
    stream = recording(3)
    system = Fixed(stream, np.full(3, 4.0), math.inf)
    replayed = engine(silent, EVEN, deadline_ms=300.0).run(system, fixed_rate(3, 1.0))
    assert replayed.share("fallback") == 1.0
    assert replayed.total_ms == pytest.approx([304.0] * 3)
    assert list(replayed.right(system)) == list(stream.edge_right)


def test_a_busy_cloud_queues() -> None:
    stream = recording(40)
    replayed = engine(EVEN, EVEN, fm_ms=30.0).run(Fixed(stream, np.full(40, 1.0), math.inf), fixed_rate(40, 40.0))
    assert replayed.queue_ms[0] == 0 and replayed.queue_ms.max() > 30
    assert replayed.share("cloud") == 1.0


def lte(samples: int, seed: int = 0) -> Replayed:
    stream = recording(samples)
    device_ms = np.random.default_rng(seed).lognormal(1.4, 0.2, samples)
    system = edgefm(stream, device_ms, SwitcherConfig(seed=seed), 1000.0, Calibration())
    return engine(synthetic_trace(seed), synthetic_trace(seed), seed=seed).run(system, poisson(samples, 5.0, seed))


def test_one_seed_gives_one_outcome() -> None:
    once, again, other = lte(1500), lte(1500), lte(1500, seed=1)
    for name, values in vars(once).items():
        assert np.array_equal(values, getattr(again, name), equal_nan=True), name
    assert not np.array_equal(once.total_ms, other.total_ms)


def test_the_products_router_decides_and_predicts() -> None:
    replayed = lte(3000)
    late = slice(1000, None)
    edge = replayed.route[late] == 0
    assert 0.1 < edge.mean() < 0.99
    assert replayed.audit.any()
    predicted, happened = replayed.predicted_ms[late].mean(), replayed.total_ms[late].mean()
    assert predicted == pytest.approx(happened, rel=0.2)


def test_runs_go_on_from_one_another() -> None:
    stream, once = recording(100), engine(EVEN, EVEN)
    first = once.run(Fixed(stream, np.full(100, 4.0), 0.2), fixed_rate(100, 10.0))
    second = once.run(Fixed(stream, np.full(100, 4.0), 0.2), fixed_rate(100, 10.0) + 10_000.0)
    assert second.arrival_ms[0] > first.arrival_ms[-1]
    assert first.total_ms == pytest.approx(second.total_ms)


@pytest.mark.parametrize("mbit", [1.0, 6.0, 40.0])
@pytest.mark.parametrize("objective", ["accuracy_target", "latency_bound"])
def test_on_constant_links_the_prediction_is_within_5_percent(mbit: float, objective: str) -> None:
    stream, link = recording(3000), constant_trace(mbit)
    config = SwitcherConfig(objective=objective, latency_bound_ms=60.0)  # pyright: ignore[reportArgumentType]
    system = edgefm(stream, np.full(3000, DEVICE_MS), config, 1000.0, Calibration())
    replayed = engine(link, link).run(system, fixed_rate(3000, 2.0))
    settled = slice(500, None)
    assert replayed.predicted_ms[settled].mean() == pytest.approx(replayed.total_ms[settled].mean(), rel=0.05)
    if objective == "latency_bound":
        assert replayed.total_ms[settled].mean() <= 60.0 * 1.05


@pytest.mark.parametrize("seed", range(3))
def test_on_a_wandering_link_it_is_within_20_percent(seed: int) -> None:
    stream, link = recording(3000, size_bytes=20_000), synthetic_trace(seed)
    system = edgefm(stream, np.full(3000, DEVICE_MS), SwitcherConfig(), 1000.0, Calibration())
    replayed = engine(link, link).run(system, fixed_rate(3000, 2.0))
    settled = slice(500, None)
    assert replayed.predicted_ms[settled].mean() == pytest.approx(replayed.total_ms[settled].mean(), rel=0.2)
