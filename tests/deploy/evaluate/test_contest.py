"""Systems on one link, image by image."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from edgefm.deploy.evaluate import contest
from edgefm.deploy.evaluate.experiment import Link, Material, Traffic
from edgefm.deploy.evaluate.study import FULL, Version
from edgefm.deploy.replay.recording import Recording
from edgefm.deploy.replay.timing import BatchCost, CloudProfile, Timing
from edgefm.deploy.traces import constant_trace
from edgefm.models.confidence import Confidence

IMAGES = 60
LINK = Link("even", constant_trace(6.0), constant_trace(6.0))


def version(seed: int, method: str = FULL, samples: int = 400) -> Version:
    """A student that is right where its margin is above 0.1, beside an FM that is always right."""
    rng = np.random.default_rng(seed)
    margins = rng.uniform(0, 0.5, IMAGES)
    right = margins > 0.1
    recording = Recording(margins, right.astype(float), right, np.ones(IMAGES, bool), np.full(IMAGES, 2000))
    return Version("place", seed, method, samples, np.zeros((IMAGES, 3)), recording, Confidence(0.05), 0.1)


@pytest.fixture(scope="module")
def material() -> Material:
    cost = BatchCost(size=1, p50_ms=20.0, p95_ms=25.0)
    return Material(
        looks=("place",),
        fm={},
        versions=[version(seed) for seed in range(3)] + [version(0, samples=100)],
        seeds=3,
        target=0.99,
        student="lite0-64",
        device=Timing(4.0, 5.0),
        cloud=CloudProfile(source="a test", foundation_model="none", batches=(cost,)),
        links=[LINK],
        traffic=Traffic(),
        samples=600,
    )


def test_the_version_that_has_learned_most(material: Material) -> None:
    assert material.version("place", 0, FULL).samples == 400
    assert material.version("place", 0, FULL, 100).samples == 100


def test_edge_only_and_cloud_only_are_the_two_ends(material: Material) -> None:
    edge = contest.compete(material, "place", LINK, contest.edge_only(material))
    cloud = contest.compete(material, "place", LINK, contest.cloud_only(material))
    assert edge.shares["edge"] == 1.0 and cloud.shares["cloud"] == 1.0
    assert edge.latency_ms.mean() == pytest.approx(material.device.mean_ms, rel=0.05)
    assert edge.latency_ms.shape == edge.right.shape == (3, IMAGES)
    assert np.array_equal(edge.right[0] == 1.0, material.version("place", 0, FULL).recording.edge_right)
    assert cloud.right.min() == 1.0
    # 14 packets of 2 ms each for 20 kB at 6 Mbit/s, the round trip, the FM.
    assert 28 + 50 + 20 < cloud.latency_ms.mean() < 28 + 50 + 20 + 8
    parts = sum(cloud.parts_ms.values())
    assert parts == pytest.approx(cloud.latency_ms.mean(), rel=0.01)


def test_the_product_lies_between_and_keeps_its_target(material: Material) -> None:
    cloud = contest.compete(material, "place", LINK, contest.cloud_only(material))
    ours = contest.compete(material, "place", LINK, contest.product(material, accuracy_target=0.99))
    described = ours.described(cloud)
    assert 0.4 < ours.shares["edge"] < 0.9
    assert described["latency_over_cloud_only"] < 0.8
    assert described["accuracy_minus_cloud_only"]["mean"] > -0.02
    assert described["accuracy_minus_cloud_only"]["interval"][0] <= described["accuracy_minus_cloud_only"]["mean"]


def test_the_lowest_threshold_is_where_the_student_stops_losing(material: Material) -> None:
    versions = material.versions[:3]
    threshold = contest.lowest_threshold(versions, 0.0)
    assert 0.09 < threshold < 0.13
    assert contest.lowest_threshold(versions, 1.0) < 0.02
    never = replace(versions[0], recording=replace(versions[0].recording, edge_right=np.zeros(IMAGES, bool)))
    assert contest.lowest_threshold([never], 0.0) == math.inf


def test_every_image_is_replayed_as_often_as_the_others() -> None:
    order = contest._order(IMAGES, 150, seed=1)
    counts = np.bincount(order, minlength=IMAGES)
    assert counts.sum() == 150 and set(counts) <= {2, 3}
