"""The learner on small problems whose answers are known another way."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from edgefm.cloud.config import CustomizationConfig
from edgefm.cloud.learning import (
    INTERCEPT_SHARE,
    Judgement,
    Samples,
    fit_closed_form,
    held_out_mask,
    judge,
    learn_head,
    refine_contrastive,
)
from edgefm.models.pool import LabelPool, normalise
from edgefm.models.student_graph import Head

FEATURES, DIM, LABELS = 24, 10, 6


def random_head(rng: np.random.Generator, scale: float = 1.0) -> Head:
    return Head(scale * rng.standard_normal((FEATURES, DIM)), scale * rng.standard_normal(DIM))


def random_samples(rng: np.random.Generator, count: int) -> Samples:
    features = (rng.standard_normal((count, FEATURES)) + 0.5).astype(np.float32)  # not centred, like pooled ReLUs
    return Samples(features, normalise(rng.standard_normal((count, DIM))), np.ones(count))


def world(seed: int, count: int, noise: float) -> tuple[Samples, LabelPool]:
    """FM embeddings near one of the labels each; the student's features are a linear map of them, plus noise."""
    rng = np.random.default_rng(seed)
    texts = normalise(rng.standard_normal((LABELS, DIM)))
    pool = LabelPool(tuple(f"label {i}" for i in range(LABELS)), texts, "fm")
    targets = normalise(texts[rng.integers(0, LABELS, count)] + 0.25 * rng.standard_normal((count, DIM)))
    mixing = rng.standard_normal((DIM, FEATURES))
    features = targets @ mixing + noise * rng.standard_normal((count, FEATURES)) + 0.3
    return Samples(features.astype(np.float32), targets, np.ones(count)), pool


# ---- closed form


