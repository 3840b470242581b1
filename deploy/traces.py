"""Bandwidth traces: when a link may deliver, in mahimahi's format, recorded or made from a seed.

A trace is a list of millisecond timestamps, each an opportunity to deliver one packet of up to 1500 bytes; a timestamp
given k times is k packets. At its last timestamp the trace starts again from zero (Netravali et al., "Mahimahi:
Accurate Record-and-Replay for HTTP", USENIX ATC 2015, section 4, LinkShell).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..models.errors import TraceError

PACKET_BYTES = 1500
_PACKET_MBIT = PACKET_BYTES * 8 / 1e6
_LARGEST_MS = 10**15
_CONSTANT_PERIOD_MS = 6000  # whole packets for every multiple of 0.002 Mbit/s


@dataclass(frozen=True, eq=False)
class Trace:
    """One direction of a link.

    `opportunities_ms`: (N,) sorted int64, milliseconds from the trace's start, each one chance to deliver 1500 bytes.
    Raises TraceError for none at all, negative or unsorted ones, or a last one at zero.
    """

    name: str
    opportunities_ms: NDArray[np.int64]

    def __post_init__(self) -> None:
        times = np.array(self.opportunities_ms, dtype=np.int64)
        times.setflags(write=False)
        object.__setattr__(self, "opportunities_ms", times)
        if times.ndim != 1 or times.size == 0:
            raise TraceError(f"trace {self.name}: no delivery opportunity in it")
        if times[0] < 0 or bool(np.any(np.diff(times) < 0)):
            raise TraceError(f"trace {self.name}: timestamps must be sorted and not negative")
        if times[-1] == 0:
            raise TraceError(f"trace {self.name}: the last timestamp is 0 ms; a trace must last at least 1 ms")

    @property
    def period_ms(self) -> int:
        """The trace starts again after this many milliseconds: its last timestamp."""
        return int(self.opportunities_ms[-1])

    @property
    def duration_s(self) -> float:
        return self.period_ms / 1000

    @property
    def mean_mbit_per_s(self) -> float:
        return self.opportunities_ms.size * _PACKET_MBIT / self.duration_s

    @property
    def longest_outage_ms(self) -> int:
        """The longest wait between one opportunity and the next, the wrap at the end included."""
        return int(np.diff(self.opportunities_ms, prepend=0).max())

    def opportunities_by(self, elapsed_ms: float) -> int:
        """How many opportunities fall in [0, elapsed_ms], wraps included: the trace's integral, in packets."""
        if elapsed_ms < 0:
            return 0
        cycles, rest_ms = divmod(elapsed_ms, self.period_ms)
        in_cycle = int(np.searchsorted(self.opportunities_ms, rest_ms, side="right"))
        return int(cycles) * self.opportunities_ms.size + in_cycle

    def time_of(self, index: int) -> int:
        """When opportunity `index` (from 0, counted on through the wraps) comes, in ms from the start."""
        cycles, place = divmod(index, self.opportunities_ms.size)
        return cycles * self.period_ms + int(self.opportunities_ms[place])


def read_mahimahi(path: str | Path) -> Trace:
    """Reads a mahimahi trace: one decimal number of milliseconds a line, sorted; the trace takes the file's name.

    Raises TraceError, naming the file and the line (from 1), for a file that is missing, unreadable, empty or not text,
    and for a line that is not a number, is negative, is too large or goes back in time.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TraceError(f"{path}: cannot read the trace: {error.strerror or error}") from error
    lines = raw.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise TraceError(f"{path}: line 1: the trace is empty; it needs one timestamp in ms a line")
    times: list[int] = []
    previous = 0
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text.isdigit():  # bytes: the ten ASCII digits only
            kind = "negative" if text[:1] == b"-" and text[1:].isdigit() else "not a number"
            raise TraceError(f"{path}: line {number}: {_shown(text)} is {kind}; expected a timestamp in ms")
        if len(text) > 15:
            raise TraceError(f"{path}: line {number}: {_shown(text)} is too large; the limit is {_LARGEST_MS} ms")
        time_ms = int(text)
        if time_ms < previous:
            raise TraceError(f"{path}: line {number}: {time_ms} ms comes after {previous} ms; sort the trace")
        times.append(time_ms)
        previous = time_ms
    if previous == 0:
        raise TraceError(f"{path}: line {len(lines)}: the last timestamp is 0 ms; a trace must last at least 1 ms")
    return Trace(path.name, np.array(times, dtype=np.int64))


def _shown(text: bytes) -> str:
    cut = text[:24].decode("ascii", errors="backslashreplace")
    return repr(cut + ("…" if len(text) > 24 else ""))


def constant_trace(mbit_per_s: float) -> Trace:
    """An even link of `mbit_per_s` (to 0.002 Mbit/s); by any moment it has allowed at most that rate.

    Raises TraceError for a rate that is not between 0.002 and 10000 Mbit/s.
    """
    if not 0.002 <= mbit_per_s <= 10_000:
        raise TraceError(f"a constant trace of {mbit_per_s} Mbit/s: the rate must be within 0.002 to 10000 Mbit/s")
    packets = round(mbit_per_s * _CONSTANT_PERIOD_MS / 1000 / _PACKET_MBIT)
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
    packets = np.diff(np.floor(capacity_mbit / _PACKET_MBIT).astype(np.int64), prepend=0)
    packets[-1] = max(int(packets[-1]), 1)  # the last timestamp is the period
    return Trace(f"synthetic-{seed}", np.repeat(np.arange(1, length_ms + 1, dtype=np.int64), packets))


def with_outage(trace: Trace, start_s: float, length_s: float) -> Trace:
    """The same link, but nothing gets through for `length_s` seconds from `start_s` on in every period.

    Raises TraceError when the outage does not end before the period does.
    """
    start_ms, end_ms = start_s * 1000, (start_s + length_s) * 1000
    if not 0 <= start_ms <= end_ms < trace.period_ms:
        raise TraceError(f"an outage of {length_s} s from {start_s} s on does not fit into {trace.duration_s} s")
    times = trace.opportunities_ms
    return Trace(f"{trace.name}-outage", times[(times < start_ms) | (times >= end_ms)])


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
