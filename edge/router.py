"""Where each sample of one device goes: the switcher and the link estimate, kept in step. No clock, socket or thread inside:
times are passed in, so that the live agent and a replay run the same code."""

from __future__ import annotations

import math

from ..models.versions import Calibration
from .config import SwitcherConfig
from .link import LinkEstimator
from .switcher import Decision, LinkState, Switcher

_UNSEEN_BYTES = 4096
"""A query's size before the first one."""
_FORGET = 0.05
"""Weight of the latest query in the usual size."""


class Router:
    """Decides, and learns from how its queries fare.

    Args:
        deadline_ms: of a query; one that is predicted to miss it is not sent.
        max_pending: queries on their way at once, at most.
    """

    def __init__(self, config: SwitcherConfig, deadline_ms: float, max_pending: int) -> None:
        self.switcher = Switcher(config)
        self.link = LinkEstimator()
        self._deadline_ms = deadline_ms
        self._max_pending = max_pending
        self._usual_bytes = 0.0

    def model_changed(self, calibration: Calibration) -> None:
        self.switcher.model_changed(calibration)

    def decide(self, margin: float, edge_ms: float, now_ms: float, available: bool = True) -> Decision:
        """Decides on one sample.

        Args:
            margin: of the student's similarities.
            edge_ms: what the student took for it.
            available: whether the cloud may be asked at all now.
        """
        link, size = self.link, round(self._usual_bytes) or _UNSEEN_BYTES
        closed = not available or link.pending >= self._max_pending
        predicted_ms = math.inf if closed else link.predict_ms(size, now_ms) + link.cloud_ms
        state = LinkState(link.transit_ms(size), link.cloud_ms, predicted_ms)
        return self.switcher.decide(margin, edge_ms, state, self._deadline_ms)

    def asked(self, query: int, size_bytes: int, now_ms: float) -> None:
        self._usual_bytes += (size_bytes - self._usual_bytes) * (_FORGET if self._usual_bytes else 1.0)
        self.link.sent(query, size_bytes, now_ms)

    def answered(self, query: int, now_ms: float, server_ms: float) -> float:
        """Takes an answer in; returns its transit in ms."""
        return self.link.answered(query, now_ms, server_ms)

    def failed(self, query: int, now_ms: float, late: bool) -> None:
        """A query without an answer; `late`: it met its deadline, which says something of the link."""
        if late:
            self.link.lost(query, now_ms)
        else:
            self.link.dropped(query)

    def learn(self, margin: float, agreement: float, propensity: float) -> None:
        """Takes in the graded agreement with the FM on a sample that the running student answered too."""
        self.switcher.learn(margin, agreement, propensity)
