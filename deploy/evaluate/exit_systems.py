"""Systems that run a part of the FM on the device: SPINN and PersEPhonEE (papers and training: see `exits`).

SPINN picks a split before each sample: the least expected latency given what the pieces take on this device, how often the
exits were sure on the evidence, and the product's own estimate of the link. The splits are the boundaries: at 0 the image is
sent, at the last one everything is computed here. Simpler than in the paper: the threshold follows from the accuracy target
alone, where the paper's scheduler trades it against latency at run time, and no exit stands in the cloud. Added to it: after
`PROBE_AFTER` samples without a query the next one may not be computed here alone, so that a link that was left for its
slowness is seen again; the product's audits do that for it.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from ...edge.link import LinkEstimator
from ...edge.switcher import Decision
from ..replay.systems import MAX_PENDING, Heedless
from .exits import ExitRecording, ExitRule
from .fm_stages import StageCosts

PROBE_AFTER = 50
"""The product audits one sample in so many by default."""
_SERVED = 30
"""Answers that the cloud's time is estimated from: as many as the link's."""


class PersEPhonEE(Heedless):
    """The FM on the device, as far as the first exit that is sure. It asks nobody.

    Attributes:
        edge_right, cloud_right: (N,) bool, of the answers there.
    """

    def __init__(self, recording: ExitRecording, costs: StageCosts, rule: ExitRule, factors: np.ndarray) -> None:
        """`factors`: (N,) what each sample takes over the medians of the costs, see `StageCosts.draw`."""
        taken = _first_sure(recording, rule)
        self.edge_right = recording.edge_right[np.arange(len(taken)), taken]
        self.cloud_right = recording.cloud_right[:, -1]
        self._device_ms = (costs.device_ms[taken] * factors).tolist()
        predicted_ms = float(_expected_ms(costs, rule, factors)[-1])
        self._decision = Decision(False, "margin", 0.0, rule.threshold, predicted_ms)

    def begin(self, sample: int, now_ms: float) -> float:
        return self._device_ms[sample]

    def decide(self, sample: int, device_ms: float, now_ms: float) -> Decision:
        return self._decision

    def ask(self, sample: int, query: int, now_ms: float) -> tuple[int, float]:
        return 0, 0.0


class Spinn:
    """The FM from its beginning to a split on the device, unless an exit is sure before; the rest in the cloud.

    A query that meets its deadline leaves the answer of the exit that was surest on the way; when the image itself was sent
    there is none.
    """

    def __init__(
        self, recording: ExitRecording, costs: StageCosts, rule: ExitRule, factors: np.ndarray, deadline_ms: float
    ) -> None:
        """`factors`: (N,) what each sample takes over the medians of the costs, see `StageCosts.draw`."""
        self.link = LinkEstimator()
        self._recording, self._rule, self._deadline_ms = recording, rule, deadline_ms
        self._end = len(costs.names) - 1
        self._device_ms = costs.device_ms.tolist()
        self._sending_ms = (costs.device_ms + costs.pack_ms).tolist()
        self._factors, self._work = factors.tolist(), costs.work.tolist()
        self._first_sure = _first_sure(recording, rule).tolist()
        self._size_bytes = recording.size_bytes.tolist()
        expected_ms, usual = _expected_ms(costs, rule, factors), float(factors.mean())
        self._alone_ms = float(expected_ms[-1])
        pack_ms, sending_ms = costs.pack_ms * usual, (costs.device_ms + costs.pack_ms) * usual
        columns = (expected_ms, rule.stay, sending_ms, pack_ms, costs.size_bytes, costs.work)
        self._splits = list(zip(*(column[:-1].tolist() for column in columns), strict=True))
        self._split = [self._end] * len(recording)
        self._sent: dict[int, float] = {}  # queries on their way: their work
        self._served: deque[tuple[float, float]] = deque(maxlen=_SERVED)  # cloud's ms, work
        self._cloud_ms = 0.0  # for the whole FM
        self._kept = 0  # samples since the last query
        self._predicted_ms = 0.0

    def begin(self, sample: int, now_ms: float) -> float:
        split, self._predicted_ms = self._best_split(self._size_bytes[sample][0], now_ms)
        self._split[sample] = split
        first = self._first_sure[sample]
        taken_ms = self._device_ms[first] if first <= split else self._sending_ms[split]
        return taken_ms * self._factors[sample]

    def decide(self, sample: int, device_ms: float, now_ms: float) -> Decision:
        to_cloud = self._first_sure[sample] > self._split[sample]
        self._kept += 1
        return Decision(to_cloud, "margin", float(to_cloud), self._rule.threshold, self._predicted_ms)

    def ask(self, sample: int, query: int, now_ms: float) -> tuple[int, float]:
        split = self._split[sample]
        size_bytes, work = self._size_bytes[sample][split], self._work[split]
        self.link.sent(query, size_bytes, now_ms)
        self._sent[query], self._kept = work, 0
        return size_bytes, work

    def answered(self, sample: int, query: int, now_ms: float, server_ms: float, propensity: float) -> None:
        self.link.answered(query, now_ms, server_ms)
        self._served.append((server_ms, self._sent.pop(query)))
        self._cloud_ms = sum(ms for ms, _ in self._served) / sum(work for _, work in self._served)

    def failed(self, query: int, now_ms: float) -> None:
        self.link.lost(query, now_ms)
        del self._sent[query]

    @property
    def bandwidth_mbps(self) -> float:
        return self.link.bandwidth_mbps

    @property
    def splits(self) -> np.ndarray:
        """(N,) int, the boundary picked for each sample."""
        return np.array(self._split)

    @property
    def edge_right(self) -> np.ndarray:
        """(N,) bool, of what the device said, or would have said without the cloud; final after the run."""
        rows, sureness = np.arange(len(self._split)), self._recording.sureness
        first, split = np.array(self._first_sure), self.splits
        before = np.where(np.arange(self._end + 1) <= split[:, None], sureness, -1.0)  # (N, B + 1)
        taken = np.where(first <= split, first, before.argmax(axis=1))
        return self._recording.edge_right[rows, taken]

    @property
    def cloud_right(self) -> np.ndarray:
        """(N,) bool, of what the cloud says from the split on; final after the run."""
        return self._recording.cloud_right[np.arange(len(self._split)), self.splits]

    def _best_split(self, image_bytes: int, now_ms: float) -> tuple[int, float]:
        """The split, and the latency expected of it in ms."""
        link, cloud_ms = self.link, self._cloud_ms
        if link.pending >= MAX_PENDING:
            return self._end, self._alone_ms
        probing = self._kept >= PROBE_AFTER
        best, best_ms = self._end, math.inf if probing else self._alone_ms
        for split, (expected_ms, stay, sending_ms, pack_ms, size_bytes, work) in enumerate(self._splits):
            if expected_ms + stay * (pack_ms + cloud_ms * work) >= best_ms:
                continue  # not even on a link that takes no time
            query_ms = link.predict_ms(size_bytes if split else image_bytes, now_ms + sending_ms) + cloud_ms * work
            total_ms = expected_ms + stay * (pack_ms + query_ms)
            if total_ms < best_ms and (probing or query_ms <= self._deadline_ms):
                best, best_ms = split, total_ms
        return best, best_ms


def _first_sure(recording: ExitRecording, rule: ExitRule) -> np.ndarray:
    """(N,) the boundary of the first exit that is sure enough, or the end."""
    return (recording.sureness >= rule.threshold).argmax(axis=1)


def _expected_ms(costs: StageCosts, rule: ExitRule, factors: np.ndarray) -> np.ndarray:
    """(B + 1,) of the device as far as each boundary, where exits end it as often as they did on the evidence."""
    pieces_ms = np.diff(costs.device_ms) * float(factors.mean())
    return np.append(0.0, np.cumsum(pieces_ms * rule.stay[:-1]))
