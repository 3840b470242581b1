"""Bytes that are no message, and messages out of all proportion, over a real socket."""

from __future__ import annotations

import logging

import grpc
import pytest
from edgefm.cloud.config import CloudConfig
from edgefm.models.images import encode_jpeg
from edgefm.proto.v1 import edgefm_pb2 as pb
from edgefm.proto.v1 import edgefm_pb2_grpc as rpc

_SERVICE = pb.DESCRIPTOR.services_by_name["EdgeFM"].full_name
_METHODS = tuple(pb.DESCRIPTOR.services_by_name["EdgeFM"].methods)
_NO_MESSAGE = b"\x0a\xff\xff\xff\xff\x0f"  # field 1, a string of 4 GiB, and then nothing


@pytest.fixture(scope="module")
def cloud(serve, tmp_path_factory):
    with serve(CloudConfig(tmp_path_factory.mktemp("cloud"), port=0, student="lite0-64")) as served:
        served.register("yard", "cat", "rocket")
        yield served


def _send(channel: grpc.Channel, method, *requests: bytes) -> list[bytes]:
    path, many = f"/{_SERVICE}/{method.name}", method.client_streaming
    kind = f"{'stream' if many else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    answer = getattr(channel, kind)(path)(iter(requests) if many else requests[0], timeout=20)
    return list(answer) if method.server_streaming else [answer]


@pytest.mark.parametrize("method", _METHODS, ids=lambda method: method.name)
def test_every_call_refuses_them_and_logs_no_traceback(cloud, caplog, method):
    with caplog.at_level(logging.INFO), pytest.raises(grpc.RpcError) as refused:
        _send(cloud.channel, method, _NO_MESSAGE)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "the same edgefm" in refused.value.details()
    assert not [record for record in caplog.records if record.exc_info]


def test_what_came_before_in_an_upload_is_kept_and_the_next_stream_is_served(cloud, make_picture):
    image = encode_jpeg(make_picture(1))
    upload = pb.UploadRequest(upload_id=1, environment="yard", image=image, propensity=1.0, device_id="d")
    query = pb.RecognizeRequest(query_id=7, environment="yard", image=image)
    methods = {method.name: method for method in _METHODS}
    for name, request in (("Upload", upload), ("Recognize", query)):
        with pytest.raises(grpc.RpcError):
            _send(cloud.channel, methods[name], request.SerializeToString(), _NO_MESSAGE)
    stub = rpc.EdgeFMStub(cloud.channel)
    (answer,) = stub.Recognize(iter([query]), timeout=20)
    assert answer.query_id == 7 and not answer.HasField("error")
    (ack,) = stub.Upload(iter([upload]), timeout=20).acks
    assert ack.upload_id == 1 and ack.sha256


@pytest.mark.parametrize("letter", ["a", "\U0001f98a"])
def test_an_error_that_quotes_a_long_value_still_reaches_its_sender(cloud, letter):
    with pytest.raises(grpc.RpcError) as refused:
        cloud.stub.Status(pb.StatusRequest(environment=letter * 10_000), timeout=20)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details().startswith(f"unknown environment '{letter}") and len(refused.value.details()) < 600
