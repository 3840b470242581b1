"""The cloud's language model from any machine that reaches it: text as it comes, and the typed uses of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import grpc

from ..models.checks import check_target
from ..models.errors import CloudError, DeadlineError, EdgeFMError, InputError, NoLanguageModelError, OverloadedError
from ..proto.limits import CHANNEL_OPTIONS, DEFAULT_PORT
from ..proto.v1 import edgefm_pb2 as pb
from ..proto.v1 import edgefm_pb2_grpc as rpc
from ..proto.v1 import language_pb2, language_pb2_grpc
from .connection import pushback_s, translate

T = TypeVar("T")
_TOP = 5
"""Candidates that the FM is asked for."""
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class RankedLabel:
    label: str
    probability: float
    fm_probability: float


@dataclass(frozen=True)
class Ranking:
    """Attributes:
    labels: likeliest first, "unknown" among them.
    reason: the model's own words.
    """

    labels: tuple[RankedLabel, ...]
    reason: str


class LanguageClient:
    """A short connection to the cloud's language model.

    Every call raises `CloudError`; `InputError` for what the cloud refuses; `OverloadedError` where too many wait;
    `DeadlineError` past `deadline_ms`; `NoLanguageModelError` where the cloud runs none.
    """

    def __init__(self, target: str | None, client_id: str = "") -> None:
        self._target, self._client_id = check_target(target or f"127.0.0.1:{DEFAULT_PORT}"), client_id
        self._channel = grpc.insecure_channel(self._target, options=CHANNEL_OPTIONS)
        self._stub = language_pb2_grpc.LanguageStub(self._channel)

    def __enter__(self) -> LanguageClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def generate(
        self, question: str, max_tokens: int = 0, temperature: float = 0.0, seed: int = 0, deadline_ms: int = 0
    ) -> Iterator[str]:
        """Pieces of the answer to one message."""
        message = _built(language_pb2.ChatMessage, role=language_pb2.ChatMessage.ROLE_USER, content=question)
        request = _built(
            language_pb2.GenerateRequest,
            messages=[message],
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            deadline_ms=deadline_ms,
            client_id=self._client_id,
        )
        return self._pieces(self._stub.Generate, request)

    def ask(self, environment: str, question: str, deadline_ms: int = 0) -> Iterator[str]:
        """Pieces of the answer to a question about an environment."""
        request = _built(
            language_pb2.AskRequest,
            environment=environment,
            question=question,
            deadline_ms=deadline_ms,
            client_id=self._client_id,
        )
        return self._pieces(self._stub.Ask, request)

    def describe(self, label: str, deadline_ms: int = 0) -> tuple[str, ...]:
        """What the model says that a label looks like; nothing is stored."""
        request = _built(language_pb2.DescribeRequest, label=label, deadline_ms=deadline_ms, client_id=self._client_id)
        return tuple(self._call(self._stub.Describe, request).descriptions)

    def rank(self, environment: str, image: bytes, deadline_ms: int = 0) -> Ranking:
        """What the FM takes an encoded image for, with what it answered there lately and, where the cloud's settings ask for it,
        the language model's opinion. It is not kept."""
        asked = pb.RecognizeRequest(environment=environment, image=image, top_k=_TOP)
        found = self._call(self._recognised, asked)
        if found.HasField("error"):
            raise _refused(found.error)
        request = _built(
            language_pb2.RankRequest,
            environment=environment,
            candidates=found.matches,
            deadline_ms=deadline_ms,
            client_id=self._client_id,
        )
        ranked = self._call(self._stub.Rank, request)
        labels = (RankedLabel(one.label, one.probability, one.fm_probability) for one in ranked.ranking)
        return Ranking(tuple(labels), ranked.reason)

    def _recognised(self, request: pb.RecognizeRequest) -> pb.RecognizeResponse:
        (found,) = rpc.EdgeFMStub(self._channel).Recognize(iter([request]), timeout=_TIMEOUT_S)
        return found

    def _pieces(self, method: Callable[..., Iterable[language_pb2.GenerateResponse]], request: object) -> Iterator[str]:
        try:
            for response in method(request):
                if response.text:
                    yield response.text
        except grpc.RpcError as error:
            raise self._translated(error) from error

    def _call(self, method: Callable[..., T], request: object) -> T:
        try:
            return method(request)
        except grpc.RpcError as error:
            raise self._translated(error) from error

    def _translated(self, error: grpc.RpcError) -> EdgeFMError:
        code = error.code() if isinstance(error, grpc.Call) else None
        details = (error.details() if isinstance(error, grpc.Call) else None) or "refused"
        if code == grpc.StatusCode.UNIMPLEMENTED:
            return NoLanguageModelError(f"{self._target} runs no language model; start that cloud with --language")
        if code == grpc.StatusCode.INVALID_ARGUMENT:
            return InputError(details)
        hint_s = pushback_s(error) if isinstance(error, grpc.Call) else None
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED and hint_s is not None:
            return OverloadedError(f"{self._target}: {details}", round(hint_s * 1e3))
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError(f"{self._target}: {details}")
        return translate(error, self._target)


def _built(kind: Callable[..., T], **fields: object) -> T:
    """A request. Raises `InputError` for a value that the wire cannot carry."""
    try:
        return kind(**fields)
    except (ValueError, TypeError) as error:  # out of range, or text that is no UTF-8
        raise InputError(f"this cannot be asked: {error}") from error


def _refused(error: pb.QueryError) -> EdgeFMError:
    if error.code == pb.QueryError.CODE_OVERLOADED:
        return OverloadedError(error.message, error.retry_after_ms)
    if error.code == pb.QueryError.CODE_INTERNAL:
        return CloudError(error.message)
    return InputError(error.message)
