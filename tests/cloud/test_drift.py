"""Drift: what its alarms need, how often they are false, and how soon they come; on seeded streams of devices that send
what they are unsure of, with thresholds that wander, and audits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from edgefm.cloud.config import DriftConfig
from edgefm.cloud.drift import (
    Alarm,
    Baseline,
    DriftMonitor,
    Margins,
    Observation,
    State,
    estimate_agreement,
    ks_distance,
    ks_limit,
)

CONFIG = DriftConfig()


def stream(
    seed: int, samples: int, audit: float, change_at: int | None = None, worse: float = 0.0, shift: float = 0.0
) -> Iterator[Observation]:
    """What the cloud sees of a device.

    Args:
        samples: that reach the cloud.
        change_at: of those, the first after the change.
        worse: more disagreement after it, at margin 0; less at higher ones.
        shift: share by which margins shrink then.
    """
    rng = np.random.default_rng(seed)
    sent, frame, threshold = 0, 0, 0.3
    while sent < samples:
        frame += 1
        if frame % 500 == 0:
            threshold = float(np.clip(0.3 + rng.normal(0, 0.08), 0.05, 0.9))
        changed = change_at is not None and sent >= change_at
        margin = rng.beta(2, 3) * (1 - shift * changed)
        disagreement = 0.5 * np.exp(-4 * margin) + worse * changed * (1 - margin)
        propensity = 1.0 if margin < threshold else audit
        if rng.random() < propensity:
            sent += 1
            yield Observation(margin, bool(rng.random() >= disagreement), propensity, float(frame))


def alarms(observations: Iterator[Observation], config: DriftConfig = CONFIG) -> list[tuple[int, Alarm]]:
    monitor = DriftMonitor(config, State(0, "pool"))
    raised = ((position, monitor.observe(observation)) for position, observation in enumerate(observations))
    return [(position, alarm) for position, alarm in raised if alarm is not None]


@pytest.mark.parametrize("audit", [0.02, 0.2])
def test_false_alarms_are_as_rare_as_stated(audit: float):
    """Nothing changes for 60 x 2,000 samples.

    The agreement test may raise one in `average_run` samples, 12 here, if its bounds were exact; they are upper bounds,
    so it raises fewer. The margin test may raise one in 1 % of the streams: 4 of 60 would be a chance of 0.3 %.
    """
    found = [alarm.kind for seed in range(60) for _, alarm in alarms(stream(seed, 2000, audit))]
    assert found.count("agreement") <= 6
    assert found.count("margin") <= 3


@pytest.mark.parametrize(("worse", "within"), [(0.4, 900), (0.6, 200)])
def test_a_student_that_agrees_less_at_equal_margins_raises_one_alarm(worse: float, within: int):
    for seed in range(10):
        found = alarms(stream(seed, 2200, 0.02, change_at=1200, worse=worse))
        assert [alarm.kind for _, alarm in found] == ["agreement"]
        position, alarm = found[0]
        assert 1200 <= position < 1200 + within
        # The evidence: the statistic reached its limit on samples from after the change, on which agreement is lower.
        assert alarm.statistic >= alarm.limit == CONFIG.average_run
        assert alarm.agreement.share < alarm.baseline_agreement.share
        assert 0 < alarm.agreement.samples <= position - 1100


def test_margins_that_move_raise_one_alarm():
    for seed in range(10):
        found = [alarm for _, alarm in alarms(stream(seed, 2600, 0.02, change_at=1200, shift=0.5))]
        assert [alarm.kind for alarm in found] == ["margin"]
        assert found[0].statistic >= found[0].limit >= CONFIG.least_shift


def test_a_wandering_threshold_alone_is_no_drift():
    """From sending nearly everything to sending little, as a device does that learns to trust its student."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        monitor = DriftMonitor(CONFIG, State(0, "pool"))
        sent = 0
        for frame in range(30_000):
            margin = rng.beta(2, 3)
            propensity = 1.0 if margin < max(0.9 - frame / 3000, 0.25) else 0.02
            if rng.random() < propensity:
                sent += 1
                agrees = bool(rng.random() >= 0.5 * np.exp(-4 * margin))
                assert monitor.observe(Observation(margin, agrees, propensity, float(frame))) is None
        assert sent > 5000 and monitor.state.baseline is not None and monitor.state.windows > 3


def test_an_alarm_stays_raised_until_the_stream_is_as_before_and_can_come_again():
    monitor = DriftMonitor(CONFIG, State(0, "pool"))
    rng = np.random.default_rng(5)
    raised, held = [], []
    for frame in range(6000):
        bad = 1000 <= frame < 1800 or 4000 <= frame < 4800
        margin = rng.beta(2, 3)
        agrees = bool(rng.random() >= (0.7 if bad else 0.2))
        alarm = monitor.observe(Observation(margin, agrees, 1.0, float(frame)))
        if alarm is not None:
            raised.append(frame)
        held.append(bool(monitor.state.alarms))
    assert len(raised) == 2 and 1000 <= raised[0] < 1200 and 4000 <= raised[1] < 4200
    assert all(held[raised[0] : 1800]) and not held[3999] and all(held[raised[1] : 4800]) and not held[5999]


