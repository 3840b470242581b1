"""Who runs, and since when: policies over one loop of steps.

Three policies can be compared: static batches in order of arrival; sequence scheduling by predicted length (arXiv 2305.13144)
with variable batch sizes and failure collection; and continuous batching, which fills a free place at once, as far as the cache
has room for what the answer is expected to take.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from ...models.errors import ConfigError, InputError
from ..fair_queue import FairQueue
from .generation import Generation, Machine, blocks

GROUP = 256
"""Requests that sequence scheduling sorts at once (arXiv 2305.13144, section 5)."""
BATCH = 16
BATCH_SIZES = ((50, 256), (100, 128), (150, 64), (200, 32))
"""Of answers up to so many tokens, so many at once; of longer ones `BATCH` (its variable batch size)."""
ROUND = 50
"""Predicted lengths are rounded up to a multiple of it before they cut answers short (its label)."""
STALL = 512
"""Tokens of prompts that are read in a step, at most: those who have read theirs wait for their next token no longer."""


class Waiting:
    """Requests without a place: those that lost theirs first, then owners in turn."""

    def __init__(self) -> None:
        self._returned: deque[Generation] = deque()
        self._queue: FairQueue[Generation] = FairQueue()

    def __len__(self) -> int:
        return len(self._returned) + len(self._queue)

    def push(self, generation: Generation) -> None:
        self._queue.push(generation.owner, generation)

    def push_back(self, generation: Generation) -> None:
        """It was next already."""
        self._returned.appendleft(generation)

    def pop(self) -> Generation:
        return self._returned.popleft() if self._returned else self._queue.pop()

    def remove(self, generation: Generation) -> None:
        """Raises `KeyError` or `ValueError` where it does not wait."""
        if generation in self._returned:
            self._returned.remove(generation)
        else:
            self._queue.remove(generation.owner, generation)


class Policy(Protocol):
    """Attributes:
    together: nobody steps before all that run have read their prompts.
    """

    together: bool

    def choose(
        self, waiting: Waiting, running: Sequence[Generation], room: Callable[[Generation], bool]
    ) -> list[Generation]:
        """Who starts now, `allowed` set; `room` says whether one more fits beside all that were asked for before, and takes
        the room if it does."""
        ...

    def cut(self, generation: Generation) -> None:
        """It has reached what it was `allowed` without an end, and its cache is gone."""
        ...

    def forget(self, generation: Generation) -> bool:
        """Removes one that the policy holds; false where it holds no such."""
        ...

    @property
    def held(self) -> int:
        """Requests taken from `waiting` that have no place yet."""
        ...


class _Uncut:
    """Of a policy that lets every answer run to its end, and takes none from `Waiting` before its turn."""

    held = 0

    def cut(self, generation: Generation) -> None:
        raise AssertionError("nothing is cut short here")

    def forget(self, generation: Generation) -> bool:
        return False


class StaticBatches(_Uncut):
    """`batch` requests in order of arrival; the next ones start when the last of them has ended."""

    together = True

    def __init__(self, batch: int = BATCH) -> None:
        self._batch = batch

    def choose(
        self, waiting: Waiting, running: Sequence[Generation], room: Callable[[Generation], bool]
    ) -> list[Generation]:
        if running:
            return []
        return _taken(waiting, self._batch, room)


class ContinuousBatching(_Uncut):
    """Whoever waits starts as soon as a place and cache blocks for its expected answer are free; `most` places."""

    together = False

    def __init__(self, most: int = BATCH) -> None:
        self._most = most

    def choose(
        self, waiting: Waiting, running: Sequence[Generation], room: Callable[[Generation], bool]
    ) -> list[Generation]:
        return _taken(waiting, self._most - len(running), room)


def _taken(waiting: Waiting, most: int, room: Callable[[Generation], bool]) -> list[Generation]:
    taken: list[Generation] = []
    while len(taken) < most and len(waiting):
        first = waiting.pop()
        first.allowed = first.most
        if not room(first):
            waiting.push_back(first)
            break
        taken.append(first)
    return taken


class SequenceScheduling:
    """Groups of requests, sorted by predicted length; batches of like lengths, larger where answers are short; an answer longer
    than its batch was predicted is set aside, and finished at the end of its group.

    What the paper decodes anew then is read again here, as a prompt: the answer is the same and costs one step.
    """

    together = True

    def __init__(self, group: int = GROUP, batch: int = BATCH, sizes: Sequence[tuple[int, int]] = BATCH_SIZES) -> None:
        self._group_size, self._batch, self._sizes = group, batch, tuple(sizes)
        self._group: list[Generation] = []  # the next one last
        self._failed: list[Generation] = []

    @property
    def held(self) -> int:
        return len(self._group) + len(self._failed)

    def choose(
        self, waiting: Waiting, running: Sequence[Generation], room: Callable[[Generation], bool]
    ) -> list[Generation]:
        if running:
            return []
        if not self.held:
            self._group = [waiting.pop() for _ in range(min(self._group_size, len(waiting)))]
            self._group.sort(key=lambda one: -one.predicted)
        failed = not self._group
        source = self._failed if failed else self._group
        taken: list[Generation] = []
        while source:
            following = source[-1]
            following.allowed = following.most if failed else min(following.most, self._bound(following))
            largest = self._batch if failed else self._largest(following)
            if len(taken) >= largest or not room(following):
                break
            taken.append(source.pop())
        bound = max((one.allowed for one in taken), default=0)
        for one in taken:  # the batch lasts as long as its longest
            one.allowed = min(one.most, bound)
        return taken

    def cut(self, generation: Generation) -> None:
        self._failed.insert(0, generation)

    def forget(self, generation: Generation) -> bool:
        for held in (self._group, self._failed):
            if generation in held:
                held.remove(generation)
                return True
        return False

    def _bound(self, generation: Generation) -> int:
        """An answer that has already outgrown its prediction is not cut again."""
        bound = max(-(-generation.predicted // ROUND), 1) * ROUND
        return bound if bound > len(generation.tokens) else generation.most

    def _largest(self, generation: Generation) -> int:
        return next((size for length, size in self._sizes if self._bound(generation) <= length), self._batch)


POLICIES: dict[str, Callable[[int], Policy]] = {
    "continuous": ContinuousBatching,
    "static": StaticBatches,
    "sequence": lambda batch: SequenceScheduling(batch=batch),
}


def policy_named(name: str, batch: int) -> Policy:
    """Raises `ConfigError` for a name that is none."""
    if name not in POLICIES:
        raise ConfigError(f"a policy is one of {', '.join(POLICIES)}, got {name!r}")
    return POLICIES[name](batch)


class Scheduler:
    """Drives a machine by a policy. Not for several threads.

    Attributes:
        preempted: how often one gave its place up for want of cache blocks.
        moved: those with a new token or their end, of the latest `advance`.

    Args:
        cache_blocks: that all running sequences may hold together. A sequence that outgrows what was expected of it takes
            more as long as there are some; then the one that started last gives its place up, and reads again what it has said.
    """

    def __init__(self, machine: Machine, policy: Policy, cache_blocks: int) -> None:
        self._machine, self._policy = machine, policy
        self._blocks = cache_blocks
        self._waiting = Waiting()
        self._running: list[Generation] = []  # in the order in which they started
        self.preempted = 0
        self.moved: dict[Generation, None] = {}

    @property
    def idle(self) -> bool:
        return not (self._running or self.waiting)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + self._policy.held

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def blocks_used(self) -> int:
        return sum(blocks(one.held - one.left) for one in self._running)

    def check(self, generation: Generation) -> None:
        """Raises `InputError`: it could outgrow the whole cache."""
        needed = blocks(len(generation.prompt) + generation.most)
        if needed > self._blocks:
            raise InputError(
                f"{len(generation.prompt)} tokens of prompt and up to {generation.most} of answer need {needed} cache blocks; "
                f"there are {self._blocks}. Ask for less, or give the cloud more cache"
            )

    def submit(self, generation: Generation) -> None:
        self.check(generation)
        self._waiting.push(generation)

    def cancel(self, generation: Generation) -> None:
        """Wherever it is; one that has ended is nowhere."""
        if generation.ended:
            return
        generation.ended = True
        if generation in self._running:
            self._release(generation)
        elif not self._policy.forget(generation):
            self._waiting.remove(generation)

    def advance(self) -> list[Generation]:
        """One step of everything that runs, beside what is read; returns those that have a new token or their end.

        An error of the machine leaves nothing running: `abandon` says whom it hit, `moved` who had moved before.
        """
        moved = self.moved = {}
        reserved = sum(self._expected(one) for one in self._running)

        def room(generation: Generation) -> bool:
            nonlocal reserved
            expected = self._expected(generation)
            if reserved and reserved + expected > self._blocks:
                return False
            reserved += expected
            return True

        chosen = self._policy.choose(self._waiting, tuple(self._running), room)
        self._running += chosen  # all before the first starts: an error leaves none of them nowhere
        for generation in chosen:
            generation.left = self._machine.start(generation)
        budget = STALL
        reading = [one for one in self._running if one.left]
        for generation in reading:
            count = min(generation.left, budget)
            if not count:
                break
            token = self._machine.read(generation, count)
            generation.left -= count
            budget -= count
            if not generation.left:
                self._take(generation, token)
                moved[generation] = None
        if self._policy.together and reading:
            return list(moved)
        self._make_room()
        running = [one for one in self._running if not one.left and one not in moved]
        if running:
            for generation, token in zip(running, self._machine.step(running), strict=True):
                self._take(generation, token)
                moved[generation] = None
        return list(moved)

    def abandon(self) -> list[Generation]:
        """Takes everything that runs out, after an error."""
        lost, self._running = self._running, []
        for generation in lost:
            generation.ended = True
            self._machine.stop(generation)
        return lost

    def _expected(self, generation: Generation) -> int:
        answer = min(max(generation.predicted, len(generation.tokens)), generation.allowed)
        return blocks(len(generation.prompt) + answer)

    def _take(self, generation: Generation, token: int | None) -> None:
        if token is not None:
            generation.tokens.append(token)
        if token is None or len(generation.tokens) >= generation.most:
            generation.ended = True
            self._release(generation)
        elif len(generation.tokens) > generation.allowed:
            self._release(generation)
            generation.restarts += 1
            self._policy.cut(generation)

    def _make_room(self) -> None:
        """For one token more of each."""
        while len(self._running) > 1 and sum(blocks(one.held + 1 - one.left) for one in self._running) > self._blocks:
            last = self._running[-1]
            self._release(last)
            last.restarts += 1
            self.preempted += 1
            self._waiting.push_back(last)

    def _release(self, generation: Generation) -> None:
        self._running.remove(generation)
        self._machine.stop(generation)
