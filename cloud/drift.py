"""Has an environment moved away from what its student learned? Pure: no clock, no files; times come as data.

The FM also answers samples that the student answered: those it was unsure of, and audits. On them the student's joint
behaviour splits in two, and each half has a test against a baseline, the first samples of the same student and pool:

- agreement: how often the student disagrees with the FM at a given margin. Which samples are sent depends on nothing but
  the margin and chance, so at a given margin the sent ones are like all others, whatever the threshold does. For the
  strata of the baseline's margins, an upper bound of the baseline's disagreement (Wilson, 95 %, plus a tolerance) is the
  null hypothesis. The test is a mixture of e-CUSUMs, each a bet that disagreement is above the bound (Shin, Ramdas and
  Rinaldo, arXiv 2203.03532). It may be looked at after every sample: while the null holds, the expected number of
  samples to a false alarm is at least `average_run`.
- margin: the distribution of margins over the whole stream, from inverse-propensity weights. Window by window, the
  Kolmogorov-Smirnov distance to the baseline with effective sample sizes; the k-th window is tested at
  `margin_level / (k (k + 1))`, so that the chance of ever raising a false alarm against one baseline is `margin_level`.
  What is answered on the edge is seen in audits alone, and a window may lack them by chance: its effective size counts
  one more audit than came, and a window goes on until that size is large enough.

Both take samples for independent; a stream that dwells on one scene for longer than a window can raise an alarm.
An alarm stays raised until the test has come back to normal (hysteresis) or student or pool change.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .config import DriftConfig

STRATA = 5
_BETS = (0.1, 0.3, 0.9)
"""Small bets find small rises slowly, large ones large rises fast; below 1, so that no loss is total."""
_WILSON_Z = 1.645
_HIGHEST_BOUND = 0.95
MIN_PROPENSITY = 1e-3
"""Below it one sample would outweigh a thousand; such a sample is left out."""
UNSEEN_AUDIT = 50.0
"""Weight that an audit is expected to have before the first has come."""
_LONGEST = 20
"""A window so many times longer than usual, and still worth nothing, is given up."""
_CALM_STATISTIC = 2.0
_CALM_LEVEL = 0.05

Kind = Literal["agreement", "margin"]


@dataclass(frozen=True)
class Observation:
    """A sample that student and FM both answered."""

    margin: float  # the student's
    agrees: bool
    propensity: float
    at: float  # Unix seconds


@dataclass(frozen=True)
class Agreement:
    """Share of the stream on which student and FM agree, with its standard error."""

    share: float
    standard_error: float
    samples: int


@dataclass(frozen=True)
class Alarm:
    """What was found and on what evidence.

    Attributes:
        statistic, limit: of the test; the alarm is raised when the statistic reaches the limit.
        agreement, baseline_agreement: of the stream, recently and then; inverse-propensity weighted.
        since: Unix seconds of the first sample that speaks for it.
    """

    kind: Kind
    student_version: int
    pool_version: str
    statistic: float
    limit: float
    agreement: Agreement
    baseline_agreement: Agreement
    since: float


@dataclass
class Baseline:
    """The first samples of a student and pool."""

    borders: list[float]  # (STRATA - 1,) margins between the strata
    bounds: list[float]  # (STRATA,) disagreement that is still the baseline's
    agreement: Agreement

    @classmethod
    def fit(cls, observations: Sequence[Observation], tolerance: float) -> Baseline:
        margins = np.array([observation.margin for observation in observations])
        wrong = np.array([not observation.agrees for observation in observations])
        borders = np.quantile(margins, np.arange(1, STRATA) / STRATA)
        strata = np.searchsorted(borders, margins, side="right")
        bounds = [
            min(_wilson_upper(int(wrong[strata == k].sum()), int((strata == k).sum())) + tolerance, _HIGHEST_BOUND)
            for k in range(STRATA)
        ]
        return cls(borders.tolist(), bounds, estimate_agreement(observations))

    def bound(self, margin: float) -> float:
        return self.bounds[sum(border <= margin for border in self.borders)]


@dataclass
class Margins:
    """A window's margins and inverse-propensity weights."""

    margins: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    weight: float = 0.0
    squares: float = 0.0
    heaviest: float = 0.0  # of the audits

    def add(self, observation: Observation) -> None:
        weight = 1 / observation.propensity
        self.margins.append(observation.margin)
        self.weights.append(weight)
        self.weight += weight
        self.squares += weight**2
        if weight > 1:
            self.heaviest = max(self.heaviest, weight)

    @property
    def effective(self) -> float:
        """Number of equally weighted samples that would be worth as much (Kish), with one more audit."""
        unseen = self.heaviest or UNSEEN_AUDIT
        return (self.weight + unseen) ** 2 / (self.squares + unseen**2)


@dataclass
class State:
    """All that a monitor knows; plain data, so that a restart goes on with it."""

    student_version: int
    pool_version: str
    first: list[Observation] = field(default_factory=list)  # until there is a baseline
    baseline: Baseline | None = None
    margins: Margins | None = None  # the baseline's
    window: Margins = field(default_factory=Margins)  # being filled
    window_since: float = 0.0
    windows: int = 0  # tested
    log_wealth: list[float] = field(default_factory=lambda: [0.0] * len(_BETS))
    wealth_since: list[float] = field(default_factory=lambda: [0.0] * len(_BETS))
    calm: int = 0
    alarms: list[Alarm] = field(default_factory=list)


