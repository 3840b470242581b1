"""The learner on small problems whose answers are known another way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from edgefm.cloud.config import CustomizationConfig
from edgefm.cloud.learning import (
    INTERCEPT_SHARE,
    Judgement,
    fit_closed_form,
    held_out_mask,
    judge,
    lowest_risk,
    passes,
    sample_weights,
)
from edgefm.cloud.tail_training import embed_with, train_tail
from edgefm.models.backbones import Tail
from edgefm.models.confidence import Confidence
from edgefm.models.head import Head
from edgefm.models.pool import LabelPool, normalise
from edgefm.models.student_graph import tail_to_bytes
from edgefm.models.students import PROFILES

FEATURES, DIM, LABELS = 24, 10, 6
BACKBONE = PROFILES["lite0-64"].backbone


def random_head(rng: np.random.Generator, scale: float = 1.0) -> Head:
    return Head(scale * rng.standard_normal((FEATURES, DIM)), scale * rng.standard_normal(DIM))


def random_samples(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    features = (rng.standard_normal((count, FEATURES)) + 0.5).astype(np.float32)  # not centred, like pooled ReLUs
    return features, normalise(rng.standard_normal((count, DIM)))


def world(seed: int, count: int, noise: float) -> tuple[np.ndarray, np.ndarray, LabelPool]:
    """FM embeddings near one of the labels each; the student's features are a linear map of them, plus noise."""
    rng = np.random.default_rng(seed)
    texts = normalise(rng.standard_normal((LABELS, DIM)))
    pool = LabelPool(tuple(f"label {i}" for i in range(LABELS)), texts, "fm")
    targets = normalise(texts[rng.integers(0, LABELS, count)] + 0.25 * rng.standard_normal((count, DIM)))
    mixing = rng.standard_normal((DIM, FEATURES))
    features = targets @ mixing + noise * rng.standard_normal((count, FEATURES)) + 0.3
    return features.astype(np.float32), targets, pool


# ---- closed form


