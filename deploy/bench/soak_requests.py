"""Requests of every call that a device makes, mutated: fields of other values; bits flipped, bytes cut, put in, repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message

from ...proto.limits import PROTOCOL_VERSION
from ...proto.v1 import edgefm_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["EdgeFM"].full_name
_TIMEOUT_S = 5.0
_MOST_CHANGES = 3
_STRINGS = ("", "..", "../../etc", "a" * 10_000, "two\nlines", "\0", "gr\u00fcn", "\U0001f98a")
_NUMBERS = (0, 1, 2**31 - 1, 2**32 - 1)
_FLOATS = (0.0, -1.0, 1e38, float("nan"), float("inf"))
_LONGEST_CHANGE = 64
_HANDLER_FAILED = "Unexpected "
"""What gRPC says for a handler that raised something that it did not mean to."""


class MutatedRequests:
    """One connection that sends what no device means.

    Attributes:
        unhandled: what the cloud said of exceptions that nothing caught.
    """

    def __init__(self, target: str, environment: str, image: bytes) -> None:
        self._channel = grpc.insecure_channel(target)
        self._valid = _valid_requests(environment, image)
        self.unhandled: list[str] = []

    def close(self) -> None:
        self._channel.close()

    def send(self, rng: np.random.Generator) -> str:
        """One mutated request; returns the call with what came back: a status code, or the code of an answer's error."""
        name, valid = self._valid[rng.integers(len(self._valid))]
        try:
            mutate = _bytes_mutated if rng.random() < 0.5 else _fields_mutated
            outcome = self._call(name, mutate(valid, rng))
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            details = (error.details() if isinstance(error, grpc.Call) else None) or ""
            if details.startswith(_HANDLER_FAILED):
                self.unhandled.append(f"{name}: {details}")
            outcome = code.name if code is not None else "UNKNOWN"
        return f"{name} {outcome}"

    def _call(self, name: str, request: bytes) -> str:
        path = f"/{_SERVICE}/{name}"
        if name == "Recognize":
            answers = self._channel.stream_stream(path, bytes, bytes)(iter([request]), timeout=_TIMEOUT_S)
            return _errors_of([pb.RecognizeResponse.FromString(answer).error for answer in answers])
        if name == "Upload":
            answer = pb.UploadResponse.FromString(
                self._channel.stream_unary(path, bytes, bytes)(iter([request]), timeout=_TIMEOUT_S)
            )
            return _errors_of([ack.error for ack in answer.acks])
        if name in ("Watch", "Fetch"):
            call = self._channel.unary_stream(path, bytes, bytes)(request, timeout=_TIMEOUT_S)
            next(iter(call), None)
            call.cancel()
            return "OK"
        self._channel.unary_unary(path, bytes, bytes)(request, timeout=_TIMEOUT_S)
        return "OK"


def _valid_requests(environment: str, image: bytes) -> list[tuple[str, Message]]:
    """Each changes nothing as it is; what is mutated may."""
    refusal = pb.Refusal(student_version=1, kind=pb.Refusal.KIND_SLOW, reason="mutated")
    half = image[: len(image) // 2]
    requests: dict[str, Any] = {
        "Register": pb.RegisterRequest(protocol=PROTOCOL_VERSION, student_profile="lite0-64", labels=["cat"]),
        "Recognize": pb.RecognizeRequest(query_id=1, image=image, deadline_ms=2000, propensity=1.0),
        "Upload": pb.UploadRequest(upload_id=1, image=half, propensity=0.5),
        "Watch": pb.WatchRequest(),
        "Report": pb.ReportRequest(refusals=[refusal]),
    }
    for request in requests.values():
        request.device_id, request.environment = "mutant", environment
    requests |= {
        "Fetch": pb.FetchRequest(sha256="0" * 64),
        "Status": pb.StatusRequest(environment=environment),
        "ListLabels": pb.ListLabelsRequest(environment=environment),
    }
    return list(requests.items())


def _fields_mutated(request: Message, rng: np.random.Generator) -> bytes:
    """Still a message: some of its fields, of one value each, have another."""
    mutant = type(request)()
    mutant.CopyFrom(request)
    values = {str: _STRINGS, int: _NUMBERS, float: _FLOATS, bool: (False, True)}
    for field in request.DESCRIPTOR.fields:
        kind = type(getattr(mutant, field.name))
        if kind in values and rng.random() < 0.3:
            setattr(mutant, field.name, values[kind][rng.integers(len(values[kind]))])
    return mutant.SerializeToString()


def _bytes_mutated(request: Message, rng: np.random.Generator) -> bytes:
    """Mostly no message any more."""
    data = bytearray(request.SerializeToString())
    changes: tuple[Callable[[bytearray, int, int], None], ...] = (_flip, _cut, _repeat, _put_in(rng))
    for _ in range(int(rng.integers(1, _MOST_CHANGES + 1))):
        if data:
            # Every other change hits the start, where the short fields are; the rest is the image.
            at = int(rng.integers(len(data) if rng.random() < 0.5 else min(len(data), _LONGEST_CHANGE)))
            changes[rng.integers(len(changes))](data, at, int(rng.integers(1, _LONGEST_CHANGE)))
    return bytes(data)


def _flip(data: bytearray, at: int, length: int) -> None:
    data[at] ^= 1 << (length % 8)


def _cut(data: bytearray, at: int, length: int) -> None:
    del data[at : at + length]


def _repeat(data: bytearray, at: int, length: int) -> None:
    data[at:at] = data[at : at + length]


def _put_in(rng: np.random.Generator) -> Callable[[bytearray, int, int], None]:
    def put_in(data: bytearray, at: int, length: int) -> None:
        data[at:at] = rng.bytes(length)

    return put_in


def _errors_of(errors: list[pb.QueryError]) -> str:
    codes = sorted({pb.QueryError.Code.Name(error.code) for error in errors if error.code or error.message})
    return " ".join(codes) or "OK"