class DriftMonitor:
    """Watches one student with one pool in one environment."""

    def __init__(self, config: DriftConfig, state: State) -> None:
        self._config = config
        self.state = state
        self._recent: deque[Observation] = deque(state.first, maxlen=config.recent)

    @property
    def agreement(self) -> Agreement | None:
        """Of the latest `recent` samples; None before the first."""
        return estimate_agreement(self._recent) if self._recent else None

    def observe(self, observation: Observation) -> Alarm | None:
        """Takes a sample in; returns the alarm that it raises."""
        if not math.isfinite(observation.margin) or not MIN_PROPENSITY <= observation.propensity <= 1:
            return None
        state, config = self.state, self._config
        self._recent.append(observation)
        alarm = None
        if state.baseline is not None:
            alarm = self._test_agreement(observation, state.baseline)
        else:
            state.first.append(observation)
            if len(state.first) >= config.baseline:
                state.baseline, state.first = Baseline.fit(state.first, config.tolerance), []
        return self._fill_window(observation) or alarm

    def _fill_window(self, observation: Observation) -> Alarm | None:
        state, config = self.state, self._config
        window = state.window
        if not window.margins:
            state.window_since = observation.at
        window.add(observation)
        least = config.baseline if state.margins is None else config.window
        if len(window.margins) < least or state.baseline is None:
            return None
        alarm = None
        if window.effective >= config.effective:
            if state.margins is None:
                state.margins = window
            else:
                alarm = self._test_margins(window, state.margins, state.baseline)
        elif len(window.margins) < _LONGEST * least:
            return None  # it goes on filling
        state.window = Margins()
        return alarm

    @property
    def window_begins(self) -> bool:
        """A window has just been completed: a good moment to save the state."""
        return not self.state.window.margins

    # ---- the two tests

    def _test_agreement(self, observation: Observation, baseline: Baseline) -> Alarm | None:
        state = self.state
        surprise = (not observation.agrees) - baseline.bound(observation.margin)
        for i, bet in enumerate(_BETS):
            if state.log_wealth[i] <= 0:
                state.log_wealth[i], state.wealth_since[i] = 0.0, observation.at
            state.log_wealth[i] += math.log1p(bet * surprise)
            if self._raised("agreement"):  # so that the way back does not take as long as the alarm has lasted
                state.log_wealth[i] = min(state.log_wealth[i], math.log(self._config.average_run))
        statistic = sum(map(math.exp, state.log_wealth)) / len(_BETS)
        limit = self._config.average_run
        if self._raised("agreement"):
            state.calm = state.calm + 1 if statistic < _CALM_STATISTIC else 0
            if state.calm >= self._config.window:
                self._clear("agreement")
            return None
        if statistic < limit:
            return None
        state.calm = 0
        best = max(range(len(_BETS)), key=lambda i: state.log_wealth[i])
        return self._raise("agreement", statistic, limit, baseline, state.wealth_since[best])

    def _test_margins(self, window: Margins, then: Margins, baseline: Baseline) -> Alarm | None:
        state, config = self.state, self._config
        distance = ks_distance(*map(np.array, (then.margins, then.weights, window.margins, window.weights)))
        sizes = 1 / then.effective + 1 / window.effective
        state.windows += 1
        if self._raised("margin"):
            if distance < ks_limit(_CALM_LEVEL, sizes):
                self._clear("margin")
            return None
        level = config.margin_level / (state.windows * (state.windows + 1))
        limit = max(ks_limit(level, sizes), config.least_shift)
        if distance < limit:
            return None
        return self._raise("margin", distance, limit, baseline, state.window_since)

    def _raised(self, kind: Kind) -> bool:
        return any(alarm.kind == kind for alarm in self.state.alarms)

    def _clear(self, kind: Kind) -> None:
        self.state.alarms = [alarm for alarm in self.state.alarms if alarm.kind != kind]

    def _raise(self, kind: Kind, statistic: float, limit: float, baseline: Baseline, since: float) -> Alarm:
        since = min(since, self._recent[-1].at)  # the clock of an earlier run may have been ahead of this one's
        now = estimate_agreement([observation for observation in self._recent if observation.at >= since])
        state = self.state
        alarm = Alarm(kind, state.student_version, state.pool_version, statistic, limit, now, baseline.agreement, since)
        state.alarms.append(alarm)
        return alarm


def estimate_agreement(observations: Sequence[Observation] | deque[Observation]) -> Agreement:
    """Inverse-propensity weighted (Hájek), its error by linearisation."""
    agrees = np.array([observation.agrees for observation in observations], np.float64)
    weights = np.array([1 / observation.propensity for observation in observations])
    share = float((weights * agrees).sum() / weights.sum())
    error = float(np.sqrt((weights**2 * (agrees - share) ** 2).sum()) / weights.sum())
    return Agreement(share, error, len(agrees))


def ks_distance(a: np.ndarray, a_weights: np.ndarray, b: np.ndarray, b_weights: np.ndarray) -> float:
    """Largest difference of two weighted distribution functions; (N,) and (M,) values."""
    values = np.concatenate((a, b))
    order = np.argsort(values, kind="stable")
    steps = np.concatenate((a_weights / a_weights.sum(), -b_weights / b_weights.sum()))[order]
    last_of_equals = np.append(np.diff(values[order]) > 0, True)
    return float(np.abs(np.cumsum(steps)[last_of_equals]).max())


def ks_limit(level: float, sizes: float) -> float:
    """Distance that two samples of one distribution exceed with probability `level`; `sizes` is 1/n + 1/m."""
    return math.sqrt(-math.log(level / 2) / 2 * sizes)


def _wilson_upper(wrong: int, samples: int) -> float:
    if samples == 0:
        return 1.0
    z2 = _WILSON_Z**2
    share = wrong / samples
    spread = _WILSON_Z * math.sqrt(share * (1 - share) / samples + z2 / (4 * samples**2))
    return (share + z2 / (2 * samples) + spread) / (1 + z2 / samples)
