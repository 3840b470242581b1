"""Load on a real cloud: what is counted, and what is not accepted for an answer."""

from __future__ import annotations

import os

import pytest
from edgefm.deploy.bench.clouds import cloud_without_learning, register
from edgefm.deploy.bench.cost import cpu_s, resident_mb
from edgefm.deploy.bench.load import Load, load_cloud
from edgefm.deploy.bench.pictures import pictures
from edgefm.edge.operator import Operator
from edgefm.models.errors import EdgeFMError, InputError

LABELS = ("cat", "rocket")


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    with cloud_without_learning(tmp_path_factory.mktemp("cloud")) as process:
        register(process, "bench", LABELS)
        yield process


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return pictures(64, 64, 8, seed=0)


def samples(target: str) -> int:
    with Operator(target) as operator:
        (environment,) = operator.status("bench").environments
    return environment.samples_stored


def test_answers_are_counted_and_kept_only_where_that_is_measured(cloud, images):
    before_s = cpu_s(cloud.pid)
    answered = load_cloud(cloud.port, "bench", False, Load(images, clients=4, warm_up_s=0.0, requests=24))
    assert 24 <= len(answered.latencies_ms) == answered.all_requests == sum(answered.labels.values()) < 24 + 4
    assert set(answered.labels) <= {*LABELS, "unknown"} and answered.cpu_s > 0
    assert sum(answered.latencies_ms) / 1e3 <= 4 * answered.seconds
    assert cpu_s(cloud.pid) > before_s and resident_mb(cloud.pid) > 100
    assert samples(cloud.target) == 0

    load = Load(images, clients=4, warm_up_s=0.0, requests=24, distinct_from=0)
    kept = load_cloud(cloud.port, "bench", True, load)
    assert samples(cloud.target) == kept.all_requests  # each picture was a new one


def test_the_warm_up_is_not_measured(cloud, images):
    answered = load_cloud(cloud.port, "bench", False, Load(images, clients=2, warm_up_s=0.5, seconds=0.5))
    assert 0 < len(answered.latencies_ms) < answered.all_requests
    assert answered.seconds == 0.5


def test_an_answer_that_is_none_ends_the_measurement(cloud, images):
    with pytest.raises(EdgeFMError, match="CODE_UNKNOWN_ENVIRONMENT"):
        load_cloud(cloud.port, "elsewhere", False, Load(images, clients=2, requests=10))


def test_a_process_that_has_ended_costs_nothing():
    assert cpu_s(session=2**22 + 1) == 0.0  # past Linux's largest process id
    assert resident_mb(os.getpid()) > 10
    with pytest.raises(InputError, match="measure on Linux"):
        resident_mb(2**22 + 1)
