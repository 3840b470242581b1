"""When to ask again after a failure. No clock inside: times are passed in, so that a replay can run the same code."""

from __future__ import annotations

import math
import random
from typing import Literal

State = Literal["closed", "open", "half-open"]


class Backoff:
    """Pauses that double from `first_s` to `longest_s`, each shortened by up to half at random.

    The jitter keeps the devices of a cloud that was away from coming back all at once; equal seeds pause alike.
    """

    def __init__(self, seed: int | str, first_s: float = 0.25, longest_s: float = 5.0) -> None:
        self._random = random.Random(seed)
        self._first_s = first_s
        self._longest_s = longest_s
        self._next_s = first_s

    def next_s(self) -> float:
        pause_s = self._next_s
        self._next_s = min(pause_s * 2, self._longest_s)
        return pause_s * self._random.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._next_s = self._first_s


class CircuitBreaker:
    """Closed: calls go. Open, after a failure: none goes. Half-open, after the pause: one probe goes and decides.

    A missed deadline does not open it: that the link is slow is the link estimator's to say.
    """

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._retry_at_s: float | None = None  # None: closed
        self._held_until_s = -math.inf
        self._probing = False

    def state(self, now_s: float) -> State:
        if now_s < self._held_until_s:
            return "open"
        if self._retry_at_s is None:
            return "closed"
        return "open" if now_s < self._retry_at_s else "half-open"

    def allows(self, now_s: float) -> bool:
        """May a call begin now?"""
        state = self.state(now_s)
        return state == "closed" or (state == "half-open" and not self._probing)

    def began(self, now_s: float) -> None:
        """A call begins; while half-open it is the probe."""
        self._probing = self.state(now_s) == "half-open"

    def succeeded(self) -> None:
        """The other side answered, on time or late. What it asked to wait (`hold`) it still means."""
        self._retry_at_s, self._probing = None, False
        self._backoff.reset()

    def failed(self, now_s: float) -> None:
        """The other side cannot be reached or is broken. What fails during the pause is part of the same failure."""
        if self._retry_at_s is None or now_s >= self._retry_at_s:
            self._retry_at_s = now_s + self._backoff.next_s()
        self._probing = False

    def timed_out(self, now_s: float) -> None:
        """A call met its deadline: a probe has failed by that, any other call not."""
        if self._probing:
            self.failed(now_s)

    def hold(self, until_s: float) -> None:
        """The other side asks not to be called before that time."""
        self._held_until_s = max(self._held_until_s, until_s)
