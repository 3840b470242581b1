"""An operator's calls: labels and rollback, from any machine that reaches the cloud."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc

from ..models.checks import check_target
from ..models.errors import InputError, LabelExistsError, LabelMissingError
from ..proto.limits import CHANNEL_OPTIONS, DEFAULT_PORT
from ..proto.v1 import edgefm_pb2 as pb
from ..proto.v1 import edgefm_pb2_grpc as rpc
from .connection import translate

T = TypeVar("T")
_TIMEOUT_S = 30.0
_INPUT_ERRORS = {
    grpc.StatusCode.ALREADY_EXISTS: LabelExistsError,
    grpc.StatusCode.NOT_FOUND: LabelMissingError,
    grpc.StatusCode.INVALID_ARGUMENT: InputError,
}


@dataclass(frozen=True)
class PoolView:
    """The labels of an environment, as the cloud has them."""

    version: str
    labels: tuple[str, ...]
    warnings: tuple[str, ...]


class Operator:
    """A short connection to the cloud. Every call raises `CloudError`, or `InputError` for what the cloud refuses."""

    def __init__(self, target: str | None) -> None:
        self._target = check_target(target or f"127.0.0.1:{DEFAULT_PORT}")
        self._channel = grpc.insecure_channel(self._target, options=CHANNEL_OPTIONS)
        self._stub = rpc.EdgeFMStub(self._channel)

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def list_labels(self, environment: str) -> PoolView:
        return _view(self._call(self._stub.ListLabels, pb.ListLabelsRequest(environment=environment)))

    def add_labels(self, environment: str, labels: Sequence[str]) -> PoolView:
        return _view(self._call(self._stub.AddLabels, pb.AddLabelsRequest(environment=environment, labels=labels)))

    def remove_labels(self, environment: str, labels: Sequence[str]) -> PoolView:
        request = pb.RemoveLabelsRequest(environment=environment, labels=labels)
        return _view(self._call(self._stub.RemoveLabels, request))

    def rollback(self, environment: str, version: int | None = None) -> int:
        """Returns the version that is current now."""
        return self._call(self._stub.Rollback, pb.RollbackRequest(environment=environment, version=version)).version

    def status(self, environment: str = "") -> pb.StatusResponse:
        """What the cloud runs, in one environment or in all."""
        return self._call(self._stub.Status, pb.StatusRequest(environment=environment))

    def _call(self, method: Callable[..., T], request: object) -> T:
        try:
            return method(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            if isinstance(error, grpc.Call) and code in _INPUT_ERRORS:
                raise _INPUT_ERRORS[code](error.details() or "refused") from error
            raise translate(error, self._target) from error


def _view(message: pb.LabelPool) -> PoolView:
    return PoolView(message.pool_version, tuple(message.labels), tuple(message.warnings))
