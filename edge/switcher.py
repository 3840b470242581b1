"""Dynamic model switching (EdgeFM, section 5): per sample, edge or cloud. No clock, socket or thread inside."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from ..models.versions import Calibration
from .agreement import AgreementCurve, Evidence
from .config import LEAST_MARGINS, SwitcherConfig
from .thresholds import Costs, ThresholdTable
from .window import Window

Reason = Literal["margin", "audit", "cold-start", "infeasible", "link"]
_MOVED = 0.1
"""Relative change of the predicted cloud time that makes the table out of date."""


@dataclass(frozen=True)
class LinkState:
    """The link as a decision sees it.

    Attributes:
        transit_ms: of a query of the usual size on an idle link.
        cloud_ms: queue and compute in the cloud.
        predicted_ms: transit and cloud time of this query sent now, behind what is on its way; inf with the circuit open.
    """

    transit_ms: float
    cloud_ms: float
    predicted_ms: float


@dataclass(frozen=True)
class Decision:
    """Where a sample is answered and why.

    Attributes:
        to_cloud: ask the FM.
        reason: `margin` against the threshold; `audit`; `cold-start` (agreement not yet estimable); `infeasible` (no
            threshold keeps the latency bound: edge); `link` (the FM was wanted, the link does not allow it: edge).
        propensity: probability with which this policy sends such a sample to the FM.
        threshold: the one in force, None while cold; inf sends everything.
        predicted_ms: predicted latency of this sample from frame to answer.
    """

    to_cloud: bool
    reason: Reason
    propensity: float
    threshold: float | None
    predicted_ms: float


class Switcher:
    """Decides by margin against a threshold that it keeps up to date; deterministic for its seed and inputs.

    Attributes:
        table: what it was last chosen from, None before.
        threshold: in force now; None while agreement is not estimable or no threshold keeps the bound.
    """

    def __init__(self, config: SwitcherConfig) -> None:
        self._config = config
        self._random = random.Random(config.seed)
        self._margins = Window(config.window, 1)
        self._evidence = Evidence(config.window, config.min_evidence)
        self._curve: AgreementCurve | None = None
        self._edge_ms = 0.0
        self._built_for_ms = math.nan
        self._since_build = 0
        self.table: ThresholdTable | None = None
        self.threshold: float | None = None

    def model_changed(self, calibration: Calibration) -> None:
        """A new student, or a new pool (then with an empty calibration): old margins and evidence say nothing of it."""
        self._margins.clear()
        self._evidence.reset(calibration.margins, calibration.agreements, calibration.propensities)
        self.table = self.threshold = self._curve = None
        self._since_build = self._config.rebuild_every

    def learn(self, margin: float, agreement: float, propensity: float) -> None:
        """Takes in the graded agreement with the FM on a sample that the student answered too."""
        self._evidence.add(margin, agreement, propensity)

    def decide(self, margin: float, edge_ms: float, link: LinkState, deadline_ms: float) -> Decision:
        """Decides on one sample.

        Args:
            margin: of the student's similarities.
            edge_ms: what the student took for it.
        """
        self._margins.add(margin)
        self._edge_ms += (edge_ms - self._edge_ms) * (0.05 if self._edge_ms else 1.0)
        self._refresh(link)
        wanted, reason, propensity = self._wants_cloud(margin)
        if wanted and link.predicted_ms > deadline_ms:
            wanted, reason = False, "link"
        predicted_ms = self._edge_ms + (link.predicted_ms if wanted else 0.0)
        return Decision(wanted, reason, propensity, self.threshold, predicted_ms)

    def _wants_cloud(self, margin: float) -> tuple[bool, Reason, float]:
        if self._config.objective == "accuracy_target" and self._curve is None:
            return True, "cold-start", 1.0
        threshold = self.threshold
        if threshold is None:
            return self._audit("infeasible")
        if margin < threshold:
            return True, "margin", 1.0
        return self._audit("margin")

    def _audit(self, otherwise: Reason) -> tuple[bool, Reason, float]:
        share = self._config.audit_share
        return (True, "audit", share) if self._random.random() < share else (False, otherwise, share)

    def _refresh(self, link: LinkState) -> None:
        self._since_build += 1
        cloud_ms = link.transit_ms + link.cloud_ms
        moved = not abs(cloud_ms - self._built_for_ms) <= _MOVED * self._built_for_ms
        if not moved and self._since_build < self._config.rebuild_every:
            return
        if self._since_build >= self._config.rebuild_every:
            self._since_build = 0
            self._curve = self._evidence.curve() if len(self._margins) >= LEAST_MARGINS else None
        self._built_for_ms = cloud_ms
        costs = Costs(self._edge_ms, link.transit_ms, link.cloud_ms)
        self.table = ThresholdTable.build(self._margins.columns[0], self._curve, costs)
        if self._config.objective == "latency_bound":
            index = self.table.largest_within(self._config.latency_bound_ms, self._config.latency_form)
        elif self._curve is None:
            index = None
        else:
            index = self.table.smallest_cloud_use(self._config.accuracy_target, self._config.caution)
        self.threshold = None if index is None else float(self.table.thresholds[index])
