"""The threshold-searching table (EdgeFM, section 5): what each candidate threshold would cost and give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .agreement import AgreementCurve


@dataclass(frozen=True)
class Costs:
    """Mean milliseconds: the student on the edge, and a query's way (transit) and stay (queue and compute)."""

    edge_ms: float
    transit_ms: float
    cloud_ms: float


@dataclass(frozen=True)
class ThresholdTable:
    """Candidates are the margins of the window and, last, one above them all: every sample to the cloud.

    Attributes, each (N + 1,), thresholds ascending:
        thresholds: a sample with margin >= threshold is answered on the edge.
        edge_share: r(threshold), of the window.
        agreement: estimated mean graded agreement of all answers with the FM's; its own count as 1.
        error: standard error of that estimate.
        latency_ms: predicted mean with the student charged to every sample, t_edge + (1 - r)(t_trans + t_cloud).
        paper_latency_ms: as printed in the paper, r t_edge + (1 - r)(t_trans + t_cloud).
    """

    thresholds: np.ndarray
    edge_share: np.ndarray
    agreement: np.ndarray
    error: np.ndarray
    latency_ms: np.ndarray
    paper_latency_ms: np.ndarray

    @classmethod
    def build(cls, margins: np.ndarray, curve: AgreementCurve | None, costs: Costs) -> ThresholdTable:
        """From a window of N >= 1 margins; without a curve agreement and error are unknown (NaN) below the last candidate."""
        count = len(margins)
        thresholds = np.append(np.sort(margins), np.inf)
        first = _first_of_equals(thresholds)  # equal margins are one candidate
        edge_share = 1.0 - first / count
        if curve is None:
            agreement = np.append(np.full(count, np.nan), 1.0)
            error = np.append(np.full(count, np.nan), 0.0)
        else:
            wrong, variance = curve.above(thresholds[:-1])
            agreement = 1.0 - np.append(wrong, 0.0)[first] / count
            error = np.sqrt(np.append(variance, 0.0)[first]) / count
        cloud = (1.0 - edge_share) * (costs.transit_ms + costs.cloud_ms)
        return cls(thresholds, edge_share, agreement, error, costs.edge_ms + cloud, edge_share * costs.edge_ms + cloud)

    def smallest_cloud_use(self, agreement_target: float, caution: float) -> int:
        """Index of the lowest threshold whose estimated agreement, less `caution` of its standard errors, reaches the target;
        the last always does."""
        return int(np.argmax(self.agreement - caution * self.error >= agreement_target))

    def largest_within(self, bound_ms: float, form: str = "charged") -> int | None:
        """Index of the highest threshold whose predicted mean latency keeps the bound; None: not even all-edge does."""
        latency = self.latency_ms if form == "charged" else self.paper_latency_ms
        within = np.flatnonzero(latency <= bound_ms)
        return int(within[-1]) if len(within) else None


def _first_of_equals(ascending: np.ndarray) -> np.ndarray:
    """For each of (N,) ascending values the index of the first that equals it."""
    first = np.arange(len(ascending))
    equal = ascending[1:] == ascending[:-1]
    if not equal.any():
        return first
    first[1:][equal] = 0
    return np.maximum.accumulate(first)
