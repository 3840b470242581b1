"""The `Language` gRPC service: translation between the wire and the engine, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence

from ...models.checks import check_device_id
from ...models.errors import EdgeFMError, InputError
from ...models.language.describe import descriptions, requests
from ...models.language.generate import Sampling
from ...models.language.tokenizer import Message, TextStream
from ...models.pool import UNKNOWN, check_labels
from ...proto.limits import MAX_MESSAGES_PER_CALL, MAX_TEXT_LENGTH
from ...proto.v1 import language_pb2 as pb
from ...proto.v1 import language_pb2_grpc as rpc
from ..config import LanguageConfig
from ..environments import Environments
from ..recent import RecentAnswers
from ..status import environment_status
from ..wire import Context, abort
from . import uses
from .engine import LanguageEngine

DEFAULT_TOKENS = 256
ANSWER_TOKENS = 160
"""Of an answer to an operator, at most."""
REASON_TOKENS = 40
_ROLES: dict[int, str] = {
    pb.ChatMessage.ROLE_SYSTEM: "system",
    pb.ChatMessage.ROLE_USER: "user",
    pb.ChatMessage.ROLE_ASSISTANT: "assistant",
}


class LanguageService(rpc.LanguageServicer):
    """See `proto/v1/language.proto` for what each call promises."""

    def __init__(
        self, engine: LanguageEngine, environments: Environments, recent: RecentAnswers, config: LanguageConfig
    ) -> None:
        self._engine, self._environments, self._recent = engine, environments, recent
        self._most, self._rank_weight = config.max_tokens, config.rank_weight

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
        try:
            messages = _messages(request.messages)
            tokens = request.max_tokens or min(DEFAULT_TOKENS, self._most)
            if tokens > self._most:
                raise InputError(f"max_tokens is at most {self._most} here, got {tokens}")
            sampling = Sampling(tokens, request.temperature, request.top_p or 1.0, request.seed % 2**63)
            async for part in self._streamed(
                messages, sampling, "generate", _owner(request.client_id, context), request.deadline_ms
            ):
                yield part
        except EdgeFMError as error:
            await abort(context, error)

    async def Ask(self, request: pb.AskRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
        try:
            question = _text(request.question, "question")
            status = environment_status(self._environments, request.environment, ())
            pool, _ = self._environments.pool(request.environment)
            messages = uses.ask_messages(question, status, pool.labels, self._recent.of(request.environment))
            sampling, owner = Sampling(min(ANSWER_TOKENS, self._most)), _owner(request.client_id, context)
            async for part in self._streamed(messages, sampling, "ask", owner, request.deadline_ms):
                yield part
        except EdgeFMError as error:
            await abort(context, error)

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:  # noqa: N802
        try:
            owner = _owner(request.client_id, context)
            return pb.DescribeResponse(
                descriptions=await describe(self._engine, request.label, owner, request.deadline_ms)
            )
        except EdgeFMError as error:
            await abort(context, error)

    async def Rank(self, request: pb.RankRequest, context: Context) -> pb.RankResponse:  # noqa: N802
        try:
            pool, _ = self._environments.pool(request.environment)
            fm = uses.fm_log_probabilities(pool, {match.label: match.similarity for match in request.candidates})
            owner, ends_at = _owner(request.client_id, context), time.perf_counter() + request.deadline_ms / 1e3

            def left_ms() -> float:
                return max((ends_at - time.perf_counter()) * 1e3, 1.0) if request.deadline_ms else 0.0

            candidates, recent = list(fm), self._recent.of(request.environment)
            messages = uses.rank_messages(request.environment, recent, pool.descriptions, candidates)
            evidence = [uses.frequencies(candidates, recent)]
            if self._rank_weight:
                told = await self._scores(messages, candidates, left_ms())
                untold = await self._scores(uses.rank_messages_without(candidates), candidates, left_ms())
                tokens = {label: self._engine.count(f" {label}") for label in candidates}
                evidence.append(uses.opinion(told, untold, tokens, self._rank_weight))
            ranking = uses.ranking(fm, *evidence)
            begun = f"{uses.BEGUN} {ranking[0].label}, because"
            asked, sampling = uses.reason_messages(messages), Sampling(min(REASON_TOKENS, self._most))
            words = await answer(self._engine, asked, sampling, "rank", owner, left_ms(), begun)
            return pb.RankResponse(
                ranking=[
                    pb.Ranked(label=one.label, probability=one.probability, fm_probability=one.fm_probability)
                    for one in ranking
                ],
                unknown=ranking[0].label == UNKNOWN,
                reason=uses.first_sentence(f"{begun}{words}"),
            )
        except EdgeFMError as error:
            await abort(context, error)

    async def _scores(
        self, messages: Sequence[Message], labels: Sequence[str], deadline_ms: float
    ) -> Mapping[str, float]:
        found = await self._engine.scores(messages, uses.BEGUN, [f" {label}" for label in labels], deadline_ms)
        return dict(zip(labels, found, strict=True))

    async def _streamed(
        self, messages: Sequence[Message], sampling: Sampling, kind: str, owner: str, deadline_ms: float
    ) -> AsyncIterator[pb.GenerateResponse]:
        text, count = TextStream(self._engine.text), 0
        async for token in self._engine.generate(messages, sampling, kind, owner, deadline_ms):
            count += 1
            new = text.push(token)
            if new:
                yield pb.GenerateResponse(text=new, tokens=count)
        finish = pb.GenerateResponse.FINISH_LENGTH if count == sampling.most else pb.GenerateResponse.FINISH_STOP
        yield pb.GenerateResponse(text=text.rest(), finish=finish, tokens=count)


async def describe(engine: LanguageEngine, label: str, owner: str, deadline_ms: float = 0) -> tuple[str, ...]:
    """What a label looks like, by the model. Raises as `LanguageEngine.generate`, and LabelError for what is no label."""
    (name,) = check_labels([label])
    parts = [
        asyncio.ensure_future(answer(engine, messages, sampling, "describe", owner, deadline_ms))
        for messages, sampling in requests(name)
    ]
    try:
        return descriptions(name, await asyncio.gather(*parts))
    finally:  # where one fails, nobody waits for the others
        for part in parts:
            part.cancel()


async def answer(
    engine: LanguageEngine,
    messages: Sequence[Message],
    sampling: Sampling,
    kind: str,
    owner: str,
    deadline_ms: float = 0,
    begun: str = "",
) -> str:
    """A whole answer's text, without the words that it has begun with. Raises as `LanguageEngine.generate`."""
    tokens = engine.generate(messages, sampling, kind, owner, deadline_ms, begun)
    return engine.text([token async for token in tokens])


def _messages(given: Sequence[pb.ChatMessage]) -> list[Message]:
    if not 0 < len(given) <= MAX_MESSAGES_PER_CALL:
        raise InputError(f"a conversation has 1 to {MAX_MESSAGES_PER_CALL} messages, got {len(given)}")
    messages: list[Message] = []
    for message in given:
        if message.role not in _ROLES:
            raise InputError(f"a message's role is system, user or assistant, got {message.role}")
        messages.append({"role": _ROLES[message.role], "content": _text(message.content, "message")})  # pyright: ignore[reportArgumentType]
    if messages[-1]["role"] != "user":
        raise InputError("the last message of a conversation is the user's: that is what is answered")
    return messages


def _text(text: str, what: str) -> str:
    if not text.strip():
        raise InputError(f"the {what} is empty")
    if len(text) > MAX_TEXT_LENGTH:
        raise InputError(f"a {what} has at most {MAX_TEXT_LENGTH} characters, got {len(text)}")
    return text


def _owner(client_id: str, context: Context) -> str:
    check_device_id(client_id)
    return client_id or context.peer()
