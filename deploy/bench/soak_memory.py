"""Resident memory of processes, over their lives."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PERIOD_S = 1.0
_MB = 1e6


@dataclass
class _Life:
    pid: int
    began_s: float
    start_mb: float
    end_mb: float
    peak_mb: float
    ended_s: float


class Memory:
    """Looks at every watched process once a second, from a thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lives: defaultdict[str, list[_Life]] = defaultdict(list)
        self._watched: dict[str, _Life] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self._thread.start()

    def watch(self, name: str, pid: int) -> None:
        """From now on, as another life of `name`."""
        resident = _resident_mb(pid)
        if resident is None:  # it has ended already
            return
        now_s = time.monotonic()
        with self._lock:
            self._watched[name] = _Life(pid, now_s, resident, resident, resident, now_s)
            self._lives[name].append(self._watched[name])

    def forget(self, name: str) -> None:
        """Its life ends now."""
        with self._lock:
            if name in self._watched:
                _look(self._watched.pop(name))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def report(self) -> list[dict[str, Any]]:
        """Of each name: how many lives, the longest with its resident memory in 10^6 bytes, and the highest of all."""
        with self._lock:
            return [_row(name, lives) for name, lives in sorted(self._lives.items())]

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            with self._lock:
                for life in self._watched.values():
                    _look(life)


def _look(life: _Life) -> None:
    resident = _resident_mb(life.pid)
    if resident is not None:
        life.end_mb, life.ended_s = resident, time.monotonic()
        life.peak_mb = max(life.peak_mb, resident)


def _row(name: str, lives: list[_Life]) -> dict[str, Any]:
    longest = max(lives, key=lambda life: life.ended_s - life.began_s)
    return {
        "process": name,
        "lives": len(lives),
        "longest_life_s": round(longest.ended_s - longest.began_s),
        "start_mb": round(longest.start_mb),
        "end_mb": round(longest.end_mb),
        "peak_mb": round(max(life.peak_mb for life in lives)),
    }


def _resident_mb(pid: int) -> float | None:
    """None once it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / _MB if pages else None  # a zombie has none
