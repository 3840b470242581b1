"""The language model for many callers at once: one thread that steps it, and an asyncio face."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from ...models.errors import DeadlineError, EdgeFMError, InputError, ModelError, OverloadedError
from ...models.language.generate import Sampling
from ...models.language.tokenizer import Message, TextTokenizer
from .generation import Generation
from .lengths import ASKED_TOKENS, LearnedLengths, asked_length, question
from .machine import DecoderMachine
from .scheduling import STALL, Policy, Scheduler

T = TypeVar("T")
log = logging.getLogger("edgefm.cloud.language")

_CLOSE_PATIENCE_S = 5.0
_RETRY_MS = (100, 60_000)
_FORGET = 0.2
"""Weight of the latest answer in the measured time between two ends."""
_LONGEST_TOKEN = 32
"""Characters: text with more of them a token on average is no conversation."""
_LONGEST_SHARED = STALL
"""Tokens of a beginning that is kept for others; it is read at once."""
_SAVED = 50
"""Answers, after which what was learned of their lengths is written down."""


@dataclass(eq=False)
class _Caller:
    generation: Generation
    kind: str
    loop: asyncio.AbstractEventLoop
    news: asyncio.Queue[int | EdgeFMError | None] = field(default_factory=asyncio.Queue)
    given: int = 0  # tokens that have been passed on; the thread's
    heard: bool = False  # something has come


class Observer(Protocol):
    def answered(self, kind: str, tokens: int, predicted: int, seconds: float) -> None: ...


class LanguageEngine:
    """Args:
    context: tokens that a sequence may have.
    max_queue: callers that wait for a place, at most.
    lengths: what is known of answers' lengths.
    asks: the model guesses the length of its own answers instead.

    Attributes:
        observer: told of every answer that came to its end.
        failure: why the last step failed; None while it works.
    """

    def __init__(
        self,
        machine: DecoderMachine,
        tokenizer: TextTokenizer,
        policy: Policy,
        cache_blocks: int,
        context: int,
        max_queue: int,
        lengths: LearnedLengths,
        asks: bool = False,
    ) -> None:
        self._machine, self._tokenizer = machine, tokenizer
        self._scheduler = Scheduler(machine, policy, cache_blocks)
        self._context, self._max_queue, self._asks = context, max_queue, asks
        self._lengths = lengths
        self._callers: dict[Generation, _Caller] = {}
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._scores: deque[Callable[[], None]] = deque()  # one is computed between two steps
        self._between_s, self._last_end = 0.5, 0.0
        self._thread = threading.Thread(target=self._run, name="language", daemon=True)
        self.observer: Observer | None = None
        self.failure: str | None = None
        self._stepping: float | None = None  # since when

    def start(self) -> None:
        self._thread.start()

    async def close(self) -> None:
        """Callers that still wait get an error. What has been learned is written down."""
        self._jobs.put(None)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join, _CLOSE_PATIENCE_S)
        for caller in list(self._callers.values()):
            caller.news.put_nowait(ModelError("the cloud is stopping"))
        if self._lengths.unsaved:
            self._lengths.write(self._lengths.snapshot())

    @property
    def stepping_s(self) -> float:
        """How long it has been at one step."""
        since = self._stepping
        return 0.0 if since is None else time.perf_counter() - since

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting

    @property
    def running(self) -> int:
        return self._scheduler.running

    @property
    def blocks_used(self) -> int:
        return self._scheduler.blocks_used

    @property
    def preempted(self) -> int:
        """Answers that gave their place up for want of cache blocks, and went on later."""
        return self._scheduler.preempted

    # ---- what callers ask

    async def generate(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        kind: str,
        owner: str = "",
        deadline_ms: float = 0,
        begun: str = "",
    ) -> AsyncIterator[int]:
        """Tokens of the answer as they come, behind the words that it has begun with.

        Raises:
            InputError: the conversation is too long.
            OverloadedError: too many wait; come again after `retry_after_ms`.
            DeadlineError: not done after `deadline_ms`; 0 waits as long as it takes.
            ModelError: the model failed.
        """
        ends_at = time.perf_counter() + deadline_ms / 1e3 if deadline_ms else None
        self._admit(owner)
        prompt, shared = await self._read(messages, begun)
        predicted = (
            await self._asked(messages, sampling.most, owner, ends_at)
            if self._asks
            else self._lengths.predict(prompt, sampling.most, kind)
        )
        async for token in self._answer(Generation(prompt, sampling, predicted, shared, owner), kind, ends_at):
            yield token

    async def scores(
        self, messages: Sequence[Message], begun: str, continuations: Sequence[str], deadline_ms: float = 0
    ) -> list[float]:
        """Log-probability, in nats, of each continuation of an answer that has begun with `begun`.

        Raises: as `generate`.
        """
        if len(self._scores) >= self._max_queue:
            raise self._overloaded(len(self._scores))
        prompt, shared = await self._read(messages, begun)
        following = [self._tokenizer.encode(text) for text in continuations]
        self._check(len(prompt) + max(map(len, following), default=0))
        work = self._between_steps(lambda: self._machine.scores(prompt, shared, following))
        try:
            return await asyncio.wait_for(work, deadline_ms / 1e3 if deadline_ms else None)
        except asyncio.TimeoutError:
            raise DeadlineError("the labels were not weighed in time") from None

    async def try_again(self) -> None:
        """A token, to see whether the model works. Raises: as `generate`."""
        prompt, shared = await self._read([{"role": "user", "content": "?"}], "")
        async for _ in self._answer(Generation(prompt, Sampling(most=1), 1, shared), "length", None):
            pass  # a kind of which nothing is learned

    def text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens)

    def count(self, text: str) -> int:
        """Tokens."""
        return len(self._tokenizer.encode(text))

    # ---- inside, on the event loop

    async def _asked(self, messages: Sequence[Message], most: int, owner: str, ends_at: float | None) -> int:
        prompt, shared = await self._read(question(messages), "")
        if len(prompt) + ASKED_TOKENS > self._context:
            return most
        guess = Generation(prompt, Sampling(most=ASKED_TOKENS), ASKED_TOKENS, shared, owner)
        return asked_length(self.text([token async for token in self._answer(guess, "length", ends_at)]), most)

    async def _answer(self, generation: Generation, kind: str, ends_at: float | None) -> AsyncIterator[int]:
        self._check(len(generation.prompt) + generation.most)
        self._scheduler.check(generation)
        self._admit(generation.owner)
        caller = _Caller(generation, kind, asyncio.get_running_loop())
        self._callers[generation] = caller
        began = time.perf_counter()

        def too_late() -> None:
            text = f"the answer was not done in time; {len(generation.tokens)} of up to {generation.most} tokens were"
            caller.news.put_nowait(DeadlineError(text))

        timer = None if ends_at is None else caller.loop.call_later(ends_at - began, too_late)
        self._jobs.put(lambda: self._scheduler.submit(generation))
        try:
            while True:
                news = await caller.news.get()
                caller.heard = True
                if news is None:
                    self._learn(caller, time.perf_counter() - began)
                    return
                if isinstance(news, EdgeFMError):
                    raise news
                yield news
        finally:
            if timer is not None:
                timer.cancel()
            del self._callers[generation]
            if not generation.ended:
                self._jobs.put(lambda: self._scheduler.cancel(generation))

    def _admit(self, owner: str) -> None:
        """When the queue is full, the newest request of the owner with the most gives way.

        Raises:
            OverloadedError: that is the one that asks now.
        """
        waiting = len(self._callers) - self._scheduler.running
        if waiting < self._max_queue:
            return
        quiet = [caller for caller in self._callers.values() if not caller.heard]
        counts = Counter(caller.generation.owner for caller in quiet)
        heaviest, most = counts.most_common(1)[0] if counts else (owner, 0)
        if counts[owner] + 1 >= most:
            raise self._overloaded(waiting)
        newest = next(caller for caller in reversed(quiet) if caller.generation.owner == heaviest)
        newest.heard = True
        newest.news.put_nowait(self._overloaded(waiting))

    def _overloaded(self, waiting: int) -> OverloadedError:
        hint = min(max(self._between_s * waiting * 1e3, _RETRY_MS[0]), _RETRY_MS[1])
        return OverloadedError(f"{waiting} requests wait for the language model already", round(hint))

    def _check(self, tokens: int) -> None:
        if tokens > self._context:
            raise InputError(
                f"prompt and answer together may have {self._context} tokens, got up to {tokens}; shorten one of them"
            )

    def _learn(self, caller: _Caller, seconds: float) -> None:
        generation, now = caller.generation, time.perf_counter()
        if self._last_end:
            self._between_s += _FORGET * (min(now - self._last_end, seconds) - self._between_s)
        self._last_end = now
        if caller.kind == "length":
            return
        self._lengths.learn(generation.prompt, generation.most, caller.kind, len(generation.tokens))
        if self._lengths.unsaved >= _SAVED:
            caller.loop.run_in_executor(None, self._lengths.write, self._lengths.snapshot())
        if self.observer is not None:
            self.observer.answered(caller.kind, len(generation.tokens), generation.predicted, seconds)

    async def _read(self, messages: Sequence[Message], begun: str) -> tuple[list[int], int]:
        """The prompt, and how much of it is a beginning that others have too; long texts do not hold up the event loop."""
        characters = sum(len(message["content"]) for message in messages)
        if characters > _LONGEST_TOKEN * self._context:
            raise InputError(
                f"a conversation of {characters} characters is far beyond {self._context} tokens; shorten it"
            )
        return await asyncio.to_thread(self._tokens, messages, begun)

    def _tokens(self, messages: Sequence[Message], begun: str) -> tuple[list[int], int]:
        prompt = self._tokenizer.chat(messages)
        shared = shared_beginning(self._tokenizer, messages, prompt)
        return [*prompt, *self._tokenizer.encode(begun)], shared

    async def _between_steps(self, work: Callable[[], T]) -> T:
        """In its turn, one at a time; not at all where nobody waits for it any more."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(set_it: Callable[[T], None] | Callable[[BaseException], None], value: T | BaseException) -> None:
            if not future.done():
                set_it(value)  # pyright: ignore[reportArgumentType]

        def run() -> None:
            if future.done():
                return
            try:
                found = work()
            except EdgeFMError as error:
                loop.call_soon_threadsafe(settle, future.set_exception, error)
            except Exception as error:
                self.failure = str(error) or type(error).__name__
                failed = ModelError(f"the language model failed: {self.failure}")
                loop.call_soon_threadsafe(settle, future.set_exception, failed)
            else:
                loop.call_soon_threadsafe(settle, future.set_result, found)

        self._scores.append(run)
        self._jobs.put(lambda: None)  # wakes the thread
        return await future

    # ---- inside, in the thread

    def _run(self) -> None:
        while True:
            if (self._scheduler.idle and not self._scores) or not self._jobs.empty():
                job = self._jobs.get()
                if job is None:
                    return
                try:
                    job()
                except Exception:  # a bug; the others' answers go on
                    log.exception("event=language_job_failed")
                continue
            self._stepping = time.perf_counter()
            if self._scores:
                self._scores.popleft()()
            if self._scheduler.idle:
                self._stepping = None
                continue
            lost: list[Generation] = []
            try:
                self._scheduler.advance()
                self.failure = None
            except Exception as error:
                log.exception("event=language_failed")
                self.failure = str(error) or type(error).__name__
                lost = self._scheduler.abandon()
            self._stepping = None
            for generation in self._scheduler.moved:
                if generation not in lost:
                    self._pass_on(generation)
            for generation in lost:
                self._tell(generation, [ModelError(f"the language model failed: {self.failure}")])

    def _pass_on(self, generation: Generation) -> None:
        caller = self._callers.get(generation)
        if caller is not None:
            new: list[int | EdgeFMError | None] = [*generation.tokens[caller.given :]]
            caller.given = len(generation.tokens)
            self._tell(generation, [*new, None] if generation.ended else new)

    def _tell(self, generation: Generation, news: Sequence[int | EdgeFMError | None]) -> None:
        caller = self._callers.get(generation)
        if caller is None:
            return

        def put() -> None:
            for item in news:
                caller.news.put_nowait(item)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            caller.loop.call_soon_threadsafe(put)


def shared_beginning(tokenizer: TextTokenizer, messages: Sequence[Message], prompt: Sequence[int]) -> int:
    """How many tokens of a prompt are what its system message alone, or the template's, makes of it."""
    system: list[Message] = [messages[0]] if messages[0]["role"] == "system" else []
    probe = tokenizer.chat([*system, {"role": "user", "content": "\n"}])
    common = next((i for i, (a, b) in enumerate(zip(prompt, probe, strict=False)) if a != b), 0)
    return common if common <= _LONGEST_SHARED else 0
