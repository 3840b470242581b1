"""Descriptions over a real socket: asked for, set by hand, listed; and what is refused."""

from __future__ import annotations

import grpc
import pytest
from edgefm.cloud.config import CloudConfig
from edgefm.edge.operator import Operator
from edgefm.models.errors import CloudError, InputError, LabelMissingError
from edgefm.models.pool import MAX_DESCRIPTION_LENGTH, LabelPool
from edgefm.proto.limits import MAX_LABELS_PER_CALL
from edgefm.proto.v1 import edgefm_pb2 as pb

from .conftest import BASE

BY_HAND = "A bird with a flat face and large eyes."


async def describer(label: str) -> tuple[str, ...]:
    return (f"A {label} is round, with {len(label)} parts.",)


@pytest.fixture(scope="module")
def described(tmp_path_factory, serve):
    """A cloud whose language model is a function of the label."""
    folder = tmp_path_factory.mktemp("described")
    with serve(CloudConfig(folder, port=0, labels=BASE, student="lite0-64"), describer) as served:
        yield served


@pytest.fixture
def operator(described):
    with Operator(f"127.0.0.1:{described.server.port}") as operator:
        yield operator


def test_added_labels_are_described_and_reach_devices_with_their_pool(described, operator, until):
    described.register("yard", "owl")
    watch = described.stub.Watch(pb.WatchRequest(device_id="d", environment="yard"), timeout=60)
    before = next(watch).pool
    added = operator.add_labels(
        "yard", ["sumac berries"]
    )  # there is a language model: it is asked unless told otherwise
    assert added.labels[-1] == "sumac berries" and added.pending == 1 and added.described == 0
    operator.add_labels("yard", ["kettle"], describe=False)
    until(lambda: operator.list_labels("yard").pending == 0)
    found = {each.label: each for each in operator.descriptions("yard")}
    assert list(found) == [*BASE, "owl", "sumac berries", "kettle"]
    assert {label: each.texts for label, each in found.items() if each.texts} == {
        "sumac berries": ("A sumac berries is round, with 13 parts.",)
    }
    assert not any(each.pending or each.failure for each in found.values())
    pool = described.server.environments.pool("yard")[0]
    assert operator.list_labels("yard").version == pool.version != added.version
    versions = [before.version]
    while versions[-1] != pool.version:
        event = next(watch)
        if event.WhichOneof("change") == "pool":
            versions.append(event.pool.version)
            data = b"".join(c.data for c in described.stub.Fetch(pb.FetchRequest(sha256=event.pool.file.sha256)))
    watch.cancel()
    assert LabelPool.from_bytes(data).descriptions == pool.descriptions


def test_by_hand_anew_and_away_again(operator, until):
    operator.add_labels("", ["barn owl"], describe=False)
    alone = operator.list_labels("").version
    by_hand = operator.set_descriptions("", {" barn  owl": [BY_HAND, f" {BY_HAND}"]})
    assert by_hand.described == 1 and by_hand.version != alone
    (shown,) = operator.descriptions("", "barn owl")
    assert shown.texts == (BY_HAND,) and not shown.pending
    operator.describe_labels("", ["barn owl"])
    until(lambda: operator.descriptions("", "barn owl")[0].texts == ("A barn owl is round, with 8 parts.",))
    assert operator.set_descriptions("", {"barn owl": []}).version == alone


def test_a_new_environment_takes_descriptions_over_with_the_labels(described, operator):
    operator.set_descriptions("", {"rocket": ["It flies to the moon."]})
    described.register("new")
    assert operator.descriptions("new", "rocket")[0].texts == ("It flies to the moon.",)
    operator.set_descriptions("", {"rocket": []})
    assert operator.descriptions("new", "rocket")[0].texts == ("It flies to the moon.",)


@pytest.mark.parametrize(
    ("label", "texts", "says"),
    [
        ("cat", [" "], "non-empty printable text"),
        ("cat", ["a\0b"], "printable"),
        ("cat", ["x" * (MAX_DESCRIPTION_LENGTH + 1)], "at most 300 characters"),
        ("cat", [str(i) for i in range(17)], "at most 16 descriptions"),
        ("", ["x"], "a label must be non-empty"),
    ],
)
def test_unusable_descriptions_are_refused_and_change_nothing(operator, label, texts, says):
    before = operator.list_labels("")
    with pytest.raises(InputError, match=says):
        operator.set_descriptions("", {"rocket": ["Fine."], label: texts})
    assert operator.list_labels("") == before


def test_labels_that_are_not_there_are_named(operator):
    for call in (
        lambda: operator.set_descriptions("", {"fox": ["Red."]}),
        lambda: operator.describe_labels("", ["fox"]),
        lambda: operator.descriptions("", "fox"),
    ):
        with pytest.raises(LabelMissingError, match="not in the pool of base: fox"):
            call()
    with pytest.raises(InputError, match="unknown environment 'nowhere'"):
        operator.descriptions("nowhere")


def test_a_label_twice_and_too_many_are_refused(described, status_of):
    twice = pb.SetDescriptionsRequest(labels=[pb.LabelDescriptions(label="cat", texts=["Small."])] * 2)
    code, text = status_of(lambda: described.stub.SetDescriptions(twice))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "described twice" in text
    many = [pb.LabelDescriptions(label=str(i)) for i in range(MAX_LABELS_PER_CALL + 1)]
    code, text = status_of(lambda: described.stub.SetDescriptions(pb.SetDescriptionsRequest(labels=many)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "at most" in text


def test_a_cloud_without_a_language_model_says_how_to_get_one(cloud, environment, status_of):
    before = cloud.stub.ListLabels(pb.ListLabelsRequest(environment=environment))
    for call in (
        lambda: cloud.stub.AddLabels(pb.AddLabelsRequest(environment=environment, labels=["fox"], describe=True)),
        lambda: cloud.stub.DescribeLabels(pb.DescribeLabelsRequest(environment=environment, labels=["cat"])),
    ):
        code, text = status_of(call)
        assert code is grpc.StatusCode.FAILED_PRECONDITION and "--language smollm2" in text
    assert cloud.stub.ListLabels(pb.ListLabelsRequest(environment=environment)) == before
    with (
        Operator(f"127.0.0.1:{cloud.server.port}") as operator,
        pytest.raises(CloudError, match="no language model"),
    ):
        operator.add_labels(environment, ["fox"], describe=True)
    cloud.stub.AddLabels(
        pb.AddLabelsRequest(environment=environment, labels=["fox"])
    )  # unless told to, it does without
