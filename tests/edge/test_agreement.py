from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from edgefm.edge.agreement import STRATA, AgreementCurve, Evidence
from edgefm.edge.config import SwitcherConfig
from edgefm.edge.switcher import LinkState, Switcher
from edgefm.edge.thresholds import Costs, ThresholdTable
from hypothesis import given, settings
from hypothesis import strategies as st

piece = st.tuples(st.integers(0, 12).map(lambda n: n / 12), st.booleans(), st.sampled_from([0.02, 0.3, 1.0]))


def fit(pieces) -> AgreementCurve:
    return AgreementCurve.fit(*np.array(pieces, np.float64).T)


def at(curve: AgreementCurve, margin: float) -> float:
    """Expected disagreement of one sample."""
    return float(curve.above(np.array([margin]))[0][0])


@given(st.lists(piece, min_size=1, max_size=80))
def test_disagreement_is_a_share_that_never_rises_with_the_margin(pieces):
    curve = fit(pieces)
    assert (np.diff(curve.borders) > 0).all() and len(curve.borders) <= STRATA
    assert (np.diff(curve.disagreement) <= 1e-12).all()
    assert ((curve.disagreement >= 0) & (curve.disagreement <= 1)).all()
    assert (curve.variance >= 0).all()
    assert at(curve, -5.0) == curve.disagreement[0]  # below the lowest border


@given(st.lists(piece, min_size=1, max_size=13, unique_by=lambda p: p[0]), st.randoms(use_true_random=False))
def test_the_order_of_the_evidence_does_not_matter(pieces, random):
    shuffled = random.sample(pieces, len(pieces))
    grid = np.linspace(0, 1, 40)
    for one, other in zip(fit(shuffled).above(grid), fit(pieces).above(grid), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.02, 1.0])), min_size=1, max_size=60))
def test_at_a_single_margin_it_is_the_plain_rate(evidence):
    """Samples of one stratum count alike, whatever their propensities."""
    curve = fit([(0.25, agrees, propensity) for agrees, propensity in evidence])
    plain = sum(not agrees for agrees, _ in evidence) / len(evidence)
    assert [at(curve, margin) for margin in (0.0, 0.25, 1.0)] == pytest.approx([plain] * 3)


def test_the_plain_rate_of_each_stratum_when_nothing_has_to_be_pooled():
    """200 pieces of equal weight: ten strata of 20, each with its own number of disagreements."""
    wrong = [20, 15, 12, 9, 7, 5, 3, 2, 1, 0]
    pieces = [((20 * s + i) / 200, i >= wrong[s], 1.0) for s in range(STRATA) for i in range(20)]
    curve = fit(pieces)
    np.testing.assert_allclose(curve.borders, np.arange(STRATA) / STRATA)
    np.testing.assert_allclose(curve.disagreement, np.array(wrong) / 20)


def test_the_variance_is_that_of_the_mean_of_each_step():
    wrong = [1.0, 0.0, 1.0, 1.0, 0.25, 0.0, 0.0, 0.25]
    curve = fit([(0.5 * (i > 3), 1 - w, 1.0) for i, w in enumerate(wrong)])
    half = np.var(wrong) / 2
    expected = [(4 * np.var(wrong[:4]) + half) / 16, (4 * np.var(wrong[4:]) + half) / 16]
    np.testing.assert_allclose(curve.variance, expected)


def test_few_pieces_that_agree_prove_less_than_many():
    wrong = [(0.0, i % 2, 1.0) for i in range(20)]
    few, many = (fit(wrong + [(1.0, 1, n / 20)] * n) for n in (2, 20))
    assert few.disagreement[-1] == many.disagreement[-1] == 0
    assert few.variance[-1] > 50 * many.variance[-1] > 0


def test_above_the_last_step_there_is_exactly_nothing():
    """Else a target of 1 would be reached or not by rounding."""
    curve = AgreementCurve(np.arange(5.0), np.array([0.7, 0.3, 0.1, 0.1, 0.0]), np.array([0.1, 0.2, 0.3, 0.1, 0.0]))
    wrong, variance = curve.above(np.linspace(-1, 6, 71))
    assert not wrong[-20:].any() and not variance[-20:].any() and wrong[0] > 0


@given(st.lists(piece, min_size=1, max_size=80), st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=30))
def test_what_lies_above_a_margin_is_summed_over_the_steps(pieces, window):
    curve, margins = fit(pieces), np.sort(window)
    wrong, variance = curve.above(margins)
    for i in range(len(margins)):
        step = [int(max(np.searchsorted(curve.borders, margin, side="right") - 1, 0)) for margin in margins[i:]]
        counts = np.bincount(step, minlength=len(curve.borders))
        assert wrong[i] == pytest.approx(counts @ curve.disagreement, abs=1e-9)
        assert variance[i] == pytest.approx(counts**2 @ curve.variance, abs=1e-9)


