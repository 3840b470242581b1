"""How far the student agrees with the FM at a given margin, estimated from the samples that both answered.

Agreement is graded (see `edgefm.models.confidence`): a disagreement counts by the accuracy it is expected to cost.

Which samples those are is no accident: uncertain ones go to the FM, certain ones only as audits. So the evidence is
weighted by the inverse of each sample's propensity (the probability with which it was sent). Weights of 1 / audit share
on a few audits would make the estimate jump, so they only place the borders of strata of equal weight along the margin;
within a stratum, where the margin hardly varies, samples count alike (post-stratification). On recorded streams this
halves the spread of the chosen edge share against plain inverse weighting. Last, disagreement is made not to rise with
the margin (pool adjacent violators).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .window import Window

STRATA = 10
_LOWER_ENDS = np.arange(STRATA) / STRATA


class AgreementCurve:
    """Disagreement with the FM as a non-increasing step function of the margin."""

    def __init__(self, borders: np.ndarray, disagreement: np.ndarray) -> None:
        self.borders = borders  # (S,) ascending lower borders
        self.disagreement = disagreement  # (S,) in [-1, 1], non-increasing

    @classmethod
    def fit(cls, margins: np.ndarray, agreements: np.ndarray, propensities: np.ndarray) -> AgreementCurve:
        """Fits to N pieces of evidence, N >= 1; all arrays are (N,)."""
        order = np.argsort(margins)
        margins, wrong, weights = margins[order], 1.0 - agreements[order], 1.0 / propensities[order]
        cumulative = weights.cumsum()
        starts = np.searchsorted(cumulative - weights / 2, cumulative[-1] * _LOWER_ENDS)
        # A border between equal margins would be none: it moves down to the first of them.
        starts = np.searchsorted(margins, margins[starts[starts < len(margins)]])
        borders = sorted(set(starts.tolist()))
        counts = [end - start for start, end in zip(borders, [*borders[1:], len(margins)], strict=True)]
        return cls(margins[borders], _non_increasing(np.add.reduceat(wrong, borders).tolist(), counts))

    def __call__(self, margins: np.ndarray) -> np.ndarray:
        """Expected disagreement at each margin; below the lowest border the lowest stratum's."""
        index = np.searchsorted(self.borders, margins, side="right") - 1
        return self.disagreement[np.maximum(index, 0)]


def _non_increasing(wrong: Sequence[float], counts: Sequence[int]) -> np.ndarray:
    """Pool adjacent violators: the non-increasing sequence closest to wrong / counts, weighted by counts."""
    blocks: list[tuple[float, int, int]] = []  # wrong, count, strata
    for total, count in zip(wrong, counts, strict=True):
        strata = 1
        while blocks and blocks[-1][0] * count < total * blocks[-1][1]:
            above_total, above_count, above_strata = blocks.pop()
            total, count, strata = total + above_total, count + above_count, strata + above_strata
        blocks.append((total, count, strata))
    return np.array([total / count for total, count, strata in blocks for _ in range(strata)])


class Evidence:
    """The latest samples that both student and FM answered, after what a version brought along as its calibration."""

    def __init__(self, window: int, enough: int) -> None:
        """`enough` pieces make agreement estimable; half of them must be the version's own."""
        self._enough = enough
        self._own = Window(window, 3)  # margin, agreement, propensity
        self._prior = np.empty((3, 0))

    def reset(self, margins: Sequence[float], agreements: Sequence[float], propensities: Sequence[float]) -> None:
        """Forgets everything but a new version's calibration."""
        self._own.clear()
        self._prior = np.array([margins, agreements, propensities], np.float64)

    def add(self, margin: float, agreement: float, propensity: float) -> None:
        self._own.add(margin, agreement, propensity)

    def curve(self) -> AgreementCurve | None:
        """None while agreement is not estimable.

        The calibration only helps out until there is enough evidence of the version's own: it comes from samples that
        earlier versions found uncertain, so that within a stratum it disagrees more often than the stream does.
        """
        pieces = self._own.columns
        if len(self._own) < self._enough:
            pieces = np.concatenate((self._prior, pieces), axis=1)
        if len(self._own) * 2 < self._enough or pieces.shape[1] < self._enough:
            return None
        return AgreementCurve.fit(*pieces)
