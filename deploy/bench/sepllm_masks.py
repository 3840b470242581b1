"""What a token sees under SepLLM's mask and its rivals, and what that costs: key-value entries, as shares of full attention's.

With C_i the entries that token i of a window of T sees, itself among them, the mean share is sum C_i / sum (i + 1): of the
memory held over time and of the scores computed. The peak share is C_T / T, at the end of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ...models.attention.pattern import Pattern

INITIAL = 4

Keep = Literal["nothing", "separators", "random"]


@dataclass(frozen=True)
class Mask:
    """Attributes:
    keep: which tokens are kept for good beside the initial ones; `random`: as many as there are separators in the window.
    """

    name: str
    pattern: Pattern
    keep: Keep = "nothing"

    def kept(self, tokens: torch.Tensor, separators: torch.Tensor, seed: int) -> torch.Tensor | None:
        """(B, T) bool of (B, T) windows; `separators` (vocabulary,) bool. `random` is drawn from the seed, window by window."""
        if self.keep == "nothing":
            return None
        found = separators[tokens]
        if self.keep == "separators":
            return found
        random = torch.Generator().manual_seed(seed)
        chance = found[:, INITIAL:].float().mean(dim=1, keepdim=True)
        return torch.rand(found.shape, generator=random) < chance


def seen(pattern: Pattern, tokens: int, kept: torch.Tensor | None) -> torch.Tensor:
    """(B or 1, T) entries that each token of a window sees."""
    position = torch.arange(tokens)
    if pattern.neighbours is None:
        return (position + 1)[None]
    near = (position + 1).clamp(max=pattern.neighbours)
    always = pattern.kept(tokens, kept)
    if always is None:
        return near[None]
    so_far = torch.nn.functional.pad(always.cumsum(dim=1), (pattern.neighbours, 0))[:, :tokens]
    return near + so_far


def shares(counts: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Mean and peak share of the entries seen in sequences, (B, T) each."""
    held = sum(float(some.double().sum()) for some in counts)
    whole = sum(len(some) * some.shape[1] * (some.shape[1] + 1) / 2 for some in counts)
    peaks = torch.cat([some[:, -1].double() / some.shape[1] for some in counts])
    return held / whole, float(peaks.mean())


def masks(sequences: Sequence[torch.Tensor], separators: torch.Tensor, neighbours: Sequence[int]) -> list[Mask]:
    """Full attention; for each n SepLLM, and at its mean share sinks and window and random tokens, at its peak sinks and window.

    Their windows are found on the sequences, (B, T) tokens each, and are the same for all of them.
    """
    compared, random, peaks = [Mask("full", Pattern())], [], []
    for n in neighbours:
        sepllm = Mask(f"sepllm n={n}", Pattern(INITIAL, n), "separators")
        counts = [seen(sepllm.pattern, some.shape[1], sepllm.kept(some, separators, 0)) for some in sequences]
        mean, peak = shares(counts)
        compared += [sepllm, Mask(f"window, mean of n={n}", Pattern(INITIAL, _window(mean, sequences, 0)))]
        random.append(Mask(f"random n={n}", Pattern(INITIAL, n), "random"))
        peaks.append(Mask(f"window, peak of n={n}", Pattern(INITIAL, _window(peak, sequences, 1))))
    return [*compared, *random, *peaks]


def _window(share: float, sequences: Sequence[torch.Tensor], which: int) -> int:
    """The window whose share (0 the mean, 1 the peak) beside the initial tokens is nearest to one that is wanted."""

    def apart(n: int) -> float:
        return shares([seen(Pattern(INITIAL, n), some.shape[1], None) for some in sequences])[which] - share

    low, high = 1, max(some.shape[1] for some in sequences)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if apart(middle) < 0 else (low, middle)
    return min((max(low - 1, 1), low), key=lambda n: abs(apart(n)))