def test_the_standard_error_is_the_spread_of_the_estimate():
    """Over many draws of evidence the estimated agreement spreads as its standard error says."""
    window = np.linspace(0, 1, 200)
    estimates, errors = [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        margins = rng.random(600)
        agrees = rng.random(600) < 0.6 + 0.4 * margins
        table = ThresholdTable.build(window, fit(np.stack([margins, agrees, np.ones(600)], 1)), Costs(1, 1, 1))
        estimates.append(table.agreement[100])
        errors.append(table.error[100])
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.25)


def isotonic_by_brute_force(rates: list[float], counts: list[int]) -> list[float]:
    """Least squares over every division into blocks whose means do not rise: the best feasible one is the solution."""
    best, cost = [], math.inf
    n = len(rates)
    for cuts in itertools.product((False, True), repeat=n - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [n]
        fitted: list[float] = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            fitted += [float(np.average(rates[start:end], weights=counts[start:end]))] * (end - start)
        error = sum(c * (r - f) ** 2 for r, c, f in zip(rates, counts, fitted, strict=True))
        if all(a >= b - 1e-12 for a, b in itertools.pairwise(fitted)) and error < cost:
            best, cost = fitted, error
    return best


@settings(max_examples=40)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=2, max_size=7))
def test_pooling_is_the_isotonic_solution(strata):
    """Equal weights a stratum come from propensities; unequal counts within are what the pooling must weigh by."""
    pieces = []
    for s, agrees in enumerate(strata):
        # Each group weighs 1 in sum and has one margin: with exactly STRATA groups it is one stratum.
        pieces += [(s / 10, a, len(agrees)) for a in agrees]
    for s in range(len(strata), STRATA):
        pieces.append((s / 10, True, 1.0))
    # Propensity may not exceed 1 on a device; as weights only their ratios count.
    curve = fit([(m, a, p / 6) for m, a, p in pieces])
    rates = [1 - np.mean(agrees) for agrees in strata] + [0.0] * (STRATA - len(strata))
    counts = [len(agrees) for agrees in strata] + [1] * (STRATA - len(strata))
    expected = isotonic_by_brute_force(rates, counts)
    np.testing.assert_allclose([at(curve, s / 10 + 1e-9) for s in range(STRATA)], expected, atol=1e-9)


def test_the_agreement_of_the_system_is_estimated_from_a_biased_stream():
    """Cold start, then only uncertain samples and 2 % audits reach the FM. The estimate at the chosen threshold is near
    the truth (choosing by it and the small count of audits make it a little too high); the plain rate is far off."""
    errors, plain = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        switcher = Switcher(SwitcherConfig(accuracy_target=0.95, audit_share=0.02, seed=seed))
        margins = rng.exponential(0.1, 4000)
        probability = 1 - 0.45 * np.exp(-margins / 0.08)  # of agreeing
        agrees = rng.random(4000) < probability
        seen: list[bool] = []
        for margin, agree in zip(margins.tolist(), agrees.tolist(), strict=True):
            decision = switcher.decide(margin, 5.0, LinkState(40.0, 10.0, 50.0), 1000.0)
            if decision.to_cloud:
                switcher.learn(margin, agree, decision.propensity)
                seen.append(agree)
        assert switcher.table is not None and switcher.threshold is not None
        index = int(np.argmax(switcher.table.thresholds >= switcher.threshold))
        local = margins >= switcher.threshold
        truth = 1 - ((1 - probability) * local).mean()
        errors.append(switcher.table.agreement[index] - truth)
        plain.append(np.mean(seen[-500:]) - probability.mean())
        assert 0.2 < local.mean() < 0.9
    assert abs(np.mean(errors)) < 0.025 and np.max(np.abs(errors)) < 0.07
    assert np.mean(plain) < -0.1


def test_evidence_of_its_own_replaces_the_calibration():
    evidence = Evidence(window=50, enough=20)
    evidence.reset([0.1] * 10, [False] * 10, [1.0] * 10)
    for _ in range(9):
        evidence.add(0.1, True, 1.0)
    assert evidence.curve() is None  # half of the evidence must be its own
    evidence.add(0.1, True, 1.0)
    mixed = evidence.curve()
    assert mixed is not None and at(mixed, 0.1) == pytest.approx(0.5)
    for _ in range(10):
        evidence.add(0.1, True, 1.0)
    own = evidence.curve()
    assert own is not None and at(own, 0.1) == 0.0
    evidence.reset([], [], [])
    assert evidence.curve() is None


def test_only_the_window_counts():
    evidence = Evidence(window=40, enough=20)
    for _ in range(40):
        evidence.add(0.5, False, 1.0)
    for _ in range(40):
        evidence.add(0.5, True, 1.0)
    curve = evidence.curve()
    assert curve is not None and at(curve, 0.5) == 0.0
