"""Systems on a link: the same students, FM, samples, times and traces for all of them.

A contest replays every scoring image several times in shuffled order, so that latencies and answers can be averaged for each
image, and systems compared image by image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...edge.config import SwitcherConfig
from ...models.versions import Calibration
from ..replay.arrivals import fixed_rate
from ..replay.engine import Engine, Network, Replayed
from ..replay.recording import Recording
from ..replay.systems import Fixed, System, edgefm
from ..replay.timing import Timing
from ..replay.virtual_cloud import VirtualCloud
from ..replay.virtual_link import VirtualLink
from .exit_systems import PersEPhonEE, Spinn
from .experiment import Link, Material, estimate, estimate_ratio
from .fm_stages import StageCosts
from .study import FULL, Version

BOUNDS_MS = (50.0, 100.0, 150.0)
ENCODE_MS = Timing(0.5, 0.8)
"""Assumed, not measured: what a device without a student takes to read and send a frame that is encoded already."""


@dataclass(frozen=True)
class Run:
    """One system on one link, over S seeds and M images.

    Attributes:
        latency_ms, right: (S, M) means for each image; a sample without an answer is not right.
        fm_right: (S, M) bool, what the FM says where it is asked.
        parts_ms: mean of edge, network and cloud.
    """

    latency_ms: np.ndarray
    right: np.ndarray
    fm_right: np.ndarray
    percentiles_ms: Mapping[str, float]
    parts_ms: Mapping[str, float]
    shares: Mapping[str, float]
    replayed: Sequence[Replayed]

    def accuracy_minus_fm(self) -> dict[str, Any]:
        return estimate(self.right - self.fm_right)

    def described(self, beside: Run) -> dict[str, Any]:
        """JSON data; `beside` is what differences are taken from."""
        return {
            "latency_ms": estimate(self.latency_ms),
            "accuracy": estimate(self.right),
            "accuracy_minus_fm": self.accuracy_minus_fm(),
            "accuracy_minus_cloud_only": estimate(self.right - beside.right),
            "latency_over_cloud_only": estimate_ratio(self.latency_ms, beside.latency_ms),
            "percentiles_ms": dict(self.percentiles_ms),
            "parts_ms": dict(self.parts_ms),
            "shares": dict(self.shares),
        }


@dataclass(frozen=True)
class Entry:
    """What a system is made of for one seed.

    Attributes:
        order: (N,) rows of the scoring images, as they come.
        recording: of the version, in that order.
    """

    order: np.ndarray
    recording: Recording
    version: Version
    rng: np.random.Generator


Maker = Callable[[Entry], System]


def compete(material: Material, look: str, link: Link, make: Maker, method: str = FULL) -> Run:
    """Replays one system over all seeds."""
    latencies, rights, by_fm, replays = [], [], [], []
    for seed in range(material.seeds):
        version = material.version(look, seed, method)
        images = len(version.recording)
        order = _order(images, material.samples, seed)
        recording = version.recording.at(order).with_payload(material.traffic.payload_bytes)
        system = make(Entry(order, recording, version, np.random.default_rng([seed, 2])))
        replayed = _engine(material, link, seed).run(system, fixed_rate(len(order), material.traffic.rate))
        latencies.append(_by_image(replayed.total_ms, order, images))
        rights.append(_by_image(replayed.right(system), order, images))
        by_fm.append(version.recording.cloud_right)
        replays.append(replayed)
    total_ms = np.concatenate([replayed.total_ms for replayed in replays])
    return Run(
        np.array(latencies),
        np.array(rights),
        np.array(by_fm, float),
        {f"p{q}": round(float(np.percentile(total_ms, q)), 2) for q in (50, 95, 99)},
        _parts(replays),
        {route: round(float(np.mean([r.share(route) for r in replays])), 4) for route in ("edge", "cloud", "fallback")},
        replays,
    )


def _order(images: int, samples: int, seed: int) -> np.ndarray:
    """(samples,) rows: every image as often as the others, to one, in shuffled order."""
    rng = np.random.default_rng([seed, 3])
    rounds = [rng.permutation(images) for _ in range(math.ceil(samples / images))]
    return np.concatenate(rounds)[:samples]


def _by_image(values: np.ndarray, order: np.ndarray, images: int) -> np.ndarray:
    return np.bincount(order, values, minlength=images) / np.bincount(order, minlength=images)


def _engine(material: Material, link: Link, seed: int) -> Engine:
    begin_ms = float(np.random.default_rng([seed, 4]).uniform(0, link.uplink.period_ms))
    network = Network(
        VirtualLink(link.uplink, begin_ms), VirtualLink(link.downlink, begin_ms), material.traffic.propagation_ms
    )
    return Engine(network, VirtualCloud(material.cloud, seed), material.traffic.deadline_ms)


def _parts(replays: Sequence[Replayed]) -> dict[str, float]:
    """Means over all samples. What fallbacks waited in vain for counts as network."""
    edge = np.concatenate([r.device_ms for r in replays])
    cloud = np.concatenate([r.queue_ms + r.compute_ms for r in replays])
    total = np.concatenate([r.total_ms for r in replays])
    parts = {"edge": edge.mean(), "cloud": cloud.mean(), "network": (total - edge - cloud).mean()}
    return {name: round(float(value), 3) for name, value in parts.items()}


# ---- the systems that need nothing but student and FM


def product(material: Material, slowness: float = 1.0, **switcher: Any) -> Maker:
    """EdgeFM under the settings of its switcher, from a cold start: the evidence window has to fill first."""

    def make(entry: Entry) -> System:
        device_ms = material.device.slower(slowness).draw(entry.rng, len(entry.order))
        config = SwitcherConfig(seed=entry.version.seed, **switcher)
        return edgefm(entry.recording, device_ms, config, material.traffic.deadline_ms, Calibration())

    return make


def edge_only(material: Material, slowness: float = 1.0) -> Maker:
    return fixed(material, lambda version: 0.0, slowness)


def cloud_only(material: Material, slowness: float = 1.0) -> Maker:
    """There is no student, so a query that meets its deadline leaves no answer."""

    def make(entry: Entry) -> System:
        mute = replace(entry.recording, edge_right=np.zeros_like(entry.recording.edge_right))
        return Fixed(mute, ENCODE_MS.slower(slowness).draw(entry.rng, len(entry.order)), math.inf)

    return make


def fixed(material: Material, threshold: Callable[[Version], float], slowness: float = 1.0) -> Maker:
    def make(entry: Entry) -> System:
        device_ms = material.device.slower(slowness).draw(entry.rng, len(entry.order))
        return Fixed(entry.recording, device_ms, threshold(entry.version))

    return make


def persephonee(material: Material, slowness: float = 1.0) -> Maker:
    def make(entry: Entry) -> System:
        rival, costs = material.rivals[entry.version.seed], _costs(material)
        factors = costs.draw(entry.rng, len(entry.order), slowness)
        return PersEPhonEE(rival.recording.at(entry.order), costs, rival.rule, factors)

    return make


def fm_on_device(material: Material, slowness: float = 1.0) -> Maker:
    """The whole FM on the device, with no exit before its end."""

    def make(entry: Entry) -> System:
        rival, costs = material.rivals[entry.version.seed], _costs(material)
        factors = costs.draw(entry.rng, len(entry.order), slowness)
        never = replace(rival.rule, threshold=math.inf, stay=np.ones_like(rival.rule.stay))
        return PersEPhonEE(rival.recording.at(entry.order), costs, never, factors)

    return make


def spinn(material: Material, slowness: float = 1.0) -> Maker:
    def make(entry: Entry) -> System:
        rival, costs, traffic = material.rivals[entry.version.seed], _costs(material), material.traffic
        encode = np.zeros_like(costs.pack_ms)
        encode[0] = ENCODE_MS.p50_ms  # an image that is sent as it is has to be read as well
        costs = replace(costs, pack_ms=costs.pack_ms + encode)
        factors = costs.draw(entry.rng, len(entry.order), slowness)
        recording = rival.recording.at(entry.order).with_payload(traffic.payload_bytes)
        return Spinn(recording, costs, rival.rule, factors, traffic.deadline_ms)

    return make


def _costs(material: Material) -> StageCosts:
    assert material.stages is not None, "the material of a contest with rivals has their costs"
    return material.stages


def lowest_threshold(versions: Sequence[Version], allowed_loss: float) -> float:
    """The lowest margin from which on the students' answers lose no more than allowed against the FM's, by ground truth:
    what no system can know, and what a threshold fixed beforehand can be at best."""
    margins = np.unique(np.concatenate([version.recording.margins for version in versions]))
    candidates = np.append(margins[:: max(len(margins) // 400, 1)], math.inf)
    for threshold in candidates:
        lost = [
            (v.recording.cloud_right.astype(float) - v.recording.edge_right)[v.recording.margins >= threshold].sum()
            / len(v.recording)
            for v in versions
        ]
        if np.mean(lost) <= allowed_loss:
            return float(threshold)
    return math.inf
