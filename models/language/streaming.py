"""Sequences without an end: a decoder on key-value caches of a fixed size (SepLLM's streaming form, arXiv 2412.12094, section
3.3; attention sinks and a window where the budget has no separators)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..attention.api import attend
from ..attention.cache import StreamingBudget, StreamingCache
from ..errors import ConfigError
from .decoder import Decoder


@dataclass
class StreamingState:
    """The past of one sequence.

    Attributes:
        caches: of every layer.
        length: tokens so far.
    """

    caches: list[StreamingCache] = field(repr=False)
    length: int = 0

    @property
    def held(self) -> int:
        """Key-value entries, over all layers."""
        return sum(map(len, self.caches))


class StreamingDecoder:
    """A decoder's weights, and sequences that may be longer than its context: a token's position is its place in the cache.

    Args:
        separators: (vocabulary,) bool; None: no token is one.

    Raises:
        ConfigError: the capacity is beyond the model's context.
    """

    def __init__(self, decoder: Decoder, budget: StreamingBudget, separators: torch.Tensor | None = None) -> None:
        if budget.capacity > decoder.config.context:
            raise ConfigError(
                f"a cache of {budget.capacity} entries has positions beyond the model's context of {decoder.config.context}"
            )
        self._decoder, self._budget, self._separators = decoder, budget, separators

    def begin(self) -> StreamingState:
        return StreamingState([StreamingCache(self._budget) for _ in range(self._decoder.config.layers)])

    @torch.inference_mode()
    def make_room(self, state: StreamingState) -> int:
        """Compresses caches that are full; returns how many tokens may come before they are full again, 1 at least."""
        return min(cache.make_room() for cache in state.caches)

    @torch.inference_mode()
    def prefill(self, state: StreamingState, tokens: Sequence[int] | torch.Tensor, every: bool = False) -> torch.Tensor:
        """Appends tokens to a sequence, in chunks that end where the caches are full; equal to one by one.

        Returns:
            float32 logits of what follows the last token, (vocabulary,); with `every`, of what follows each, (T, vocabulary).

        Raises:
            InputError: no token, or one that is not in the vocabulary; the sequence has not grown then.
        """
        tokens, found = self._decoder.checked(tokens), []
        while len(tokens):
            room = self.make_room(state)
            part, tokens = tokens[:room], tokens[room:]
            logits = self._chunk(state, part, last=not every)
            if every or not len(tokens):
                found.append(logits)
        return torch.cat(found) if every else found[0][0]

    def _chunk(self, state: StreamingState, tokens: torch.Tensor, last: bool) -> torch.Tensor:
        separators = None if self._separators is None else self._separators[tokens.cpu()]
        positions = torch.arange(len(state.caches[0]) + len(tokens))

        def attention(number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            cache = state.caches[number]
            cache.append(k, v, separators)
            q = self._decoder.rotated(q, positions[-len(tokens) :])
            keys = self._decoder.rotated(cache.k, positions)
            return attend(q[None], keys[None], cache.v[None], form=self._decoder.form)[0]

        logits = self._decoder.through(tokens, attention, last)
        state.length += len(tokens)
        return logits
