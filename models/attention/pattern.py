"""Which keys a query sees, and how its scores become weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import ConfigError

Form = Literal["softmax", "sa", "sa_normalised"]
"""`softmax`; Self-Adjust Softmax (arXiv 2502.18277): `sa` weighs a key by x softmax(x), `sa_normalised` by
(x - min(x_min, 0)) / (max(0, x_max) - min(x_min, 0) + epsilon) softmax(x), with the extremes of the row's visible scores."""

EPSILON = 1e-6
"""Of `sa_normalised`. The released code's 1e-10 vanishes in float16 and beside float32 scores."""


@dataclass(frozen=True)
class Pattern:
    """The keys that a query sees, always up to itself.

    A query sees the newest `neighbours` keys, itself among them; of the older ones the first `initial` of the sequence, and
    those at separators where a call gives them. `neighbours` None: it sees everything before it.

    `Pattern()` is causal attention, `Pattern(4, 256)` attention sinks and a window (StreamingLLM), and with separators SepLLM's
    (arXiv 2412.12094, section 3.1; the paper's a = 3, n = 256).
    """

    initial: int = 0
    neighbours: int | None = None

    def __post_init__(self) -> None:
        if self.initial < 0 or (self.neighbours is not None and self.neighbours < 1):
            raise ConfigError(
                f"a pattern needs initial >= 0 and neighbours >= 1, got {self.initial} and {self.neighbours}: a query sees itself"
            )

    def kept(self, keys: int, separators: torch.Tensor | None) -> torch.Tensor | None:
        """(B or 1, keys) bool: seen by every later query, however far; None where the window holds everything anyway."""
        if self.neighbours is None:
            return None
        device = None if separators is None else separators.device
        kept = (torch.arange(keys, device=device) < self.initial)[None]
        return kept if separators is None else kept | separators

    def mask(self, queries: int, keys: int, separators: torch.Tensor | None = None) -> torch.Tensor:
        """(B or 1, queries, keys) bool, True where a query sees a key. The queries are the newest: the last of them stands at
        the last key.

        Args:
            separators: (B, keys) bool.
        """
        device = None if separators is None else separators.device
        here = torch.arange(keys - queries, keys, device=device)[:, None]  # (queries, 1)
        there = torch.arange(keys, device=device)[None, :]
        causal = there <= here
        kept = self.kept(keys, separators)
        if kept is None or self.neighbours is None:
            return causal[None]
        return causal & (kept[:, None, :] | (here - there < self.neighbours))
