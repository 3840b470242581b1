"""Keys and values of the past, for decoding under a pattern: what is kept, and where it stands.

`GrowingCache` serves patterns as they are trained (positions never change; SepLLM's "fundamental" form): it drops what no later
query can see. `StreamingCache` has a fixed size: SepLLM's streaming form (arXiv 2412.12094, section 3.3) with its four parts,
and attention sinks with a window (StreamingLLM) as the case without separators; there positions are those within the cache, so
keys are kept without rotation.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from .pattern import Pattern

BLOCK = 64
"""Entries: a growing cache takes memory in whole blocks of so many."""


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

    After an `append` the query of the last entry sees everything in it. Two runs of memory hold it, what is kept for good and
    the window behind that, so that an entry is dropped without moving the others; under a pattern with a window a block more
    than is held makes room for it to move on.
    """

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self._k = self._v = torch.empty(0)  # (HK, room, D)
        self._address = (0, 0)
        self._keep = torch.empty(0, dtype=torch.bool)  # (room,) for good: initial entries and separators
        self._kept = self._start = self._end = 0  # held are [0, kept) and [start, end)
        self._seen = 0  # entries of the sequence so far

    def __len__(self) -> int:
        return self._kept + self._end - self._start

    @property
    def blocks(self) -> int:
        """Of memory, each of `BLOCK` entries."""
        return self._keep.shape[0] // BLOCK

    @property
    def k(self) -> torch.Tensor:
        """(HK, N, D), in order of the sequence."""
        return self._run(self._k)

    @property
    def v(self) -> torch.Tensor:
        return self._run(self._v)

    def fork(self) -> GrowingCache:
        """A copy that shares no memory with this one."""
        found = copy(self)
        found._k, found._v, found._keep = self._k.clone(), self._v.clone(), self._keep.clone()
        found._address = (found._k.data_ptr(), found._v.data_ptr())
        return found

    def with_new(
        self, k: torch.Tensor, v: torch.Tensor, separators: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values (HK, N + new, D) that new queries choose from, and (1, N + new) bool which of them are kept for good.

        What is held beside those is the newest of the sequence, without gaps: a window over these rows is one over the sequence.
        """
        if self._pattern.neighbours is None:
            kept = None
        else:
            window = self._keep[self._start : self._end]
            first = torch.ones(self._kept, dtype=torch.bool)
            kept = torch.cat((first, window, self._for_good(k.shape[1], separators)))[None]
        if not len(self):
            return k, v, kept
        return torch.cat((self.k, k), dim=1), torch.cat((self.v, v), dim=1), kept

    def append(self, k: torch.Tensor, v: torch.Tensor, separators: torch.Tensor | None = None) -> None:
        """Entries (HK, new, D), and (new,) bool whether they are separators; drops what no later query sees.

        The newest `neighbours` stay: the query of the last entry sees them all.
        """
        count = k.shape[1]
        keep = self._for_good(count, separators)
        if self._end + count > self._keep.shape[0]:
            self._arrange(k, self._room(count))
        end = self._end + count
        self._k[:, self._end : end], self._v[:, self._end : end], self._keep[self._end : end] = k, v, keep
        self._end, self._seen = end, self._seen + count
        self._drop()

    def extend(self, like: torch.Tensor, separator: bool) -> tuple[int, int, int, int, int, int]:
        """Makes an entry that a kernel writes, and drops as `append` does.

        Args:
            like: (HK, any, D) of the entries' dtype.

        Returns:
            Addresses of keys and values (HK, room, D), the room, and what the entry's query sees: `kept`, `start`, `end` of
            [0, kept) and [start, end). The entry is the last of those.
        """
        if self._end == self._keep.shape[0]:
            self._arrange(like, self._room(1))
        if self._pattern.neighbours is not None:
            self._keep[self._end] = separator or self._seen < self._pattern.initial
        self._end, self._seen = self._end + 1, self._seen + 1
        self._drop()
        k, v = self._address
        return k, v, self._keep.shape[0], self._kept, self._start, self._end

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        if self._kept == self._start:
            return x[:, : self._end]
        return torch.cat((x[:, : self._kept], x[:, self._start : self._end]), dim=1)

    def _for_good(self, count: int, separators: torch.Tensor | None) -> torch.Tensor:
        keep = torch.arange(self._seen, self._seen + count) < self._pattern.initial
        return keep if separators is None else keep | separators

    def _room(self, more: int) -> int:
        """Entries of memory for what is held and more, in whole blocks."""
        spare = 0 if self._pattern.neighbours is None else BLOCK
        return -(-(len(self) + max(more, spare)) // BLOCK) * BLOCK

    def _arrange(self, like: torch.Tensor, room: int) -> None:
        """Moves what is held, both runs next to each other, to memory for `room` entries."""
        held = len(self)
        keep = torch.zeros(room, dtype=torch.bool)
        if held:
            keep[: self._kept], keep[self._kept : held] = True, self._keep[self._start : self._end]
        for name in ("_k", "_v"):
            moved = like.new_empty(like.shape[0], room, like.shape[2])
            if held:
                moved[:, :held] = self._run(getattr(self, name))
            setattr(self, name, moved)
        self._keep, self._start, self._end = keep, self._kept, held
        self._address = (self._k.data_ptr(), self._v.data_ptr())

    def _drop(self) -> None:
        if self._pattern.neighbours is None:
            return
        past = self._end - self._start - self._pattern.neighbours
        if past > 0:
            stay = self._start + self._keep[self._start : self._start + past].nonzero()[:, 0]
            kept = self._kept + len(stay)
            for x in (self._k, self._v):
                x[:, self._kept : kept] = x[:, stay]
            self._kept, self._start = kept, self._start + past
        if self._keep.shape[0] > self._room(0):
            self._arrange(self._k, self._room(0))
