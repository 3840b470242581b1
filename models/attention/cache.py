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

    Storage is taken once, with the first entries. Entries may come several at a time, as many as there is room for before the
    next compression: that is what one by one would give, as long as each entry's query sees the earlier of them.
    """

    def __init__(self, budget: StreamingBudget) -> None:
        self.budget = budget
        self._k = self._v = torch.empty(
            0
        )  # (HK, capacity, D): initial entries, then separators, then the rest in order
        self._is_separator = torch.zeros(budget.capacity, dtype=torch.bool)  # of the entries behind the first two parts
        self._head = 0  # entries of the first two parts
        self._held = 0

    def __len__(self) -> int:
        return self._held

    @property
    def k(self) -> torch.Tensor:
        """(HK, N, D), initial entries, then separators, then the rest in order."""
        return self._k[:, : self._held]

    @property
    def v(self) -> torch.Tensor:
        return self._v[:, : self._held]

    def make_room(self) -> int:
        """Compresses a cache that is full; returns how many entries it takes before it is full again, 1 at least."""
        if self._held == self.budget.capacity:
            self._compress()
        return self.budget.capacity - self._held

    def append(self, k: torch.Tensor, v: torch.Tensor, separators: torch.Tensor | None = None) -> None:
        """Entries (HK, new, D), and (new,) bool whether they are separators.

        Raises:
            ConfigError: there is no room for so many, see `make_room`; nothing has changed then but a compression.
        """
        count = k.shape[1]
        if count > (room := self.make_room()):
            raise ConfigError(f"the streaming cache has room for {room} entries now, got {count}; give them in parts")
        if not self._held:
            self._k, self._v = (x.new_empty(x.shape[0], self.budget.capacity, x.shape[2]) for x in (k, v))
        end = self._held + count
        self._k[:, self._held : end], self._v[:, self._held : end] = k, v
        self._is_separator[self._held : end] = False if separators is None else separators
        self._head = max(self._head, min(end, self.budget.initial))
        self._held = end

    def _compress(self) -> None:
        past = self._held - self.budget.window
        leaving = self._head + self._is_separator[self._head : past].nonzero()[:, 0]
        kept = torch.cat((torch.arange(self.budget.initial, self._head), leaving))
        kept = kept[max(len(kept) - self.budget.separators, 0) :]
        rows = torch.cat((kept, torch.arange(past, self._held)))
        begin, end = self.budget.initial, self.budget.initial + len(rows)
        for x in (self._k, self._v):
            x[:, begin:end] = x[:, rows.to(x.device)]
        self._is_separator[begin:end] = self._is_separator[rows]
        self._head, self._held = begin + len(kept), end


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
