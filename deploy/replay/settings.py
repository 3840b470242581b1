"""What is replayed, and how it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ...edge.config import SwitcherConfig
from ...models.errors import ConfigError
from ..traces import Trace

LATENCY_TOLERANCE = 0.10
"""Relative difference of mean and 95th percentile that live and virtual may have."""
SHARE_TOLERANCE = 0.02


@dataclass(frozen=True)
class ReplaySettings:
    """One device, its frames and its link.

    Attributes:
        rate: of arrivals, frames a second.
        payload_bytes: of every image; None: what it has.
        propagation_ms: one way.
        deadline_ms: of a query.
        reset_after_ms: live alone: an outage that lasts longer breaks every connection; None: outages stall.
    """

    uplink: Trace
    downlink: Trace
    samples: int = 1000
    rate: float = 2.0
    payload_bytes: int | None = None
    propagation_ms: float = 25.0
    deadline_ms: float = 1000.0
    switcher: SwitcherConfig = field(default_factory=SwitcherConfig)
    seed: int = 0
    reset_after_ms: float | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or not 0 < self.rate < math.inf:
            raise ConfigError(f"a replay needs samples and a positive rate, got {self.samples} and {self.rate}")
        if self.payload_bytes is not None and self.payload_bytes < 1:
            raise ConfigError(f"a payload has at least one byte, got {self.payload_bytes}")
        if not 0 <= self.propagation_ms < math.inf or not 0 < self.deadline_ms < math.inf:
            raise ConfigError("propagation_ms must not be negative and deadline_ms must be positive")


@dataclass(frozen=True)
class Outcome:
    """Of one replay, live or virtual; latencies from a frame's arrival to its answer."""

    samples: int
    mean_ms: float
    p50_ms: float
    p95_ms: float
    edge_share: float
    cloud_share: float
    fallback_share: float

    @classmethod
    def of(cls, total_ms: np.ndarray, routes: Sequence[str]) -> Outcome:
        route = np.array(routes)
        shares = [float((route == name).mean()) for name in ("edge", "cloud", "fallback")]
        return cls(len(route), float(total_ms.mean()), *(float(np.percentile(total_ms, q)) for q in (50, 95)), *shares)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def disagreements(live: Outcome, virtual: Outcome) -> list[str]:
    """What differs by more than it may, in words; empty when they agree."""
    found = []
    for name, text in (("mean_ms", "mean latency"), ("p95_ms", "95th percentile of latency")):
        there, here = getattr(live, name), getattr(virtual, name)
        if abs(here - there) > LATENCY_TOLERANCE * there:
            found.append(f"{text}: {there:.1f} ms live, {here:.1f} ms virtual ({here / there - 1:+.1%})")
    if abs(live.edge_share - virtual.edge_share) > SHARE_TOLERANCE:
        found.append(f"edge share: {live.edge_share:.1%} live, {virtual.edge_share:.1%} virtual")
    return found
