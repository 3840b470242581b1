"""Links that nobody recorded: even ones, and ones that wander between states like a moving phone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...models.errors import TraceError
from .trace import PACKET_MBIT, Trace

_CONSTANT_PERIOD_MS = 6000  # whole packets for every multiple of 0.002 Mbit/s


def constant_trace(mbit_per_s: float) -> Trace:
    """An even link of `mbit_per_s` (to 0.002 Mbit/s); by any moment it has allowed at most that rate.

    Raises TraceError for a rate that is not between 0.002 and 10000 Mbit/s.
    """
    if not 0.002 <= mbit_per_s <= 10_000:
        raise TraceError(f"a constant trace of {mbit_per_s} Mbit/s: the rate must be within 0.002 to 10000 Mbit/s")
    packets = round(mbit_per_s * _CONSTANT_PERIOD_MS / 1000 / PACKET_MBIT)
    order = np.arange(1, packets + 1, dtype=np.int64)
    return Trace(f"constant-{mbit_per_s:g}mbit", -(-order * _CONSTANT_PERIOD_MS // packets))


@dataclass(frozen=True)
class LinkState:
    """One state of the synthetic link: its mean rate, its mean stay, and its weight when the next state is drawn."""

    name: str
    mean_mbit_per_s: float
    mean_dwell_s: float
    weight: float


# The two directions differ in rate alone, so that one seed gives both the same stays and the same outages.
LTE_DOWN = (
    LinkState("good", 30.0, 3.0, 4.0),
    LinkState("fair", 18.0, 3.0, 5.0),
    LinkState("poor", 6.0, 1.5, 4.0),
    LinkState("outage", 0.0, 0.22, 2.5),
)
LTE_UP = (
    LinkState("good", 12.0, 3.0, 4.0),
    LinkState("fair", 7.0, 3.0, 5.0),
    LinkState("poor", 2.5, 1.5, 4.0),
    LinkState("outage", 0.0, 0.22, 2.5),
)
_JITTER_STEP_MS = 20


def synthetic_trace(seed: int, duration_s: float = 60.0, states: tuple[LinkState, ...] = LTE_DOWN) -> Trace:
    """A made link that wanders between `states` like a moving LTE phone: a semi-Markov chain from `seed`.

    It starts in the first state. A stay is uniform in (0, 2 x the state's mean dwell), so an outage ends within 0.44 s;
    the next state is drawn among the others by weight; every 20 ms the state's rate is scaled by uniform(0.6, 1.4).
    One seed with LTE_DOWN and LTE_UP gives the two directions of one link, outages at the same moments.

    Measured for seed 7 and 60 s: LTE_DOWN 19.1 Mbit/s, longest outage 343 ms; LTE_UP 7.6 Mbit/s, 344 ms; five outages.
    Over seeds 0 to 99: LTE_DOWN 20.6 ± 1.6 Mbit/s, LTE_UP 8.2 ± 0.6 Mbit/s, 4.5 ± 2.0 outages (≥ 50 ms) a minute, none
    longer than 443 ms.

    Raises TraceError for a duration under 1 ms or fewer than two states.
    """
    length_ms = round(duration_s * 1000)
    if length_ms < 1 or len(states) < 2:
        raise TraceError(f"a synthetic trace of {duration_s} s with {len(states)} states: needs 1 ms and two states")
    rates = _wander(np.random.default_rng([seed, 0]), length_ms, states)
    steps = -(-length_ms // _JITTER_STEP_MS)
    jitter = np.random.default_rng([seed, 1]).uniform(0.6, 1.4, steps)
    capacity_mbit = np.cumsum(rates * np.repeat(jitter, _JITTER_STEP_MS)[:length_ms]) / 1000
    packets = np.diff(np.floor(capacity_mbit / PACKET_MBIT).astype(np.int64), prepend=0)
    packets[-1] = max(int(packets[-1]), 1)  # the last timestamp is the period
    return Trace(f"synthetic-{seed}", np.repeat(np.arange(1, length_ms + 1, dtype=np.int64), packets))


def _wander(rng: np.random.Generator, length_ms: int, states: tuple[LinkState, ...]) -> NDArray[np.float64]:
    """The mean rate in force at each millisecond, Mbit/s: (length_ms,)."""
    rates = np.zeros(length_ms)
    at_ms, state = 0, 0
    while at_ms < length_ms:
        stay_ms = 1 + int(rng.uniform(0.0, 2000 * states[state].mean_dwell_s))
        rates[at_ms : at_ms + stay_ms] = states[state].mean_mbit_per_s
        at_ms += stay_ms
        weights = np.array([0.0 if place == state else other.weight for place, other in enumerate(states)])
        state = int(rng.choice(len(states), p=weights / weights.sum()))
    return rates
