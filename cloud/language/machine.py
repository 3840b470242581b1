"""The decoder as the scheduler's machine: one state a sequence, beginnings that requests share read once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from ...models.language.decoder import Decoder, SequenceState
from .generation import Generation

SHARED = 4
"""Beginnings whose keys and values are kept, those used last; they are not in the scheduler's count of blocks."""


class DecoderMachine:
    """Args:
    ends: tokens that end an answer.
    """

    def __init__(self, decoder: Decoder, ends: frozenset[int]) -> None:
        self._decoder, self._ends = decoder, ends
        self._states: dict[Generation, SequenceState] = {}
        self._shared: OrderedDict[tuple[int, ...], SequenceState] = OrderedDict()

    def start(self, generation: Generation) -> int:
        self._states[generation], read = self._begun(generation.prompt, generation.shared)
        return len(generation.prompt) + len(generation.tokens) - read

    def read(self, generation: Generation, count: int) -> int | None:
        state, text = self._states[generation], [*generation.prompt, *generation.tokens]
        end = state.length + count
        logits = self._decoder.prefill(state, text[state.length : end])
        return self._picked(generation, logits) if end == len(text) else None

    def step(self, generations: Sequence[Generation]) -> list[int | None]:
        states = [self._states[one] for one in generations]
        logits = self._decoder.step(states, [one.tokens[-1] for one in generations])
        return [self._picked(one, row) for one, row in zip(generations, logits, strict=True)]

    def stop(self, generation: Generation) -> None:
        self._states.pop(generation, None)

    def scores(self, prompt: Sequence[int], shared: int, continuations: Sequence[Sequence[int]]) -> list[float]:
        """Log-probability of each continuation of the prompt, in nats."""
        state, read = self._begun(prompt, shared)
        first = torch.log_softmax(self._decoder.prefill(state, prompt[read:]), dim=-1)  # (vocabulary,)
        found = []
        for tokens in continuations:
            total = float(first[tokens[0]])
            if len(tokens) > 1:
                logits = self._decoder.prefill(state.fork(), tokens[:-1], every=True)  # (T - 1, vocabulary)
                following = torch.tensor(tokens[1:])[:, None]
                total += float(torch.log_softmax(logits, dim=-1).gather(1, following).sum())
            found.append(total)
        return found

    def _begun(self, prompt: Sequence[int], shared: int) -> tuple[SequenceState, int]:
        """A state that has read the prompt's shared beginning, and how many tokens that is; one token at least is left."""
        shared = min(shared, len(prompt) - 1)
        if shared <= 0:
            return self._decoder.begin(), 0
        beginning = tuple(prompt[:shared])
        if beginning not in self._shared:
            state = self._decoder.begin()
            self._decoder.prefill(state, beginning)
            self._shared[beginning] = state
            if len(self._shared) > SHARED:
                self._shared.popitem(last=False)
        self._shared.move_to_end(beginning)
        return self._shared[beginning].fork(), shared

    def _picked(self, generation: Generation, logits: torch.Tensor) -> int | None:
        token = generation.pick(logits)
        return None if token in self._ends else token
