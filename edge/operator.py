"""An operator's calls: labels, what describes them, and rollback, from any machine that reaches the cloud."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    """The labels of an environment, as the cloud has them.

    Attributes:
        described: how many have descriptions.
        pending: how many the language model is still to describe.
    """

    version: str
    labels: tuple[str, ...]
    warnings: tuple[str, ...]
    described: int
    pending: int


@dataclass(frozen=True)
class DescribedLabel:
    """Attributes:
    texts: what it looks like; perhaps none.
    pending: the language model is still to describe it.
    failure: why the language model did not; empty otherwise.
    """

    label: str
    texts: tuple[str, ...]
    pending: bool
    failure: str


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

    def add_labels(self, environment: str, labels: Sequence[str], describe: bool | None = None) -> PoolView:
        """`describe`: the cloud's language model writes what they look like, some time after this call; None: if it has one."""
        request = pb.AddLabelsRequest(environment=environment, labels=labels, describe=describe)
        return _view(self._call(self._stub.AddLabels, request))

    def remove_labels(self, environment: str, labels: Sequence[str]) -> PoolView:
        request = pb.RemoveLabelsRequest(environment=environment, labels=labels)
        return _view(self._call(self._stub.RemoveLabels, request))

    def describe_labels(self, environment: str, labels: Sequence[str]) -> PoolView:
        """The cloud's language model describes labels anew, some time after this call."""
        request = pb.DescribeLabelsRequest(environment=environment, labels=labels)
        return _view(self._call(self._stub.DescribeLabels, request))

    def set_descriptions(self, environment: str, descriptions: Mapping[str, Sequence[str]]) -> PoolView:
        """Replaces the descriptions of the given labels, of all or of none; an empty sequence removes a label's."""
        labels = [pb.LabelDescriptions(label=label, texts=texts) for label, texts in descriptions.items()]
        request = pb.SetDescriptionsRequest(environment=environment, labels=labels)
        return _view(self._call(self._stub.SetDescriptions, request))

    def descriptions(self, environment: str, label: str = "") -> list[DescribedLabel]:
        """Of one label, or of all in the pool's order."""
        request = pb.ListDescriptionsRequest(environment=environment, label=label)
        with self._translated():
            return [
                DescribedLabel(each.label, tuple(each.texts), each.pending, each.failure)
                for each in self._stub.ListDescriptions(request, timeout=_TIMEOUT_S)
            ]

    def rollback(self, environment: str, version: int | None = None) -> int:
        """Returns the version that is current now."""
        return self._call(self._stub.Rollback, pb.RollbackRequest(environment=environment, version=version)).version

    def status(self, environment: str = "") -> pb.StatusResponse:
        """What the cloud runs, in one environment or in all."""
        return self._call(self._stub.Status, pb.StatusRequest(environment=environment))

    def _call(self, method: Callable[..., T], request: object) -> T:
        with self._translated():
            return method(request, timeout=_TIMEOUT_S)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            if isinstance(error, grpc.Call) and code in _INPUT_ERRORS:
                raise _INPUT_ERRORS[code](error.details() or "refused") from error
            raise translate(error, self._target) from error


def _view(message: pb.LabelPool) -> PoolView:
    return PoolView(
        message.pool_version, tuple(message.labels), tuple(message.warnings), message.described, message.pending
    )
