"""How far the student agrees with the FM at a given margin, estimated from the samples that both answered.

Agreement is graded (see `edgefm.models.confidence`): a disagreement counts by the accuracy it is expected to cost.

Which samples those are is no accident: uncertain ones go to the FM, certain ones only as audits. So the evidence is
weighted by the inverse of each sample's propensity (the probability with which it was sent). Weights of 1 / audit share
on a few audits would make the estimate jump, so they only place the borders of strata of equal weight along the margin;
within a stratum, where the margin hardly varies, samples count alike (post-stratification). On recorded streams this
halves the spread of the chosen edge share against plain inverse weighting. Last, disagreement is made not to rise with
the margin (pool adjacent violators). What is left of an estimate's luck shows in its variance: a threshold chosen for reaching
a target by the estimate alone is one whose estimate was lucky.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .window import Window

STRATA = 10
_LOWER_ENDS = np.arange(STRATA) / STRATA


class AgreementCurve:
    """Disagreement with the FM as a non-increasing step function of the margin, of S steps.

    Attributes, each (S,):
        borders: ascending lower borders of the steps.
        disagreement: in [-1, 1], non-increasing.
        variance: of each estimate; the steps count as independent.
    """

    def __init__(self, borders: np.ndarray, disagreement: np.ndarray, variance: np.ndarray) -> None:
        self.borders = borders
        self.disagreement = disagreement
        self.variance = variance

    @classmethod
    def fit(cls, margins: np.ndarray, agreements: np.ndarray, propensities: np.ndarray) -> AgreementCurve:
        """Fits to N pieces of evidence, N >= 1; all arrays are (N,)."""
        order = np.argsort(margins)
        margins, wrong, weights = margins[order], 1.0 - agreements[order], 1.0 / propensities[order]
        cumulative = weights.cumsum()
        starts = np.searchsorted(cumulative - weights / 2, cumulative[-1] * _LOWER_ENDS)
        # A border between equal margins would be none: it moves down to the first of them.
        starts = np.searchsorted(margins, margins[starts[starts < len(margins)]])
        starts, sums, counts = _non_increasing(wrong, sorted(set(starts.tolist())))
        squares = np.add.reduceat(wrong * wrong, starts)
        overall = squares.sum() / len(wrong) - (sums.sum() / len(wrong)) ** 2
        within = squares - sums**2 / counts
        # As if each step had half a piece more of the overall spread: a few that agree do not prove that all do.
        return cls(margins[starts], sums / counts, np.maximum(within + overall / 2, 0.0) / counts**2)

    def above(self, margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of (N,) ascending margins: for each, how many disagreements to expect from it on upwards, and the variance of that
        estimate, both (N,). Below the lowest border is the lowest step."""
        bounds = [0, *np.searchsorted(margins, self.borders[1:]).tolist(), len(margins)]
        ends, sizes = np.array(bounds[1:]), np.diff(bounds)
        step = np.repeat(np.arange(len(ends)), sizes)
        on_step = ends[step] - np.arange(len(margins))  # the margins from this one on that share its step
        wrong, variance = _sums_above(sizes * self.disagreement), _sums_above(sizes**2 * self.variance)
        return (wrong[step] + on_step * self.disagreement[step], variance[step] + on_step**2 * self.variance[step])


def _sums_above(values: np.ndarray) -> np.ndarray:
    """(S,): of those behind each; exactly 0 for the last."""
    return np.append(values[:0:-1].cumsum()[::-1], 0.0)


def _non_increasing(wrong: np.ndarray, starts: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pool adjacent violators: which strata, given by their first pieces, begin a step of the non-increasing function that
    is closest to `wrong`; the sum of `wrong` on each step, and how many pieces are on it. All (S,)."""
    sums = np.add.reduceat(wrong, starts).tolist()
    ends = [*starts[1:], len(wrong)]
    steps: list[tuple[int, float, int]] = []  # first piece, sum, count
    for start, end, total in zip(starts, ends, sums, strict=True):
        count = end - start
        while steps and steps[-1][1] * count < total * steps[-1][2]:
            start, above_total, above_count = steps.pop()
            total, count = total + above_total, count + above_count
        steps.append((start, total, count))
    first, total, count = zip(*steps, strict=True)
    return np.array(first), np.array(total), np.array(count)


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
