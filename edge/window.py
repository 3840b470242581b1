"""The latest rows of a stream, kept in an array so that a rebuild copies nothing."""

from __future__ import annotations

import numpy as np


class Window:
    """Holds the last `capacity` rows of equal width; a new row takes the place of the oldest."""

    def __init__(self, capacity: int, width: int) -> None:
        self._rows = np.empty((width, capacity))
        self._added = 0

    def __len__(self) -> int:
        return min(self._added, self._rows.shape[1])

    def add(self, *row: float) -> None:
        self._rows[:, self._added % self._rows.shape[1]] = row
        self._added += 1

    def clear(self) -> None:
        self._added = 0

    @property
    def columns(self) -> np.ndarray:
        """(width, N) view, valid until the next `add`; in no particular order."""
        return self._rows[:, : len(self)]
