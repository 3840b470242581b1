"""How often the student agrees with the FM at a given margin, estimated from the samples that both answered.

Which samples those are is no accident: uncertain ones go to the FM, certain ones only as audits. So the evidence is
weighted by the inverse of each sample's propensity (the probability with which it was sent). Weights of 1 / audit share
on a few audits would make the estimate jump, so they only place the borders of strata of equal weight along the margin;
within a stratum, where the margin hardly varies, samples count alike (post-stratification). On recorded streams this
halves the spread of the chosen edge share against plain inverse weighting. Last, disagreement is made not to rise with
the margin (pool adjacent violators).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

STRATA = 10


class AgreementCurve:
    """Disagreement with the FM as a non-increasing step function of the margin."""

    def __init__(self, borders: np.ndarray, disagreement: np.ndarray) -> None:
        self.borders = borders  # (S,) ascending lower borders
        self.disagreement = disagreement  # (S,) in [0, 1], non-increasing

    @classmethod
    def fit(cls, margins: np.ndarray, agrees: np.ndarray, propensities: np.ndarray) -> AgreementCurve:
        """Fits to N pieces of evidence, N >= 1; all arrays are (N,)."""
        order = np.argsort(margins)
        margins, wrong, weights = margins[order], 1.0 - agrees[order], 1.0 / propensities[order]
        position = np.cumsum(weights) - weights / 2
        stratum = np.minimum(position * (STRATA / weights.sum()), STRATA - 1).astype(np.intp)
        counts = np.bincount(stratum, minlength=STRATA)
        filled = counts > 0
        first = np.searchsorted(stratum, np.flatnonzero(filled))
        rates = np.bincount(stratum, wrong, STRATA)[filled] / counts[filled]
        return cls(margins[first], _non_increasing(rates, counts[filled]))

    def __call__(self, margins: np.ndarray) -> np.ndarray:
        """Probability of disagreeing at each margin; below the lowest border the lowest stratum's."""
        index = np.searchsorted(self.borders, margins, side="right") - 1
        return self.disagreement[np.maximum(index, 0)]


def _non_increasing(rates: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pool adjacent violators: the closest non-increasing sequence, weighted by counts."""
    blocks: list[tuple[float, int, int]] = []  # mean, count, strata
    for rate, count in zip(rates.tolist(), counts.tolist(), strict=True):
        mean, size, strata = rate, count, 1
        while blocks and blocks[-1][0] < mean:
            above, above_size, above_strata = blocks.pop()
            mean = (mean * size + above * above_size) / (size + above_size)
            size, strata = size + above_size, strata + above_strata
        blocks.append((mean, size, strata))
    return np.repeat([mean for mean, _, _ in blocks], [strata for _, _, strata in blocks])


class Evidence:
    """The latest samples that both student and FM answered, after what a version brought along as its calibration."""

    def __init__(self, window: int, enough: int) -> None:
        """`enough` pieces make agreement estimable; half of them must be the version's own."""
        self._enough = enough
        self._own: deque[tuple[float, float, float]] = deque(maxlen=window)
        self._prior: list[tuple[float, float, float]] = []

    def reset(self, margins: Sequence[float], agrees: Sequence[bool], propensities: Sequence[float]) -> None:
        """Forgets everything but a new version's calibration."""
        self._own.clear()
        self._prior = [(m, float(a), p) for m, a, p in zip(margins, agrees, propensities, strict=True)]

    def add(self, margin: float, agrees: bool, propensity: float) -> None:
        self._own.append((margin, float(agrees), propensity))

    def curve(self) -> AgreementCurve | None:
        """None while agreement is not estimable.

        The calibration only helps out until there is enough evidence of the version's own: it comes from samples that
        earlier versions found uncertain, so that within a stratum it disagrees more often than the stream does.
        """
        pieces = [*self._own] if len(self._own) >= self._enough else [*self._prior, *self._own]
        if len(self._own) * 2 < self._enough or len(pieces) < self._enough:
            return None
        margins, agrees, propensities = np.array(pieces).T
        return AgreementCurve.fit(margins, agrees, propensities)
