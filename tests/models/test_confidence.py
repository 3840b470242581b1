from __future__ import annotations

import numpy as np
import pytest
from edgefm.models.confidence import (
    MIN_TEMPERATURE,
    PRIOR_SHARE,
    Confidence,
    fit_temperature,
    graded_agreement,
    log_posterior,
)
from hypothesis import given
from hypothesis import strategies as st


def test_a_posterior_is_the_softmax_and_survives_extremes():
    similarities = np.array([[0.9, 0.5, -0.2], [0.0, 0.0, 0.0]])
    expected = np.exp(similarities / 0.1) / np.exp(similarities / 0.1).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(log_posterior(similarities, 0.1)), expected, rtol=1e-9)
    assert np.isfinite(log_posterior(similarities, 1e-6)).all()


def test_agreement_is_a_number_at_the_least_temperature():
    fm, student = np.array([[1.0, -1.0]], np.float32), np.array([[-1.0, 1.0]], np.float32)
    assert 0 <= graded_agreement(fm, student, MIN_TEMPERATURE, Confidence(MIN_TEMPERATURE))[0] <= 2


@pytest.mark.parametrize("true", [0.02, 0.05, 0.3])
def test_the_temperature_that_made_the_posteriors_is_found(true: float):
    similarities = np.random.default_rng(0).uniform(-0.5, 1, (200, 8))
    assert fit_temperature(similarities, np.exp(log_posterior(similarities, true)), np.ones(200)) == pytest.approx(
        true, rel=0.06
    )


def test_a_student_that_knows_less_than_it_says_gets_a_higher_temperature():
    rng = np.random.default_rng(1)
    fm = rng.uniform(-0.5, 1, (400, 8))
    posteriors = np.exp(log_posterior(fm, 0.05))
    fits = [
        fit_temperature(fm + noise * rng.standard_normal(fm.shape), posteriors, np.ones(400))
        for noise in (0.0, 0.1, 0.3)
    ]
    assert fits[0] < fits[1] < fits[2]


@given(st.integers(0, 10_000), st.integers(2, 9))
def test_grades_are_one_where_both_say_the_same_and_bounded_elsewhere(seed: int, labels: int):
    rng = np.random.default_rng(seed)
    fm, student = rng.uniform(-1, 1, (20, labels)), rng.uniform(-1, 1, (20, labels))
    grades = graded_agreement(fm, student, 0.05, Confidence(0.1))
    same = fm.argmax(axis=1) == student.argmax(axis=1)
    assert (grades[same] == 1.0).all() and ((grades >= 0) & (grades <= 2)).all()


def test_a_disagreement_costs_less_the_less_sure_the_fm_is():
    student = np.array([[0.1, 0.5]])
    sure, torn = np.array([[0.9, 0.1]]), np.array([[0.52, 0.5]])
    costs = [1 - graded_agreement(fm, student, 0.05, Confidence(0.05))[0] for fm in (sure, torn)]
    assert costs[0] > 0.9 and costs[1] < 0  # a sure student against a torn FM is trusted


def test_labels_that_neither_believes_in_change_nothing():
    """What a device knows of the FM is its best labels: the others hardly count."""
    rng = np.random.default_rng(2)
    fm, student = rng.uniform(0.3, 0.9, (50, 5)), rng.uniform(0.3, 0.9, (50, 5))
    more = np.full((50, 40), -0.3)
    whole = graded_agreement(np.hstack([fm, more]), np.hstack([student, more]), 0.05, Confidence(0.07))
    np.testing.assert_allclose(whole, graded_agreement(fm, student, 0.05, Confidence(0.07)), atol=1e-4)


def _world(n: int, fm_noise: float, student_noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What two models with errors of their own make of the same truth, (n, 10) similarities each."""
    rng = np.random.default_rng(seed)
    clean = 0.3 * np.eye(10)[rng.integers(10, size=n)]
    return clean + fm_noise * rng.normal(size=clean.shape), clean + student_noise * rng.normal(size=clean.shape)


def test_a_better_student_gets_a_larger_share_and_few_samples_leave_it_near_the_prior():
    shares = []
    for student_noise in (0.2, 0.15, 0.1):
        fm, student = _world(4000, 0.15, student_noise, 0)
        posterior_temperature = 0.15**2 / 0.3  # Bayes: at it the FM's certainty is its accuracy
        shares.append(Confidence.fit(student, fm, np.ones(4000), posterior_temperature).share)
        few = Confidence.fit(student[:10], fm[:10], np.ones(10), posterior_temperature).share
        assert abs(few - PRIOR_SHARE) < 0.2
    assert shares[0] < shares[1] < shares[2] <= 1.0


def test_with_another_pool_nobody_is_trusted_more_than_before():
    assert Confidence(0.05, 0.6).with_other_pool() == Confidence(0.05, PRIOR_SHARE)
    assert Confidence(0.05, 0.2).with_other_pool() == Confidence(0.05, 0.2)
