"""What a student learns from the FM: which samples count, the head from cached features, and the gate. Arrays in, arrays out.

The loss is the paper's pair, MSE and contrastive: `lambda_mse * ||s - v||^2 + CE(softmax(s t / tau), softmax(v t / tau))`,
with s the student's embedding, v the FM's, t the pool, and tau above the FM's temperature: where the FM is torn between
labels, so is the target. The MSE part of a linear head has a closed form, and with version 0 as its prior it is where every
student starts. `edgefm.cloud.tail_training` goes on from there by gradient on the whole loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..models.confidence import Confidence, graded_agreement, log_posterior
from ..models.head import Head
from ..models.pool import LabelPool
from .config import CustomizationConfig

INTERCEPT_SHARE = 0.1
"""The prior holds the intercept less tightly than the weights: it has one parameter a dimension to learn, not F."""

_PERIOD = 25


def held_out_mask(numbers: np.ndarray, config: CustomizationConfig) -> np.ndarray:
    """(N,) bool, by the numbers of the samples in order of arrival: a sample held out once is held out of every version.

    A camera's frames resemble those just before and after them, so what is held out is stretches: of every 25 samples
    (`first_at`, where that is less) the last ones. Longer ones would show fewer scenes to the gate of a young student.
    """
    period = max(min(config.first_at, _PERIOD), 2)
    stretch = min(max(round(config.held_out * period), 1), period - 1)
    return numbers % period >= period - stretch


def newest_and_others(rows: np.ndarray, received_at: np.ndarray, config: CustomizationConfig) -> np.ndarray:
    """At most `tail_samples` of the rows, ascending: half of them the newest, the others drawn from the rest."""
    if len(rows) <= config.tail_samples:
        return rows
    by_age = rows[np.argsort(-received_at, kind="stable")]
    newest, rest = np.split(by_age, [config.tail_samples // 2])
    others = np.random.default_rng(config.seed).permutation(rest)[: config.tail_samples - len(newest)]
    return np.sort(np.concatenate((newest, others)))


# ---- weighing


def sample_weights(propensities: np.ndarray, cap: float) -> np.ndarray:
    """(N,): the inverse of the probability with which each was sent, at most `cap`.

    What devices send is mostly what their student found uncertain; without weights a version may lose what it was sure of
    and nobody would notice. The cap trades that bias for variance: audits are few, and uncapped, a handful would decide.
    """
    return np.minimum(1.0 / propensities, cap)


# ---- judging


@dataclass(frozen=True)
class Judgement:
    """A student on N held-out samples, against the FM.

    Attributes:
        margins: (N,) of the student's similarities.
        agrees: (N,) bool; both "unknown" counts as agreeing.
        graded: (N,) graded agreement, see `edgefm.models.confidence`.
        fm_certainty: (N,) probability of the student's answer under the FM's posterior, over that of the FM's answer.
        confidence: of the student, fitted here.
        weights: (N,) of the samples, of mean 1, see `sample_weights`.
    """

    margins: np.ndarray
    agrees: np.ndarray
    graded: np.ndarray
    fm_certainty: np.ndarray
    confidence: Confidence
    weights: np.ndarray

    @property
    def agreement(self) -> float:
        return float((self.weights * self.agrees).mean())

    @property
    def quality(self) -> float:
        """Mean `fm_certainty`, what the gate compares: agreement, but a disagreement costs little where the FM is torn.
        It varies less from sample to sample than agreement does, and few samples are held out."""
        return float((self.weights * self.fm_certainty).mean())

    @property
    def risk(self) -> float:
        """Area under the risk-coverage curve: the mean, over all thresholds, of what the samples above the threshold lack
        in quality. Lower lets more be answered on the edge at the same accuracy."""
        order = np.argsort(-self.margins, kind="stable")
        weights, lack = self.weights[order], 1.0 - self.fm_certainty[order]
        return float((weights * np.cumsum(weights * lack) / np.cumsum(weights)).mean())


def judge(embeddings: np.ndarray, targets: np.ndarray, weights: np.ndarray, pool: LabelPool) -> Judgement:
    """Sets (N, D) student embeddings against the FM's; (N,) weights of any scale."""
    weights = weights / weights.mean()
    mine, fm = (pool.with_unknown(vectors @ pool.embeddings.T) for vectors in (embeddings, targets))  # (N, K + 1)
    chosen, right = mine.argmax(axis=1), fm.argmax(axis=1)
    posterior = np.exp(log_posterior(fm, pool.temperature))
    confidence = Confidence.fit(mine, fm, weights, pool.temperature)
    rows = np.arange(len(mine))
    certainty = posterior[rows, chosen] / posterior[rows, right]
    graded = graded_agreement(fm, mine, pool.temperature, confidence)
    margins = pool.recognise(embeddings, top_k=1).margins
    return Judgement(margins, chosen == right, graded, certainty, confidence, weights)


def lowest_risk(candidates: Sequence[Judgement]) -> int:
    """Which of the candidates goes before the gate."""
    return min(range(len(candidates)), key=lambda index: candidates[index].risk)


def passes(candidate: Judgement, running: Judgement) -> bool:
    """Whether the gate lets it take the place of what runs."""
    return candidate.quality >= running.quality


# ---- the head


def fit_closed_form(
    features: np.ndarray, targets: np.ndarray, weights: np.ndarray, prior: Head, prior_samples: float
) -> Head:
    """The head that minimises `sum w ||x W + b - v||^2 + strength * ||[W; b] - prior||^2`.

    Args:
        features: (N, F) float32, of the student's backbone.
        targets: (N, D) float32, FM embeddings, L2-normalised.
        weights: (N,) of the samples, of any scale.
        prior: the head to fall back to where the samples say nothing; rescaled to outputs of unit length, since v has
            unit length and a version's scale is free.
        prior_samples: strength of the prior, in samples of average feature energy.
    """
    features, weights = features.astype(np.float64), weights / weights.mean()  # (N, F), (N,)
    centre = weights @ features / len(features)
    raw = features @ prior.weight + prior.bias  # (N, D)
    scale = (weights * np.linalg.norm(raw, axis=1)).mean()
    weight = prior.weight.astype(np.float64) / scale  # (F, D)
    bias = (centre @ prior.weight + prior.bias) / scale  # at the centre
    centred = features - centre
    weighted = centred * weights[:, None]
    strength = prior_samples * (weighted * centred).mean()
    residual = targets - (raw / scale)  # (N, D)
    gram = weighted.T @ centred
    gram[np.diag_indices_from(gram)] += max(strength, np.finfo(np.float64).tiny)  # equal features: nothing to learn
    weight += np.linalg.solve(gram, weighted.T @ residual)
    bias += weights @ residual / (len(features) + prior_samples * INTERCEPT_SHARE)
    return Head(weight, bias - centre @ weight)
