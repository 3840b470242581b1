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

_LEAST_ROOM = 64


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

    After an `append` the query of the last entry sees everything in it.
    """

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self._k = self._v = torch.empty(0)  # (HK, room, D)
        self._keep = torch.empty(0, dtype=torch.bool)  # (room,) for good: initial entries and separators
        self._held = 0
        self._seen = 0  # entries of the sequence so far

    def __len__(self) -> int:
        return self._held

    @property
    def k(self) -> torch.Tensor:
        """(HK, N, D), in order of the sequence."""
        return self._k[:, : self._held]

    @property
    def v(self) -> torch.Tensor:
        return self._v[:, : self._held]

    def with_new(
        self, k: torch.Tensor, v: torch.Tensor, separators: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values (HK, N + new, D) that new queries choose from, and (1, N + new) bool which of them are kept for good.

        What is held beside those is the newest of the sequence, without gaps: a window over these rows is one over the sequence.
        """
        if self._pattern.neighbours is None:
            kept = None
        else:
            kept = torch.cat((self._keep[: self._held], self._kept(k.shape[1], separators)))[None]
        if not self._held:
            return k, v, kept
        return torch.cat((self.k, k), dim=1), torch.cat((self.v, v), dim=1), kept

    def append(self, k: torch.Tensor, v: torch.Tensor, separators: torch.Tensor | None = None) -> None:
        """Entries (HK, new, D), and (new,) bool whether they are separators; drops what no later query sees.

        The newest `neighbours` stay: the query of the last entry sees them all.
        """
        count = k.shape[1]
        keep = self._kept(count, separators)
        self._make_room(k, count)
        end = self._held + count
        self._k[:, self._held : end], self._v[:, self._held : end], self._keep[self._held : end] = k, v, keep
        self._held, self._seen = end, self._seen + count
        if self._pattern.neighbours is not None:
            self._drop(self._pattern.neighbours)

    def _kept(self, count: int, separators: torch.Tensor | None) -> torch.Tensor:
        keep = torch.arange(self._seen, self._seen + count) < self._pattern.initial
        return keep if separators is None else keep | separators

    def _make_room(self, like: torch.Tensor, count: int) -> None:
        room = self._keep.shape[0]
        if self._held + count <= room:
            return
        room = max(2 * room, self._held + count, _LEAST_ROOM)
        for name in ("_k", "_v"):
            wider = like.new_empty(like.shape[0], room, like.shape[2])
            if self._held:
                wider[:, : self._held] = getattr(self, name)[:, : self._held]
            setattr(self, name, wider)
        self._keep = torch.cat((self._keep[: self._held], torch.zeros(room - self._held, dtype=torch.bool)))

    def _drop(self, neighbours: int) -> None:
        past = self._held - neighbours
        if past <= 0:
            return
        stay = self._keep[:past].nonzero()[:, 0]
        gone = past - len(stay)
        if not gone:
            return
        # Everything moves up; one entry at a time that is the window, as small as it was chosen to be.
        first = int((~self._keep[:past]).nonzero()[0])
        rows = torch.cat((stay[stay >= first], torch.arange(past, self._held)))
        for x in (self._k, self._v):
            x[:, first : first + len(rows)] = x[:, rows]
        self._keep[first : first + len(rows)] = self._keep[rows]
        self._held -= gone
