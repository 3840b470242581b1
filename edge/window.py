"""The latest rows of a stream, kept in an array so that a rebuild copies nothing."""

from __future__ import annotations

import numpy as np


class Window:
    """Holds the last `capacity` rows of equal width; a new row takes the place of the oldest."""

    def __init__(self, capacity: int, width: int) -> None:
        self._rows = np.empty((width, capacity))
        self._each = tuple(self._rows)  # a number set in a column costs a third of a row set across them
        self._added = 0

    def __len__(self) -> int:
        return min(self._added, self._rows.shape[1])

    def add(self, *row: float) -> None:
        place = self._added % self._rows.shape[1]
        for column, value in zip(self._each, row, strict=True):
            column[place] = value
        self._added += 1

    def clear(self) -> None:
        self._added = 0

    @property
    def columns(self) -> np.ndarray:
        """(width, N) view, valid until the next `add`; in no particular order."""
        return self._rows[:, : len(self)]