@pytest.mark.parametrize("prior_samples", [0.5, 40.0, 1500.0])
def test_the_closed_form_is_the_least_squares_solution_with_its_prior(prior_samples: float):
    """Against numpy's least squares on the augmented system: a row a sample, a row a weight, one for the intercept."""
    rng = np.random.default_rng(11)
    samples, prior = random_samples(rng, 60), random_head(rng)
    features = samples.features.astype(np.float64)
    centre = features.mean(axis=0)
    scale = np.linalg.norm(features @ prior.weight + prior.bias, axis=1).mean()
    weight0, intercept0 = prior.weight / scale, (centre @ prior.weight + prior.bias) / scale
    strength = prior_samples * (features - centre).var(axis=0).mean()
    intercept_strength = prior_samples * INTERCEPT_SHARE
    rows = np.vstack(
        [
            np.hstack([features - centre, np.ones((60, 1))]),
            np.hstack([np.sqrt(strength) * np.eye(FEATURES), np.zeros((FEATURES, 1))]),
            np.hstack([np.zeros((1, FEATURES)), [[np.sqrt(intercept_strength)]]]),
        ]
    )
    right = np.vstack([samples.targets, np.sqrt(strength) * weight0, np.sqrt(intercept_strength) * intercept0])
    solution = np.linalg.lstsq(rows, right, rcond=None)[0]
    expected = Head(solution[:-1], solution[-1] - centre @ solution[:-1])

    fitted = fit_closed_form(samples, prior, prior_samples)
    # Both are rounded to fp16, so they may differ by one unit of it.
    np.testing.assert_allclose(fitted.weight, expected.weight, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(fitted.bias, expected.bias, rtol=1e-3, atol=1e-6)
    assert np.abs(fitted.weight - weight0).max() > (0.2 if prior_samples < 1 else 1e-3)  # it did move


def test_where_the_samples_say_nothing_new_the_prior_stays():
    """Targets on the prior's own outputs: there is no residual, and only the free scale changes."""
    rng = np.random.default_rng(12)
    prior = random_head(rng, 0.01)
    samples = random_samples(rng, 50)
    raw = samples.features @ prior.weight + prior.bias
    samples = replace(samples, targets=raw / np.linalg.norm(raw, axis=1).mean())
    fitted = fit_closed_form(samples, prior, 10.0)
    fresh = random_samples(rng, 40).features
    np.testing.assert_allclose(fitted(fresh), prior(fresh), atol=2e-3)


def test_few_samples_leave_a_strong_prior_in_charge_and_many_overrule_it():
    samples, pool = world(13, 400, noise=0.1)
    prior = random_head(np.random.default_rng(13))
    fresh = samples.features[300:]
    few = fit_closed_form(samples.where(np.arange(400) < 5), prior, 1e9)
    np.testing.assert_allclose(few(fresh), prior(fresh), atol=2e-3)
    many = fit_closed_form(samples.where(np.arange(400) < 300), prior, 1.0)
    held_out = samples.where(np.arange(400) >= 300)
    assert judge(prior, held_out, pool).agreement < 0.5 < 0.95 < judge(many, held_out, pool).agreement


def test_the_scale_of_the_prior_is_free():
    rng = np.random.default_rng(14)
    samples, prior = random_samples(rng, 60), random_head(rng)
    doubled = Head(prior.weight * 2, prior.bias * 2)
    one, two = (fit_closed_form(samples, head, 100.0) for head in (prior, doubled))
    np.testing.assert_allclose(one.weight, two.weight, rtol=1e-3, atol=1e-6)


# ---- contrastive refinement


def full_loss(head: Head, samples: Samples, pool: LabelPool, config: CustomizationConfig) -> float:
    """`lambda_mse * ||s - v||^2 + CE(cos(s, t) / tau, pseudo-label)`, written out in numpy."""
    embeddings = head(samples.features)
    logits = embeddings @ pool.embeddings.T / config.tau
    logits -= logits.max(axis=1, keepdims=True)
    labels = (samples.targets @ pool.embeddings.T).argmax(axis=1)
    cross_entropy = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    return float(config.lambda_mse * np.square(embeddings - samples.targets).sum(axis=1).mean() + cross_entropy.mean())


def test_refinement_lowers_the_loss_and_repeats_for_a_seed():
    samples, pool = world(21, 300, noise=0.4)
    config = CustomizationConfig(epochs=6, learning_rate=1e-3)
    start = fit_closed_form(samples, random_head(np.random.default_rng(21)), 300.0)
    weight_before = start.weight.copy()
    refined = refine_contrastive(samples, start, pool, config)
    again = refine_contrastive(samples, start, pool, config)
    other = refine_contrastive(samples, start, pool, replace(config, seed=1))
    assert full_loss(refined, samples, pool, config) < 0.95 * full_loss(start, samples, pool, config)
    assert refined.to_bytes() == again.to_bytes() != other.to_bytes()
    assert np.array_equal(start.weight, weight_before)  # the start is not trained in place
    assert not torch.are_deterministic_algorithms_enabled()  # the child process's business, not the function's


def test_the_weights_of_the_two_terms_matter():
    samples, pool = world(22, 300, noise=0.4)
    start = fit_closed_form(samples, random_head(np.random.default_rng(22)), 300.0)
    config = CustomizationConfig(epochs=20, learning_rate=3e-3)
    contrastive = refine_contrastive(samples, start, pool, replace(config, lambda_mse=0.0))
    both = refine_contrastive(samples, start, pool, replace(config, lambda_mse=100.0))

    def distance(head: Head) -> float:
        return float(np.square(head(samples.features) - samples.targets).sum(axis=1).mean())

    assert distance(both) < 0.9 * distance(contrastive)


# ---- holding out and judging


def test_held_out_samples_stay_held_out_as_others_come():
    digests = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(2000)]
    mask = held_out_mask(digests, 0.2)
    assert mask.dtype == bool and abs(mask.mean() - 0.2) < 0.03
    assert np.array_equal(mask[:500], held_out_mask(digests[:500], 0.2))
    order = np.random.default_rng(31).permutation(2000)
    assert np.array_equal(mask[order], held_out_mask([digests[i] for i in order], 0.2))
    assert not held_out_mask(digests, 0.0).any() and held_out_mask(digests, 1.0).all()
    # A larger share only adds: what is held out at 0.2 is held out at 0.4.
    assert not (mask & ~held_out_mask(digests, 0.4)).any()


