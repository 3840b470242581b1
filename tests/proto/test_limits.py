"""Limits that both ends set: the largest image fits, through a real channel, and no more than the limit does."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from edgefm.models.pool import MAX_LABEL_LENGTH
from edgefm.proto import limits
from edgefm.proto.v1 import edgefm_pb2 as pb

ECHO = "/edgefm.test/Echo"


@pytest.mark.parametrize("options", [limits.CHANNEL_OPTIONS, limits.SERVER_OPTIONS], ids=["channel", "server"])
def test_both_ends_set_both_message_limits(options):
    assert limits.MAX_MESSAGE_BYTES > limits.MAX_IMAGE_BYTES
    names = [name for name, _ in options]
    assert len(set(names)) == len(names)
    for direction in ("send", "receive"):
        assert dict(options)[f"grpc.max_{direction}_message_length"] == limits.MAX_MESSAGE_BYTES


def test_every_message_at_its_limits_fits():
    name, image = "n" * limits.MAX_NAME_LENGTH, bytes(limits.MAX_IMAGE_BYTES)
    label = "\N{OWL}" * MAX_LABEL_LENGTH  # four bytes a character
    largest = 2**64 - 1
    labels = [label] * limits.MAX_LABELS_PER_CALL
    for message in (
        pb.RecognizeRequest(
            query_id=largest,
            environment=name,
            image=image,
            deadline_ms=2**32 - 1,
            top_k=2**32 - 1,
            keep=True,
            propensity=0.02,
            device_id=name,
        ),
        pb.UploadRequest(upload_id=largest, environment=name, image=image, propensity=0.02, device_id=name),
        pb.FetchChunk(data=bytes(limits.FETCH_CHUNK_BYTES), offset_bytes=largest, total_bytes=largest, sha256="0" * 64),
        pb.RegisterRequest(protocol=1, device_id=name, environment=name, labels=labels, student_profile=name),
        pb.AddLabelsRequest(environment=name, labels=labels),
        pb.LabelPool(environment=name, pool_version="0" * 16, labels=labels),
    ):
        assert message.ByteSize() <= limits.MAX_MESSAGE_BYTES, type(message).__name__


@pytest.fixture
def server() -> Iterator[int]:
    """Echoes bytes; with our options. Yields its port."""
    handlers = {"Echo": grpc.unary_unary_rpc_method_handler(lambda request, _: request)}
    made = grpc.server(ThreadPoolExecutor(1), options=limits.SERVER_OPTIONS)
    made.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("edgefm.test", handlers),))
    port = made.add_insecure_port("127.0.0.1:0")
    made.start()
    yield port
    made.stop(None).wait()


def test_the_largest_message_crosses_both_ways_and_a_larger_one_does_not(server):
    with grpc.insecure_channel(f"127.0.0.1:{server}", options=limits.CHANNEL_OPTIONS) as channel:
        echo = channel.unary_unary(ECHO)
        largest = bytes(range(256)) * (limits.MAX_MESSAGE_BYTES // 256)
        assert len(largest) == limits.MAX_MESSAGE_BYTES
        assert echo(largest, timeout=20) == largest
        with pytest.raises(grpc.RpcError) as refused:
            echo(largest + b"x", timeout=20)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_server_refuses_what_another_client_sends_past_the_limit(server):
    unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{server}", options=unlimited) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(ECHO)(bytes(limits.MAX_MESSAGE_BYTES + 1), timeout=20)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert channel.unary_unary(ECHO)(b"still here", timeout=20) == b"still here"


def test_a_port_in_use_is_an_error(server):
    second = grpc.server(ThreadPoolExecutor(1), options=limits.SERVER_OPTIONS)
    with pytest.raises(RuntimeError, match="Failed to bind"):
        second.add_insecure_port(f"127.0.0.1:{server}")
