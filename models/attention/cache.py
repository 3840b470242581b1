"""Keys and values of the past, for decoding under a pattern: what is kept, and where it stands.

`GrowingCache` serves patterns as they are trained (positions never change; SepLLM's "fundamental" form): it drops what no later
query can see. `StreamingCache` has a fixed size: SepLLM's streaming form (arXiv 2412.12094, section 3.3) with its four parts,
and attention sinks with a window (StreamingLLM) as the case without separators; there positions are those within the cache, so
keys are kept without rotation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConfigError
from .pattern import Pattern


@dataclass(frozen=True)
class StreamingBudget:
    """Sizes in entries: `initial` a, `separators` s, `window` w, `capacity` c of the whole cache, a + s + w < c.

    New entries are appended until the cache holds c; then, before the next is appended, separators that have left the window
    move to the separator part, which keeps its newest s, and what else lies before the window is dropped.
    """

    initial: int
    separators: int
    window: int
    capacity: int

    def __post_init__(self) -> None:
        if min(self.initial, self.separators) < 0 or self.window < 1:
            raise ConfigError(
                f"a streaming cache needs sizes that are not negative and a window of 1 at least, got {self}"
            )
        if self.initial + self.separators + self.window >= self.capacity:
            raise ConfigError(
                f"a streaming cache needs initial + separators + window < capacity, got {self.initial} + {self.separators} + "
                f"{self.window} and {self.capacity}"
            )

    @property
    def mean_usage(self) -> float:
        """Of a long stream with separators enough: between a + s + w after a compression and c before the next."""
        return (self.window + self.capacity + self.initial + self.separators) / 2


class StreamingCache:
    """Of one layer and one sequence. Holds unrotated keys: an entry's position is its index.

    Attributes:
        k, v: (HK, N, D), initial entries, then separators, then the rest in order.
    """

    def __init__(self, budget: StreamingBudget) -> None:
        self.budget = budget
        self.k = self.v = torch.empty(0)
        self._initial = self._kept = 0  # entries of the first two parts
        self._is_separator: list[bool] = []  # of the entries behind them

    def __len__(self) -> int:
        return self._initial + self._kept + len(self._is_separator)

    def append(self, k: torch.Tensor, v: torch.Tensor, is_separator: bool) -> None:
        """One entry, (HK, 1, D) each."""
        if len(self) >= self.budget.capacity:
            self._compress()
        if not len(self):
            self.k, self.v = k, v
        else:
            self.k, self.v = torch.cat((self.k, k), dim=1), torch.cat((self.v, v), dim=1)
        if self._initial < self.budget.initial:
            self._initial += 1
        else:
            self._is_separator.append(is_separator)

    def _compress(self) -> None:
        past = len(self._is_separator) - self.budget.window
        if past <= 0:
            return
        head = self._initial + self._kept
        leaving = [head + i for i, is_one in enumerate(self._is_separator[:past]) if is_one]
        separators = [*range(self._initial, head), *leaving]
        separators = separators[max(len(separators) - self.budget.separators, 0) :] if self.budget.separators else []
        rows = torch.tensor([*range(self._initial), *separators, *range(head + past, len(self))], device=self.k.device)
        self.k, self.v = self.k.index_select(1, rows), self.v.index_select(1, rows)
        self._kept, self._is_separator = len(separators), self._is_separator[past:]


class GrowingCache:
    """Of one layer and one sequence, with positions that never change: keys are kept as the layer made them, rotated.

    Everything in it is seen by the next query.

    Attributes:
        k, v: (HK, N, D), in order of the sequence.
        seen: entries of the sequence so far.
    """

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self.k = self.v = torch.empty(0)
        self._keep = torch.empty(0, dtype=torch.bool)  # (N,) for good: initial entries and separators
        self.seen = 0

    def __len__(self) -> int:
        return len(self._keep)

    def append(self, k: torch.Tensor, v: torch.Tensor, separators: torch.Tensor | None = None) -> None:
        """Entries (HK, N, D), and (N,) bool whether they are separators; drops what no later query sees.

        The newest `neighbours` stay: the query of the last entry sees them all.
        """
        count = k.shape[1]
        keep = torch.arange(self.seen, self.seen + count) < self._pattern.initial
        if separators is not None:
            keep = keep | separators.cpu()
        self.seen += count
        self._keep = torch.cat((self._keep, keep))
        empty = self.k.numel() == 0
        self.k, self.v = (new if empty else torch.cat((old, new), dim=1) for old, new in ((self.k, k), (self.v, v)))
        neighbours = self._pattern.neighbours
        if neighbours is None or len(self) <= neighbours:
            return
        stay = self._keep.clone()
        stay[len(self) - neighbours :] = True
        if not stay.all():
            rows = stay.nonzero()[:, 0]
            self._keep = self._keep[rows]
            self.k, self.v = (x.index_select(1, rows.to(x.device)) for x in (self.k, self.v))
