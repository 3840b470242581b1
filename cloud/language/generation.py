"""One answer in the making, and what makes its tokens: a decoder, or a clock that knows how long each would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ...models.attention.cache import BLOCK
from ...models.language.generate import Sampler, Sampling


def blocks(tokens: int) -> int:
    """Cache blocks that so many tokens of one sequence take."""
    return -(-tokens // BLOCK)


@dataclass(eq=False)
class Generation:
    """Attributes:
    prompt: tokens.
    predicted: tokens that the answer is expected to have; what schedules it, never what it says.
    shared: so many tokens of the prompt are a beginning that other requests have too.
    owner: served in turn with other owners.
    tokens: of the answer, so far; without the one that ends it.
    ended: nothing more will come.
    allowed: with more tokens than these its turn is over, ended or not; a policy sets it.
    left: tokens to read before the next one can be made.
    restarts: how often it lost its place and its cache; what it has said is kept and read again.
    """

    prompt: Sequence[int]
    sampling: Sampling
    predicted: int
    shared: int = 0
    owner: str = ""
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    allowed: int = 0
    left: int = 0
    restarts: int = 0

    def __post_init__(self) -> None:
        self.pick = Sampler(self.sampling)

    @property
    def most(self) -> int:
        return self.sampling.most

    @property
    def held(self) -> int:
        """Tokens in its cache; the latest one enters it when the next one is made."""
        return len(self.prompt) + len(self.tokens) - 1


class Machine(Protocol):
    """Makes tokens; None is the end of an answer."""

    def start(self, generation: Generation) -> int:
        """Takes it up; returns how much of the prompt, and of what was answered before it lost its cache, is to be read, 1 token
        at least."""
        ...

    def read(self, generation: Generation, count: int) -> int | None:
        """Reads so many of those; where they are the last, returns the next token."""
        ...

    def step(self, generations: Sequence[Generation]) -> Sequence[int | None]:
        """One more token for each."""
        ...

    def stop(self, generation: Generation) -> None:
        """Frees its cache."""
        ...