def test_no_alarm_without_a_baseline():
    config = DriftConfig(baseline=50)
    assert alarms((Observation(0.1, frame < 20, 1.0, 0.0) for frame in range(49)), config) == []


def test_a_window_without_audits_counts_the_one_that_might_have_come():
    """What is answered on the edge is seen in audits alone: without them it would look as if it were gone."""
    window = Margins()
    for _ in range(200):
        window.add(Observation(0.1, True, 1.0, 0.0))
    assert window.effective == pytest.approx(250**2 / (200 + 50**2))
    window.add(Observation(0.9, True, 0.01, 0.0))
    assert window.effective == pytest.approx(400**2 / (200 + 2 * 100**2))
    often = Margins()
    often.add(Observation(0.9, True, 0.1, 0.0))  # where audits are frequent, one more weighs little
    assert often.effective == pytest.approx(20**2 / (2 * 10**2))


@pytest.mark.parametrize(
    "odd",
    [
        Observation(float("nan"), True, 1.0, 0.0),
        Observation(float("inf"), True, 1.0, 0.0),
        Observation(0.5, True, 1e-30, 0.0),
        Observation(0.5, True, float("nan"), 0.0),
        Observation(0.5, True, 2.0, 0.0),
    ],
)
def test_what_makes_no_sense_is_left_out(odd: Observation):
    monitor = DriftMonitor(CONFIG, State(0, "pool"))
    assert monitor.observe(odd) is None and monitor.agreement is None and monitor.state.first == []


def test_agreement_is_that_of_the_whole_stream_and_not_of_what_was_sent():
    """A thousand times: the estimate's mean is the truth, and its error is the spread of the estimates."""
    estimates, errors = [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        margins = rng.uniform(size=2000)
        propensities = np.where(margins < 0.3, 1.0, 0.1)
        sent = rng.uniform(size=2000) < propensities
        agrees = rng.uniform(size=2000) < margins  # half of the stream agrees
        observations = [
            Observation(float(m), bool(a), float(p), 0.0)
            for m, a, p in zip(margins[sent], agrees[sent], propensities[sent], strict=True)
        ]
        estimated = estimate_agreement(observations)
        assert estimated.samples == len(observations)
        estimates.append(estimated.share)
        errors.append(estimated.standard_error)
    assert abs(np.mean(estimates) - 0.5) < 4 * np.std(estimates) / 300**0.5
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.15)


def test_the_distance_is_that_of_the_weighted_distribution_functions():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = rng.integers(0, 10, 30).astype(float), rng.integers(2, 12, 40).astype(float)
        v, w = rng.uniform(0.1, 5, 30), rng.uniform(0.1, 5, 40)
        naive = max(abs(v[a <= x].sum() / v.sum() - w[b <= x].sum() / w.sum()) for x in np.concatenate((a, b)))
        assert ks_distance(a, v, b, w) == pytest.approx(naive)


def test_equal_distributions_exceed_the_limit_no_more_often_than_its_level():
    rng = np.random.default_rng(0)
    ones = np.ones(100)
    exceeded = sum(
        ks_distance(rng.uniform(size=100), ones, rng.uniform(size=100), ones) >= ks_limit(0.1, 0.02)
        for _ in range(1000)
    )
    assert exceeded <= 100 + 3 * 90**0.5


def test_the_baseline_bounds_disagreement_from_above_in_each_stratum():
    observations = [Observation(i / 500, i % 500 > 5 * (i % 40), 1.0, 0.0) for i in range(500)]
    baseline = Baseline.fit(observations, tolerance=0.03)
    assert len(baseline.bounds) == len(baseline.borders) + 1 and baseline.borders == sorted(baseline.borders)
    for lower in range(0, 500, 100):
        stratum = observations[lower : lower + 100]
        wrong = sum(not observation.agrees for observation in stratum) / 100
        assert wrong + 0.03 < baseline.bound(stratum[50].margin) < wrong + 0.03 + 0.15


@pytest.mark.parametrize("change", [{"worse": 0.6}, {"shift": 0.5}])
def test_an_alarm_has_evidence_also_when_the_clock_of_an_earlier_run_was_ahead(change: dict[str, float]):
    config = DriftConfig(recent=30)  # none of these is from before the restart
    seen = list(stream(3, 2600, 0.02, change_at=1200, **change))
    restart = alarms(iter(seen), config)[0][0] - 40
    ahead = [replace(one, at=one.at + 1e9 * (position < restart)) for position, one in enumerate(seen)]
    alarm = alarms(iter(ahead), config)[0][1]
    assert alarm.agreement.samples > 0 and alarm.since < 1e9
