"""Seconds since 1970 that do not jump, for what is kept for a time: a wall clock does, when NTP or a person sets it."""

from __future__ import annotations

import time

CLOCK_SET_S = 1_735_689_600.0
"""2025-01-01. A wall clock that says less has never been set: a device without a battery for it begins at 1970."""

_PASSING = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # the former counts suspension too


class SteadyClock:
    """Reads the wall clock once; from then on it goes as time goes, whatever the wall clock does.

    Args:
        newest_s: of the times that earlier runs have written down. A clock that was never set begins there: how long
            nobody was running it does not know.
    """

    def __init__(self, newest_s: float = 0.0) -> None:
        wall_s = time.time()
        begin_s = wall_s if wall_s >= CLOCK_SET_S else max(wall_s, newest_s)
        self._offset_s = begin_s - time.clock_gettime(_PASSING)

    def now_s(self) -> float:
        return self._offset_s + time.clock_gettime(_PASSING)


def mistaken(column: str) -> str:
    """SQL for times that a wrong clock has written: later than `:now`, or before the clock that now goes was set."""
    return f"({column} > :now OR ({column} < {CLOCK_SET_S} AND :now >= {CLOCK_SET_S}))"
