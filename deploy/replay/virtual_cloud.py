"""The cloud's batching queue in virtual time: `edgefm.cloud.batcher` for one device, without its threads."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from .timing import CloudProfile, Timing

_DRAWN = 4096


@dataclass(frozen=True)
class Job:
    """A query in the cloud. `work`: share of the FM that is left to compute, 1 for all of it."""

    query: int
    arrived_ms: float
    deadline_ms: float
    work: float


class VirtualCloud:
    """One model, one batch at a time. After a batch of one, whoever finds the model idle does not wait for company."""

    def __init__(self, profile: CloudProfile, seed: int, max_batch: int = 16, max_delay_ms: float = 5.0) -> None:
        self._timings = [profile.timing(size) for size in range(1, max_batch + 1)]
        self._call = None if profile.call is None else profile.call.timing
        self._rng = np.random.default_rng([seed, 1])
        self._max_batch = max_batch
        self._max_delay_ms = max_delay_ms
        self._waiting: deque[Job] = deque()
        self._company = False
        self._busy = False
        self._drawn: dict[int, list[float]] = {}  # by size of the batch, 0 for calls

    def arrive(self, job: Job) -> None:
        self._waiting.append(job)

    def due_ms(self) -> float | None:
        """When the batch that is being collected closes; None: nothing waits, or the model is at another."""
        if self._busy or not self._waiting:
            return None
        first = self._waiting[0].arrived_ms
        return first + (self._max_delay_ms if self._company and len(self._waiting) < self._max_batch else 0.0)

    def begin(self, now_ms: float) -> tuple[list[Job], float]:
        """Takes a batch, without those past their deadline; returns it and what it takes, in ms (0 for an empty one)."""
        taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_batch))]
        self._company = len(taken) > 1
        live = [job for job in taken if job.deadline_ms >= now_ms]
        self._busy = bool(live)
        work = sum(job.work for job in live) / max(len(live), 1)
        return live, self._draw(len(live), self._timings[len(live) - 1]) * work if live else 0.0

    def done(self) -> None:
        self._busy = False

    def call_ms(self) -> float:
        """What one query costs beside link, queue and batch."""
        return 0.0 if self._call is None else self._draw(0, self._call)

    def _draw(self, key: int, timing: Timing) -> float:
        drawn = self._drawn.get(key)
        if not drawn:
            drawn = self._drawn[key] = timing.draw(self._rng, _DRAWN).tolist()
        return drawn.pop()
