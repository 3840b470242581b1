"""What a student learns from the FM: the head from cached features, then the tail of the backbone. Arrays in, arrays out.

The loss is the paper's pair, MSE and contrastive: `lambda_mse * ||s - v||^2 + CE(softmax(s t / tau), softmax(v t / tau))`,
with s the student's embedding, v the FM's, t the pool, and tau above the FM's temperature: where the FM is torn between
labels, so is the target. The MSE part of a linear head has a closed form, and with version 0 as its prior it is where every
student starts. Training the tail goes on from there by gradient on the whole loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..models.backbones import Tail
from ..models.confidence import Confidence, graded_agreement, log_posterior
from ..models.pool import LabelPool
from ..models.student_graph import Head
from ..models.versions import quantise_fp16
from .config import CustomizationConfig

INTERCEPT_SHARE = 0.1
"""The prior holds the intercept less tightly than the weights: it has one parameter a dimension to learn, not F."""

_PERIOD = 25
_BATCH = 64
_WARM_UP_STEPS = 20
_HEAD_RATE = 0.1
"""Learning rate of the head against the tail's: it starts at the solution for the features of before."""


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


# ---- the tail


def embed_with(tail: Tail, head: Head, activations: np.ndarray) -> np.ndarray:
    """(N, C, h, w) trunk activations -> (N, D) float32, L2-normalised."""
    with torch.no_grad():
        parts = [
            tail(torch.from_numpy(activations[i : i + _BATCH].astype(np.float32))).numpy()
            for i in range(0, len(activations), _BATCH)
        ]
    return head(np.concatenate(parts))


def train_tail(
    views: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    pool: LabelPool,
    tail: Tail,
    head: Head,
    config: CustomizationConfig,
) -> tuple[Tail, Head]:
    """Trains tail and head together; deterministic for `config.seed`.

    Args:
        views: (N, V, C, h, w) trunk activations of V views of each sample; each epoch takes one view of each at random,
            and all views of a sample have the same target: what the FM said of the sample itself.
        targets: (N, D) float32, FM embeddings.
        weights: (N,) of the samples, of any scale.
        tail: where it starts; changed in place.
        head: where it starts, fitted to that tail's features.

    Returns:
        Both, rounded to fp16 as they will be stored.
    """
    generator = torch.Generator().manual_seed(config.seed)
    tail = tail.to(memory_format=torch.channels_last)  # a fifth faster on one thread
    count, choices = views.shape[:2]
    fm = torch.from_numpy(targets)  # (N, D)
    shares = torch.from_numpy((weights / weights.mean()).astype(np.float32))  # (N,)
    texts = torch.from_numpy(pool.embeddings)  # (K, D)
    tau = config.softness * pool.temperature
    beliefs = torch.softmax(fm @ texts.T / tau, dim=1)  # (N, K)
    weight = torch.from_numpy(head.weight.copy()).requires_grad_()
    bias = torch.from_numpy(head.bias.copy()).requires_grad_()
    optimizer = torch.optim.AdamW(
        [
            {"params": list(tail.parameters()), "lr": config.learning_rate},
            {"params": [weight, bias], "lr": config.learning_rate * _HEAD_RATE},
        ],
        weight_decay=0.0,
    )
    steps = config.epochs * -(-count // _BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARM_UP_STEPS) * 0.5 * (1 + np.cos(np.pi * step / steps))
    )
    for _ in range(config.epochs):
        for batch in torch.randperm(count, generator=generator).split(_BATCH):
            view = torch.randint(choices, (len(batch),), generator=generator).numpy()
            activations = torch.from_numpy(views[batch.numpy(), view].astype(np.float32))  # (b, C, h, w)
            embeddings = torch.nn.functional.normalize(tail(activations) @ weight + bias, dim=1)  # (b, D)
            mse = (embeddings - fm[batch]).square().sum(dim=1)  # (b,)
            contrastive = torch.nn.functional.cross_entropy(
                embeddings @ texts.T / tau, beliefs[batch], reduction="none"
            )
            optimizer.zero_grad()
            (shares[batch] * (config.lambda_mse * mse + contrastive)).mean().backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        for parameter in tail.parameters():
            parameter.copy_(torch.from_numpy(quantise_fp16(parameter.numpy())))
    return tail.to(memory_format=torch.contiguous_format), Head(weight.detach().numpy(), bias.detach().numpy())