@pytest.mark.parametrize("prior_samples", [0.5, 40.0, 1500.0])
def test_the_closed_form_is_the_least_squares_solution_with_its_prior(prior_samples: float):
    """Against numpy's least squares on the augmented system: a row a sample, a row a weight, one for the intercept."""
    rng = np.random.default_rng(11)
    (inputs, targets), prior = random_samples(rng, 60), random_head(rng)
    features = inputs.astype(np.float64)
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
    right = np.vstack([targets, np.sqrt(strength) * weight0, np.sqrt(intercept_strength) * intercept0])
    solution = np.linalg.lstsq(rows, right, rcond=None)[0]
    expected = Head(solution[:-1], solution[-1] - centre @ solution[:-1])

    fitted = fit_closed_form(inputs, targets, np.full(60, 3.0), prior, prior_samples)
    # Both are rounded to fp16, so they may differ by one unit of it.
    np.testing.assert_allclose(fitted.weight, expected.weight, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(fitted.bias, expected.bias, rtol=1e-3, atol=1e-6)
    assert np.abs(fitted.weight - weight0).max() > (0.2 if prior_samples < 1 else 1e-3)  # it did move


def test_where_the_samples_say_nothing_new_the_prior_stays():
    """Targets on the prior's own outputs: there is no residual, and only the free scale changes."""
    rng = np.random.default_rng(12)
    prior = random_head(rng, 0.01)
    features, _ = random_samples(rng, 50)
    raw = features @ prior.weight + prior.bias
    fitted = fit_closed_form(features, raw / np.linalg.norm(raw, axis=1).mean(), np.ones(50), prior, 10.0)
    fresh, _ = random_samples(rng, 40)
    np.testing.assert_allclose(fitted(fresh), prior(fresh), atol=2e-3)


def test_few_samples_leave_a_strong_prior_in_charge_and_many_overrule_it():
    features, targets, pool = world(13, 400, noise=0.1)
    prior = random_head(np.random.default_rng(13))
    fresh, answers = features[300:], targets[300:]
    few = fit_closed_form(features[:5], targets[:5], np.ones(5), prior, 1e9)
    np.testing.assert_allclose(few(fresh), prior(fresh), atol=2e-3)
    many = fit_closed_form(features[:300], targets[:300], np.ones(300), prior, 1.0)
    before, after = (judge(head(fresh), answers, np.ones(100), pool) for head in (prior, many))
    assert before.agreement < 0.5 < 0.95 < after.agreement


def test_equal_features_teach_the_intercept_alone():
    """A camera that sees the same image only: there is nothing to tell samples apart by, and no division by zero."""
    rng = np.random.default_rng(15)
    features, targets = np.ones((30, FEATURES), np.float32), normalise(rng.standard_normal((30, DIM)))
    fitted = fit_closed_form(features, targets, np.ones(30), random_head(rng), 10.0)
    assert np.isfinite(fitted.weight).all() and np.isfinite(fitted.bias).all()


def test_the_scale_of_the_prior_is_free():
    rng = np.random.default_rng(14)
    (features, targets), prior = random_samples(rng, 60), random_head(rng)
    doubled = Head(prior.weight * 2, prior.bias * 2)
    one, two = (fit_closed_form(features, targets, np.ones(60), head, 100.0) for head in (prior, doubled))
    np.testing.assert_allclose(one.weight, two.weight, rtol=1e-3, atol=1e-6)


def test_a_sample_of_weight_two_is_a_sample_seen_twice():
    rng = np.random.default_rng(16)
    (features, targets), prior = random_samples(rng, 60), random_head(rng)
    times = rng.integers(1, 4, 60)
    weighted = fit_closed_form(features, targets, times.astype(float), prior, 60 / times.sum() * 100.0)
    repeated = fit_closed_form(
        *(np.repeat(part, times, axis=0) for part in (features, targets)), np.ones(times.sum()), prior, 100.0
    )
    np.testing.assert_allclose(weighted.weight, repeated.weight, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(weighted.bias, repeated.bias, rtol=1e-3, atol=1e-6)


# ---- the tail


@pytest.fixture(scope="module")
def small() -> tuple[np.ndarray, np.ndarray, LabelPool, Head]:
    """Two views each of 96 samples at a 64-pixel student's tail, whose targets a changed tail would reach."""
    rng = np.random.default_rng(21)
    views = rng.random((96, 2, 112, 4, 4), np.float32).astype(np.float16) * rng.random((96, 1, 112, 1, 1))
    views = views.astype(np.float16)
    tail = Tail(BACKBONE)
    random = Head(rng.standard_normal((1280, DIM)), np.zeros(DIM))
    targets = embed_with(tail, random, views[:, 0])
    pool = LabelPool(tuple(f"label {i}" for i in range(LABELS)), targets[:LABELS], "fm", temperature=0.05)
    features = np.ones((96, 1280), np.float32)
    return views, targets, pool, fit_closed_form(features, targets, np.ones(96), random, 1.0)


def full_loss(tail: Tail, head: Head, small, config: CustomizationConfig) -> float:
    """`lambda_mse * ||s - v||^2 + CE(softmax(s t / tau), softmax(v t / tau))`, written out in numpy."""
    views, targets, pool, _ = small
    embeddings, tau = embed_with(tail, head, views[:, 0]), config.softness * pool.temperature
    logits, beliefs = embeddings @ pool.embeddings.T / tau, np.exp(targets @ pool.embeddings.T / tau)
    beliefs /= beliefs.sum(axis=1, keepdims=True)
    cross_entropy = np.log(np.exp(logits).sum(axis=1)) - (beliefs * logits).sum(axis=1)
    return float(config.lambda_mse * np.square(embeddings - targets).sum(axis=1).mean() + cross_entropy.mean())


def test_training_the_tail_lowers_the_loss_and_repeats_for_a_seed(small, read_tail):
    views, targets, pool, head = small
    config, before = CustomizationConfig(epochs=3, learning_rate=1e-3), head.to_bytes()

    def train(config: CustomizationConfig) -> tuple[Tail, Head]:
        return train_tail(views, targets, np.ones(96), pool, Tail(BACKBONE), head, config)

    tail, trained = train(config)
    again, other = train(config), train(replace(config, seed=1))
    assert full_loss(tail, trained, small, config) < 0.95 * full_loss(Tail(BACKBONE), head, small, config)
    profile = PROFILES["lite0-64"]
    first, second, third = (tail_to_bytes(profile, made) for made in (tail, again[0], other[0]))
    assert first == second != third and trained.to_bytes() == again[1].to_bytes() != other[1].to_bytes()
    assert head.to_bytes() == before  # the start is not trained in place
    assert not torch.are_deterministic_algorithms_enabled()  # the child process's business, not the function's
    stored = read_tail(profile, first)  # what is judged is what is stored
    assert np.array_equal(embed_with(stored, trained, views[:, 0]), embed_with(tail, trained, views[:, 0]))


def test_the_weights_of_the_two_terms_matter(small):
    views, targets, pool, head = small
    config = CustomizationConfig(epochs=3, learning_rate=1e-3)

    def distance(lambda_mse: float) -> float:
        changed = replace(config, lambda_mse=lambda_mse)
        tail, trained = train_tail(views, targets, np.ones(96), pool, Tail(BACKBONE), head, changed)
        return float(np.square(embed_with(tail, trained, views[:, 0]) - targets).sum(axis=1).mean())

    assert distance(100.0) < 0.95 * distance(0.0)


def test_the_tail_follows_the_samples_of_weight(small):
    """Two halves whose targets are each other's opposite: the heavy half is come closer to."""
    views, targets, pool, head = small
    torn = np.concatenate((targets[:48], -targets[48:]))
    config = CustomizationConfig(epochs=3, learning_rate=1e-3)

    def distances(weights: np.ndarray) -> np.ndarray:
        tail, trained = train_tail(views, torn, weights, pool, Tail(BACKBONE), head, config)
        return np.square(embed_with(tail, trained, views[:, 0]) - torn).sum(axis=1).reshape(2, 48).mean(axis=1)

    first, second = distances(np.repeat([10.0, 1.0], 48)), distances(np.repeat([1.0, 10.0], 48))
    assert first[0] < second[0] - 0.1 and second[1] < first[1] - 0.1


# ---- holding out, weighing and judging


def test_weights_are_inverse_propensities_up_to_the_cap():
    assert sample_weights(np.array([1.0, 0.5, 0.02]), 10.0).tolist() == [1.0, 2.0, 10.0]


def test_a_judgement_counts_a_sample_by_its_weight():
    """As if it stood there that often."""
    rng, pool = np.random.default_rng(32), LabelPool(tuple("abcd"), np.eye(4, dtype=np.float32), "fm", temperature=0.1)
    student, fm = (normalise(rng.uniform(0, 1, (50, 4))) for _ in range(2))
    times = rng.integers(1, 5, 50)
    weighted = judge(student, fm, 7.0 * times, pool)
    repeated = judge(np.repeat(student, times, axis=0), np.repeat(fm, times, axis=0), np.ones(times.sum()), pool)
    assert weighted.agreement == pytest.approx(repeated.agreement)
    assert weighted.quality == pytest.approx(repeated.quality)
    assert weighted.confidence.temperature == repeated.confidence.temperature
    assert weighted.agreement != pytest.approx(judge(student, fm, np.ones(50), pool).agreement)


def test_a_version_that_loses_what_was_sure_does_not_pass():
    """Ten uncertain samples and two audits of weight 10: better on three of those, worse on one of these."""
    weights, margins = np.array([1.0] * 10 + [10.0] * 2), np.linspace(0, 1, 12)

    def judgement(wrong: list[int], weights: np.ndarray) -> Judgement:
        certainty = np.ones(12)
        certainty[wrong] = 0
        return Judgement(margins, certainty == 1, certainty, certainty, Confidence(0.05), weights / weights.mean())

    assert passes(judgement([11], np.ones(12)), judgement([0, 1, 2], np.ones(12)))
    assert not passes(judgement([11], weights), judgement([0, 1, 2], weights))
    assert judgement([11], weights).risk > judgement([0, 1, 2], weights).risk


def test_held_out_samples_stay_held_out_as_others_come():
    numbers, config = np.arange(2000), CustomizationConfig()
    mask = held_out_mask(numbers, config)
    assert mask.dtype == bool and mask.mean() == config.held_out
    assert np.array_equal(mask[:500], held_out_mask(numbers[:500], config))
    order = np.random.default_rng(31).permutation(2000)
    assert np.array_equal(mask[order], held_out_mask(order, config))
    # A larger share only adds: what is held out at 0.2 is held out at 0.4.
    assert not (mask & ~held_out_mask(numbers, replace(config, held_out=0.4))).any()


@pytest.mark.parametrize(("first_at", "share"), [(100, 0.2), (40, 0.2), (2, 0.01), (2, 0.99), (1, 0.5), (1600, 0.1)])
def test_every_run_has_samples_to_learn_from_and_a_stretch_to_judge_by(first_at: int, share: float):
    """Wherever its samples begin: an alarm's evidence may begin anywhere."""
    config = CustomizationConfig(first_at=first_at, held_out=share)
    for start in range(120):
        mask = held_out_mask(np.arange(start, start + max(first_at, 2)), config)
        assert mask.any() and not mask.all()
    mask = held_out_mask(np.arange(10_000), config)
    assert np.count_nonzero(mask[1:] != mask[:-1]) <= 2 * 10_000 / max(min(first_at, 25), 2)  # few borders


def test_the_judge_compares_answers_and_unknown_is_an_answer():
    pool = LabelPool(("x", "y"), np.eye(2, 3, dtype=np.float32), "fm", unknown_floor=0.5, temperature=0.2)
    known_x, known_y, nothing = [1, 0.1, 0], [0.1, 1, 0], [0.1, 0.2, 1]
    also_nothing = [0.2, 0.1, 1]  # unknown too, with another label in front
    torn = [1, 0.9, 0]  # the FM prefers x by little
    hardly = [0.56, 0, 1]  # just below the floor
    pairs = [
        (known_x, known_x, True),
        (known_x, known_y, False),
        (known_x, nothing, False),
        (nothing, known_x, False),
        (nothing, nothing, True),
        (nothing, also_nothing, True),
        (known_y, torn, False),
        (known_x, hardly, False),
    ]
    student, teacher, expected = zip(*pairs, strict=True)
    unit, fm = normalise(np.array(student)), normalise(np.array(teacher))
    judgement = judge(unit, fm, np.ones(8), pool)
    assert judgement.agrees.tolist() == list(expected) and judgement.agreement == 3 / 8
    np.testing.assert_allclose(judgement.margins, np.abs(unit[:, 0] - unit[:, 1]), atol=1e-6)
    assert (judgement.fm_certainty[judgement.agrees] == 1).all() and (judgement.graded[judgement.agrees] == 1).all()
    for row, top, second in (
        (6, fm[6, 0], fm[6, 1]),
        (7, 0.5, fm[7, 0]),
    ):  # "unknown" is a label as similar as the floor
        ratio = np.exp((second - top) / 0.2)
        assert judgement.fm_certainty[row] == pytest.approx(ratio, rel=1e-4) and 0.5 < ratio < 1
    assert judgement.fm_certainty[1] < 0.05 and judgement.graded[1] < judgement.graded[6]
    assert judgement.fm_certainty[2] < judgement.fm_certainty[7]
    assert judgement.quality == pytest.approx(judgement.fm_certainty.mean())


def _judgement(margins: np.ndarray, certainty: list[float]) -> Judgement:
    values = np.array(certainty)
    return Judgement(margins, values == 1, values, values, Confidence(0.05), np.ones(len(values)))


def test_risk_is_the_area_under_the_risk_coverage_curve():
    margins = np.array([0.1, 0.4, 0.2, 0.3])
    # From the surest on it lacks 0, 1, 0, 1 -> risks 0, 1/2, 1/3, 2/4.
    assert _judgement(margins, [0, 1, 1, 0]).risk == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    sure_and_wrong, unsure_and_wrong = _judgement(margins, [1, 0, 1, 1]), _judgement(margins, [0, 1, 1, 1])
    assert unsure_and_wrong.risk < sure_and_wrong.risk
    assert unsure_and_wrong.agreement == sure_and_wrong.agreement == unsure_and_wrong.quality == 0.75
    assert _judgement(margins, [1, 0.9, 1, 1]).risk < sure_and_wrong.risk  # the FM is torn there: it costs little


def test_the_lowest_risk_is_chosen_and_the_gate_asks_for_quality():
    margins = np.array([0.1, 0.4, 0.2, 0.3])
    sure_and_wrong, unsure_and_wrong = _judgement(margins, [1, 0, 1, 1]), _judgement(margins, [0, 1, 1, 1])
    better, worse = _judgement(margins, [0.1, 1, 1, 1]), _judgement(margins, [0, 1, 1, 0.9])
    assert lowest_risk([sure_and_wrong, unsure_and_wrong]) == 1
    assert passes(unsure_and_wrong, sure_and_wrong)  # not below: equal quality passes
    assert not passes(unsure_and_wrong, better)
    assert not passes(worse, unsure_and_wrong) and passes(better, unsure_and_wrong)


# ---- together


@pytest.mark.parametrize("seed", [41, 42, 43])
def test_learning_raises_agreement_on_samples_it_has_not_seen(seed: int):
    features, targets, pool = world(seed, 800, noise=0.5)
    rng = np.random.default_rng(seed)
    # A useful start that is not perfect, like version 0: the best linear map, disturbed.
    best = fit_closed_form(features, targets, np.ones(800), random_head(rng), 1e-3)
    spread = 2.0 * best.weight.std()
    version0 = Head(best.weight + spread * rng.standard_normal(best.weight.shape), best.bias)
    held = np.arange(800) % 5 == 0
    before = judge(version0(features[held]), targets[held], np.ones(160), pool)
    learned = fit_closed_form(features[~held], targets[~held], np.ones(640), version0, 50.0)
    after = judge(learned(features[held]), targets[held], np.ones(160), pool)
    assert before.agreement < 0.9
    assert after.agreement > before.agreement + 0.05
    assert after.risk < before.risk and after.quality > before.quality
