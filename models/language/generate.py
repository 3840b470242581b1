"""Text from a decoder: greedy or sampled, one sequence or many at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from .decoder import Decoder

_COLDEST = 1e-4
"""Temperatures below it are 0: logits divided by them leave float32."""


@dataclass(frozen=True)
class Sampling:
    """Attributes:
    most: tokens, at most.
    temperature: 0 takes the likeliest token.
    top_p: of the likeliest tokens as many as have this probability together.
    """

    most: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.most < 1 or not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"sampling needs most >= 1, temperature >= 0 and top_p in (0, 1], got {self.most}, {self.temperature}, "
                f"{self.top_p}"
            )


class Sampler:
    """Picks tokens; deterministic for its seed, whatever else is decoded beside it."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """Of (vocabulary,) logits."""
        settings = self._sampling
        if settings.temperature < _COLDEST:
            return int(logits.argmax())
        p, order = torch.softmax(logits / settings.temperature, dim=-1).sort(descending=True)
        p = torch.where(p.cumsum(0) - p < settings.top_p, p, 0)
        return int(order[torch.multinomial(p, 1, generator=self._random)])


def generate(decoder: Decoder, prompt: Sequence[int], ends: frozenset[int], sampling: Sampling) -> Iterator[int]:
    """Tokens of an answer one by one, without the one that ends it."""
    state, sampler = decoder.begin(), Sampler(sampling)
    logits = decoder.prefill(state, prompt)
    for left in reversed(range(sampling.most)):
        token = sampler(logits)
        if token in ends:
            return
        yield token
        if left:
            logits = decoder.step([state], [token])[0]


def generate_batch(
    decoder: Decoder, prompts: Sequence[Sequence[int]], ends: frozenset[int], sampling: Sequence[Sampling]
) -> list[list[int]]:
    """Answers to prompts of any lengths, decoded together until the last has ended; what each alone would get."""
    states, samplers = [decoder.begin() for _ in prompts], [Sampler(some) for some in sampling]
    logits = [decoder.prefill(state, prompt) for state, prompt in zip(states, prompts, strict=True)]
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    while True:
        picked = {i: samplers[i](logits[i]) for i in running}
        for i, token in picked.items():
            if token not in ends:
                answers[i].append(token)
        running = [i for i, token in picked.items() if token not in ends and len(answers[i]) < sampling[i].most]
        if not running:
            return answers
        for i, row in zip(
            running, decoder.step([states[i] for i in running], [picked[i] for i in running]), strict=True
        ):
            logits[i] = row
