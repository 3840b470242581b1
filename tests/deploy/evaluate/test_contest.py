"""Systems on one link, image by image."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edgefm.deploy.evaluate import contest
from edgefm.deploy.evaluate.experiment import Link, Material, Traffic
from edgefm.deploy.evaluate.run import EvaluateOptions
from edgefm.deploy.evaluate.study import FULL
from edgefm.deploy.traces import constant_trace
from edgefm.models.errors import ConfigError, InputError


def test_the_version_that_has_learned_most(material: Material) -> None:
    assert material.version("place", 0, FULL).samples == 400
    assert material.version("place", 0, FULL, 100).samples == 100


def test_edge_only_and_cloud_only_are_the_two_ends(material: Material) -> None:
    edge = contest.compete(material, "place", material.links[0], contest.edge_only(material))
    cloud = contest.compete(material, "place", material.links[0], contest.cloud_only(material))
    assert edge.shares["edge"] == 1.0 and cloud.shares["cloud"] == 1.0
    assert edge.latency_ms.mean() == pytest.approx(material.device.mean_ms, rel=0.05)
    assert edge.latency_ms.shape == edge.right.shape == (3, 60)
    assert np.array_equal(edge.right[0] == 1.0, material.version("place", 0, FULL).recording.edge_right)
    assert np.array_equal(cloud.right[0] == 1.0, material.version("place", 0, FULL).recording.cloud_right)
    # 14 packets of 2 ms each for 20 kB at 6 Mbit/s, the round trip, the FM.
    assert 28 + 50 + 20 < cloud.latency_ms.mean() < 28 + 50 + 20 + 8
    parts = sum(cloud.parts_ms.values())
    assert parts == pytest.approx(cloud.latency_ms.mean(), rel=0.01)


def test_the_product_lies_between_and_keeps_its_target(material: Material) -> None:
    material = replace(material, samples=1200)  # its cold start takes a while
    cloud = contest.compete(material, "place", material.links[0], contest.cloud_only(material))
    ours = contest.compete(material, "place", material.links[0], contest.product(material, accuracy_target=0.99))
    described = ours.described(cloud)
    assert 0.4 < ours.shares["edge"] < 0.9
    ratio = described["latency_over_cloud_only"]
    assert ratio["interval"][0] <= ratio["mean"] <= ratio["interval"][1] < 0.8
    assert described["accuracy_minus_cloud_only"]["mean"] > -0.02
    assert described["accuracy_minus_cloud_only"]["interval"][0] <= described["accuracy_minus_cloud_only"]["mean"]


def test_a_query_of_cloud_only_without_an_answer_is_not_right(material: Material) -> None:
    outage = Link("hardly any", constant_trace(0.1), constant_trace(0.1))
    cloud = contest.compete(material, "place", outage, contest.cloud_only(material))
    assert cloud.shares["fallback"] > 0.9 and cloud.right.mean() < 0.1
    assert cloud.accuracy_minus_fm()["mean"] < -0.8


def test_the_fm_on_the_device_asks_nobody_and_loses_nothing(material: Material) -> None:
    alone = contest.compete(material, "place", material.links[0], contest.fm_on_device(material, slowness=2.0))
    assert alone.shares["edge"] == 1.0 and alone.latency_ms.mean() == pytest.approx(2 * 18.0, rel=0.1)


def test_the_lowest_threshold_is_where_the_student_stops_losing(material: Material) -> None:
    versions = [material.version("place", seed, FULL) for seed in range(3)]
    threshold = contest.lowest_threshold(versions, 0.0)
    assert 0.05 < threshold < 0.13
    assert contest.lowest_threshold(versions, 1.0) < 0.02
    never = replace(versions[0], recording=replace(versions[0].recording, edge_right=np.zeros(60, bool)))
    assert contest.lowest_threshold([never], 0.0) == math.inf


def test_every_image_is_replayed_as_often_as_the_others() -> None:
    order = contest._order(60, 150, seed=1)
    counts = np.bincount(order, minlength=60)
    assert counts.sum() == 150 and set(counts) <= {2, 3}


def test_rivals_answer_for_themselves(material: Material) -> None:
    link = material.links[0]
    alone = contest.compete(material, "place", link, contest.persephonee(material))
    assert alone.shares["edge"] == 1.0 and alone.right.min() == 1.0
    assert 10 < alone.latency_ms.mean() < 18, "every other sample leaves at the second exit"
    slow = contest.compete(material, "place", link, contest.spinn(material, slowness=50.0))
    assert slow.shares["cloud"] > 0.9, "a device so slow sends the image"
    fast = contest.compete(material, "place", link, contest.spinn(material))
    assert fast.latency_ms.mean() < slow.latency_ms.mean()


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"rate": math.nan}, {"payload_bytes": 0}, {"propagation_ms": -5.0}])
def test_traffic_that_cannot_be_is_an_error_before_anything_is_learned(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="traffic needs"):
        Traffic(**wrong)


def test_data_of_one_name_and_systems_that_there_are_not_are_errors() -> None:
    def options(*data: str, systems: tuple[str, ...] = ()) -> EvaluateOptions:
        return EvaluateOptions(tuple(map(Path, data)), (), "lite0-64", 0.99, True, Traffic(), systems=systems)

    with pytest.raises(InputError, match="two data sets are called 'animals'"):
        options("animals.v1.tar", "elsewhere/animals.v2.tar")
    with pytest.raises(ConfigError, match="no system 'clip'; there are edgefm"):
        options("animals", systems=("edgefm", "clip"))