def test_the_judge_compares_answers_and_unknown_is_an_answer():
    pool = LabelPool(("x", "y"), np.eye(2, 3, dtype=np.float32), "fm", unknown_floor=0.5)
    identity = Head(np.eye(3), np.zeros(3))
    known_x, known_y, nothing = [1, 0.1, 0], [0.1, 1, 0], [0.1, 0.2, 1]
    also_nothing = [0.2, 0.1, 1]  # unknown too, with another label in front
    pairs = [
        (known_x, known_x, True),
        (known_x, known_y, False),
        (known_x, nothing, False),
        (nothing, known_x, False),
        (nothing, nothing, True),
        (nothing, also_nothing, True),
    ]
    student, teacher, expected = zip(*pairs, strict=True)
    samples = Samples(np.array(student, np.float32), normalise(np.array(teacher)), np.ones(len(pairs)))
    judgement = judge(identity, samples, pool)
    assert judgement.agrees.tolist() == list(expected) and judgement.agreement == 0.5
    unit = normalise(np.array(student))
    np.testing.assert_allclose(judgement.margins, np.abs(unit[:, 0] - unit[:, 1]), atol=1e-6)


def test_risk_is_the_area_under_the_risk_coverage_curve():
    margins = np.array([0.1, 0.4, 0.2, 0.3])
    # From the surest on: right, wrong, right, wrong -> risks 0, 1/2, 1/3, 2/4.
    agrees = np.array([False, True, True, False])
    assert Judgement(margins, agrees).risk == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    sure_and_wrong = Judgement(margins, np.array([True, False, True, True]))
    unsure_and_wrong = Judgement(margins, np.array([False, True, True, True]))
    assert unsure_and_wrong.risk < sure_and_wrong.risk
    assert unsure_and_wrong.agreement == sure_and_wrong.agreement == 0.75


# ---- together


@pytest.mark.parametrize("seed", [41, 42, 43])
def test_learning_raises_agreement_on_samples_it_has_not_seen(seed: int):
    samples, pool = world(seed, 800, noise=0.5)
    rng = np.random.default_rng(seed)
    # A useful start that is not perfect, like version 0: the best linear map, disturbed.
    best = fit_closed_form(samples, random_head(rng), 1e-3)
    spread = 2.0 * best.weight.std()
    version0 = Head(best.weight + spread * rng.standard_normal(best.weight.shape), best.bias)
    mask = np.arange(800) % 5 == 0
    train, held_out = samples.where(~mask), samples.where(mask)
    before = judge(version0, held_out, pool)
    config = CustomizationConfig(prior_samples=50.0, epochs=3)
    learned = learn_head(train, held_out, version0, pool, config)
    assert before.agreement < 0.9
    assert learned.judgement.agreement > before.agreement + 0.05
    assert learned.judgement.risk < before.risk
    judged = judge(learned.head, held_out, pool)
    assert np.array_equal(judged.margins, learned.judgement.margins)
    assert np.array_equal(judged.agrees, learned.judgement.agrees)


def test_the_candidate_with_the_lower_held_out_risk_wins():
    samples, pool = world(44, 400, noise=0.6)
    mask = np.arange(400) % 4 == 0
    train, held_out = samples.where(~mask), samples.where(mask)
    version0 = random_head(np.random.default_rng(44))
    config = CustomizationConfig(prior_samples=50.0, epochs=4, learning_rate=1e-3)
    closed = fit_closed_form(train, version0, config.prior_samples)
    refined = refine_contrastive(train, closed, pool, config)
    risks = {"mse": judge(closed, held_out, pool).risk, "mse+contrastive": judge(refined, held_out, pool).risk}
    learned = learn_head(train, held_out, version0, pool, config)
    assert risks["mse"] != risks["mse+contrastive"]
    assert learned.method == min(risks, key=lambda method: risks[method])
    assert learned.judgement.risk == min(risks.values())
    # A refinement that ruins the head is not taken, and none is tried with 0 epochs.
    ruinous = learn_head(train, held_out, version0, pool, replace(config, learning_rate=10.0))
    assert ruinous.method == "mse" and ruinous.head.to_bytes() == closed.to_bytes()
    assert learn_head(train, held_out, version0, pool, replace(config, epochs=0)).method == "mse"
