"""What a student learns from the FM: the head, from cached backbone features. Pure functions of arrays.

The loss is the paper's pair, MSE and contrastive: `lambda_mse * ||s - v||^2 + CE(cos(s, t) / tau, pseudo-label)`, with
s the student's embedding, v the FM's and t the pool. The MSE part of a linear head has a closed form, and with version 0
as its prior it is what makes students better here (docs: customization). The contrastive part then moves on from there
by gradient; it may raise agreement but costs calibration, so the held-out samples decide whether it stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..models.pool import LabelPool
from ..models.student_graph import Head
from .config import CustomizationConfig

INTERCEPT_SHARE = 0.1
"""The prior holds the intercept less tightly than the weights: it has one parameter a dimension to learn, not F."""


@dataclass(frozen=True)
class Samples:
    """N samples as the learner sees them: no image, no ground truth."""

    features: np.ndarray  # (N, F) float32, student backbone
    targets: np.ndarray  # (N, D) float32, FM embeddings, L2-normalised
    propensities: np.ndarray  # (N,)

    def __len__(self) -> int:
        return len(self.features)

    def where(self, mask: np.ndarray) -> Samples:
        return Samples(self.features[mask], self.targets[mask], self.propensities[mask])


@dataclass(frozen=True)
class Judgement:
    """A head on held-out samples, against the FM."""

    margins: np.ndarray  # (N,)
    agrees: np.ndarray  # (N,) bool

    @property
    def agreement(self) -> float:
        return float(self.agrees.mean())

    @property
    def risk(self) -> float:
        """Area under the risk-coverage curve: the mean, over all thresholds, of the disagreement among the samples
        that would be answered on the edge. Lower lets more be answered there at the same accuracy."""
        wrong = ~self.agrees[np.argsort(-self.margins, kind="stable")]
        return float((np.cumsum(wrong) / np.arange(1, len(wrong) + 1)).mean())


def held_out_mask(sha256: list[str], share: float) -> np.ndarray:
    """(N,) bool. By content hash: a sample held out once is held out of every version."""
    return np.array([int(digest[:8], 16) / 2**32 < share for digest in sha256], bool)


def judge(head: Head, samples: Samples, pool: LabelPool) -> Judgement:
    """Agreement is on answers: both "unknown" counts as agreeing."""
    student = pool.recognise(head(samples.features), top_k=1)
    teacher = pool.recognise(samples.targets, top_k=1)
    same_label = student.indices[:, 0] == teacher.indices[:, 0]
    agrees = np.where(student.unknown | teacher.unknown, student.unknown == teacher.unknown, same_label)
    return Judgement(student.margins, agrees)


def fit_closed_form(samples: Samples, prior: Head, prior_samples: float) -> Head:
    """The head that minimises `sum ||x W + b - v||^2 + strength * ||[W; b] - prior||^2`.

    Args:
        prior: the head to fall back to where the samples say nothing; rescaled to outputs of unit length, since v has
            unit length and a version's scale is free.
        prior_samples: strength of the prior, in samples of average feature energy.
    """
    features = samples.features.astype(np.float64)  # (N, F)
    centre = features.mean(axis=0)
    raw = features @ prior.weight + prior.bias  # (N, D)
    scale = np.linalg.norm(raw, axis=1).mean()
    weight = prior.weight.astype(np.float64) / scale  # (F, D)
    bias = (centre @ prior.weight + prior.bias) / scale  # at the centre
    centred = features - centre
    strength = prior_samples * centred.var(axis=0).mean()
    residual = samples.targets - (raw / scale)  # (N, D)
    gram = centred.T @ centred
    gram[np.diag_indices_from(gram)] += strength
    weight += np.linalg.solve(gram, centred.T @ residual)
    bias += residual.sum(axis=0) / (len(samples) + prior_samples * INTERCEPT_SHARE)
    return Head(weight, bias - centre @ weight)


def refine_contrastive(samples: Samples, start: Head, pool: LabelPool, config: CustomizationConfig) -> Head:
    """Gradient steps on the full loss from `start`; deterministic for `config.seed`."""
    generator = torch.Generator().manual_seed(config.seed)
    features = torch.from_numpy(samples.features)  # (N, F)
    targets = torch.from_numpy(samples.targets)  # (N, D)
    labels = torch.from_numpy(pool.recognise(samples.targets, top_k=1).indices[:, 0])  # (N,)
    texts = torch.from_numpy(pool.embeddings)  # (K, D)
    weight = torch.from_numpy(start.weight.copy()).requires_grad_()
    bias = torch.from_numpy(start.bias.copy()).requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=config.learning_rate)
    for _ in range(config.epochs):
        for batch in torch.randperm(len(samples), generator=generator).split(128):
            embeddings = torch.nn.functional.normalize(features[batch] @ weight + bias, dim=1)  # (b, D)
            mse = (embeddings - targets[batch]).square().sum(dim=1).mean()
            contrastive = torch.nn.functional.cross_entropy(embeddings @ texts.T / config.tau, labels[batch])
            optimizer.zero_grad()
            (config.lambda_mse * mse + contrastive).backward()
            optimizer.step()
    return Head(weight.detach().numpy(), bias.detach().numpy())


@dataclass(frozen=True)
class Learned:
    """The best head a run found, judged on the held-out samples."""

    head: Head
    method: str
    judgement: Judgement


def learn_head(
    train: Samples, held_out: Samples, version0: Head, pool: LabelPool, config: CustomizationConfig
) -> Learned:
    """Fits the candidates and keeps the one with the lowest held-out risk."""
    closed = fit_closed_form(train, version0, config.prior_samples)
    candidates = [Learned(closed, "mse", judge(closed, held_out, pool))]
    if config.epochs:
        refined = refine_contrastive(train, closed, pool, config)
        candidates.append(Learned(refined, "mse+contrastive", judge(refined, held_out, pool)))
    return min(candidates, key=lambda candidate: candidate.judgement.risk)
