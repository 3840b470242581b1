"""Bootstrap over seeds and images: how far a mean could have come out otherwise."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

_RESAMPLES = 2000


@lru_cache(maxsize=4)
def resampled(count: int, seed: int = 0) -> np.ndarray:
    """(1 + R, count) float32: how often each of `count` things is drawn when as many are drawn with replacement, R times over;
    the first row is all of them, once."""
    rng, times = np.random.default_rng(seed), np.ones((1 + _RESAMPLES, count), np.float32)
    for row in times[1:]:
        row[:] = np.bincount(rng.integers(count, size=count), minlength=count)
    times.setflags(write=False)
    return times


def interval(values: np.ndarray, over: np.ndarray | None = None) -> list[float]:
    """95 % bootstrap interval of the mean of (seeds, M) values, over seeds and images; with `over`, of the ratio of the two
    means, drawn together, without draws in which `over` is 0 throughout."""
    drawn = _means(values)
    if over is not None:
        beside = _means(over)
        drawn = drawn[beside != 0] / beside[beside != 0]
    return _bounds(drawn)


def estimate_of_seeds(by_seed: np.ndarray) -> dict[str, Any]:
    """Mean over seeds of what was found of each on `resampled` images, (seeds, 1 + R), with its 95 % interval over seeds and
    images. Draws that are NaN are left out of it."""
    drawn = (resampled(len(by_seed), 1) * by_seed.T).sum(axis=1) / len(by_seed)
    return {"mean": round(float(drawn[0]), 4), "interval": _bounds(drawn[1:])}


def _means(values: np.ndarray) -> np.ndarray:
    """(R,)"""
    seeds, images = values.shape
    return ((resampled(seeds, 1)[1:] @ values) * resampled(images)[1:]).sum(axis=1) / (seeds * images)


def _bounds(drawn: np.ndarray) -> list[float]:
    return [round(float(bound), 4) for bound in np.nanquantile(drawn, (0.025, 0.975))]
