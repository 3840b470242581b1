"""How well a score tells samples of one kind from the others, on many resamples at once.

Of N samples with scores (N,) and kind (N,) bool, each row of `counts` (R, N) takes each so often: see `bench.bootstrap`.
"""

from __future__ import annotations

import numpy as np


def auroc(scores: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R,): probability that a positive sample scores above a negative one, ties count half; 0.5 where one kind is missing."""
    _, ahead, behind = _steps(scores, positive, counts)
    pairs = ahead.sum(axis=1) * behind.sum(axis=1)
    won = (ahead * (behind.cumsum(axis=1) - behind / 2)).sum(axis=1)
    return np.where(pairs > 0, won / np.maximum(pairs, 1), 0.5)


def fpr95(scores: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R,): share of the negative samples that score at least what 95 % of the positive ones do; NaN where one kind is
    missing."""
    steps, ahead, behind = _steps(scores, positive, counts)
    place = np.maximum(ahead.sum(axis=1) - 1, 0) * 0.05  # of the quantile, between two of the positive samples
    below, above = (
        steps[(ahead.cumsum(axis=1) > at[:, None]).argmax(axis=1)] for at in (np.floor(place), np.ceil(place))
    )
    least = below + (place - np.floor(place)) * (above - below)
    passing, negative = (behind * (steps >= least[:, None])).sum(axis=1), behind.sum(axis=1)
    both = (ahead.sum(axis=1) > 0) & (negative > 0)
    return np.where(both, passing / np.maximum(negative, 1), np.nan)


def _steps(scores: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The K different scores, ascending, and how many samples have each: positive and negative ones, (R, K)."""
    order = np.argsort(scores)
    scores, positive, counts = scores[order], positive[order], counts[:, order]
    first = np.flatnonzero(np.append(True, scores[1:] != scores[:-1]))
    ahead, behind = (np.add.reduceat(counts * kind, first, axis=1, dtype=np.float64) for kind in (positive, ~positive))
    return scores[first], ahead, behind
