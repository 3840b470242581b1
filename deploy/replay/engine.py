"""Events in virtual time: frames, the student, the uplink, the cloud's queue, the downlink, deadlines.

A device takes frames in order, one at a time; a frame's latency counts from its arrival. What it asks crosses the uplink
(first in, first out), waits for the propagation, queues and is computed in the cloud, and comes back the same way. Not
modelled: uploads of samples that found no answer, downloads of students, a broken connection. Deterministic for its inputs.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ...edge.switcher import Decision
from ..timeline import ROUTES
from .systems import FRAMING_BYTES, System
from .virtual_cloud import Job, VirtualCloud
from .virtual_link import VirtualLink

ANSWER_BYTES = 200
"""Of an answer with its framing; measured on real connections."""
_EDGE, _CLOUD, _FALLBACK = range(len(ROUTES))
_AT_CLOUD, _CLOSES, _DONE, _BACK, _DEADLINE = range(5)


@dataclass(frozen=True, eq=False)
class Replayed:
    """What became of N samples; every array is (N,), times in virtual ms, 0 where nothing was asked.

    Attributes:
        route: index into `ROUTES`.
        audit: asked at random, not for the margin.
        arrival_ms: of the frame.
        device_ms: from arrival to decision, what waited for the frames before included.
        transit_ms: on the link, both ways, and what a call costs at its ends.
        queue_ms, compute_ms: in the cloud.
        total_ms: from arrival to answer.
        predicted_ms: what the system predicted from the moment that the device took the frame.
        threshold, bandwidth_mbps: in force at the decision; NaN where there is none.
        bytes_sent: image and framing.
    """

    route: np.ndarray
    audit: np.ndarray
    arrival_ms: np.ndarray
    device_ms: np.ndarray
    transit_ms: np.ndarray
    queue_ms: np.ndarray
    compute_ms: np.ndarray
    total_ms: np.ndarray
    predicted_ms: np.ndarray
    threshold: np.ndarray
    bandwidth_mbps: np.ndarray
    bytes_sent: np.ndarray

    def __len__(self) -> int:
        return len(self.route)

    def share(self, route: str) -> float:
        return float((self.route == ROUTES.index(route)).mean())

    def right(self, system: System) -> np.ndarray:
        """(N,) bool: what answered named the label."""
        return np.where(self.route == _CLOUD, system.cloud_right, system.edge_right)

    @staticmethod
    def empty(samples: int) -> Replayed:
        kinds = {"route": np.int8, "audit": np.bool_, "bytes_sent": np.int64}
        return Replayed(**{f.name: np.zeros(samples, kinds.get(f.name, np.float64)) for f in fields(Replayed)})


@dataclass(frozen=True)
class Network:
    """Between device and cloud. `propagation_ms` is one way."""

    uplink: VirtualLink
    downlink: VirtualLink
    propagation_ms: float


class Engine:
    """One device and its cloud. Several `run`s go on from one another: link, queue and clock stay.

    Args:
        deadline_ms: of a query, from the decision on; past it the device's own answer is given.
    """

    def __init__(self, network: Network, cloud: VirtualCloud, deadline_ms: float = 1000.0) -> None:
        self._network = network
        self._cloud = cloud
        self._deadline_ms = deadline_ms
        self._events: list[tuple[float, int, int, Any]] = []  # time, order of making, kind, what it concerns
        self._made = 0
        self._free_ms = 0.0  # when the device is done with what has come
        self._pending: dict[int, tuple[int, float, float]] = {}  # query: sample, when it was asked, propensity

    def run(self, system: System, arrivals_ms: np.ndarray) -> Replayed:
        """Replays as many samples as there are arrivals, to their last answer.

        Args:
            arrivals_ms: ascending; frames that come before the device is done with the earlier ones wait.
        """
        out = Replayed.empty(len(arrivals_ms))
        out.arrival_ms[:] = arrivals_ms
        self._system, self._out = system, out
        rows: list[tuple[float, float, float, float]] = []
        free_ms = self._free_ms
        for sample, arrival_ms in enumerate(arrivals_ms.tolist()):
            now_ms = max(arrival_ms, free_ms)
            if self._events:
                self._advance(now_ms)
            device_ms = system.begin(sample, now_ms)
            now_ms = free_ms = now_ms + device_ms
            if self._events:
                self._advance(now_ms)
            decision = system.decide(sample, device_ms, now_ms)
            rows.append((now_ms - arrival_ms, decision.predicted_ms, _number(decision), system.bandwidth_mbps))
            if decision.to_cloud:
                self._ask(sample, decision, now_ms)
            elif decision.reason == "link":
                out.route[sample] = _FALLBACK
        self._advance(math.inf)
        self._free_ms = free_ms
        out.device_ms[:], out.predicted_ms[:], out.threshold[:], out.bandwidth_mbps[:] = np.array(rows).T
        local = out.route != _CLOUD
        out.total_ms[local] += out.device_ms[local]
        return out

    def _ask(self, sample: int, decision: Decision, now_ms: float) -> None:
        query, network = self._next(), self._network
        self._pending[query] = (sample, now_ms, decision.propensity)
        size_bytes, work = self._system.ask(sample, query, now_ms)
        self._out.bytes_sent[sample] = size_bytes + FRAMING_BYTES
        self._out.audit[sample] = decision.reason == "audit"
        there_ms = network.uplink.send(size_bytes + FRAMING_BYTES, now_ms) + network.propagation_ms
        job = Job(query, there_ms, now_ms + self._deadline_ms, work)
        self._push(there_ms, _AT_CLOUD, job)
        self._push(job.deadline_ms, _DEADLINE, job)

    def _advance(self, to_ms: float) -> None:
        """Lets everything happen that does by then."""
        events, cloud = self._events, self._cloud
        while events and events[0][0] <= to_ms:
            now_ms, _, kind, what = heapq.heappop(events)
            if kind == _AT_CLOUD:
                cloud.arrive(what)
            elif kind == _DONE:
                cloud.done()
                batch, compute_ms = what
                self._send_back(batch, compute_ms, now_ms)
            elif kind == _BACK:
                job, done_ms, compute_ms = what
                self._answer(job, done_ms, compute_ms, now_ms)
            elif kind == _DEADLINE:
                self._miss(what, now_ms)
                continue
            if kind != _BACK:
                self._serve(now_ms)

    def _serve(self, now_ms: float) -> None:
        """The cloud begins its next batch, or comes back to it when that closes."""
        due_ms = self._cloud.due_ms()
        while due_ms is not None and due_ms <= now_ms:
            batch, compute_ms = self._cloud.begin(now_ms)
            if batch:
                self._push(now_ms + compute_ms, _DONE, (batch, compute_ms))
            due_ms = self._cloud.due_ms()
        if due_ms is not None:
            self._push(due_ms, _CLOSES, ([], 0.0))

    def _send_back(self, batch: list[Job], compute_ms: float, now_ms: float) -> None:
        network = self._network
        for job in batch:
            here_ms = network.downlink.send(ANSWER_BYTES, now_ms) + network.propagation_ms + self._cloud.call_ms()
            self._push(here_ms, _BACK, (job, now_ms, compute_ms))

    def _answer(self, job: Job, done_ms: float, compute_ms: float, now_ms: float) -> None:
        known = self._pending.pop(job.query, None)
        if known is None:
            return  # past its deadline
        sample, asked_ms, propensity = known
        server_ms, out = done_ms - job.arrived_ms, self._out
        self._system.answered(sample, job.query, now_ms, server_ms, propensity)
        out.route[sample] = _CLOUD
        out.queue_ms[sample] = server_ms - compute_ms
        out.compute_ms[sample] = compute_ms
        out.transit_ms[sample] = now_ms - asked_ms - server_ms
        out.total_ms[sample] = now_ms - out.arrival_ms[sample]

    def _miss(self, job: Job, now_ms: float) -> None:
        known = self._pending.pop(job.query, None)
        if known is not None:
            self._system.failed(job.query, now_ms)
            self._out.route[known[0]] = _FALLBACK
            self._out.total_ms[known[0]] = self._deadline_ms

    def _push(self, at_ms: float, kind: int, what: object) -> None:
        heapq.heappush(self._events, (at_ms, self._next(), kind, what))

    def _next(self) -> int:
        self._made += 1
        return self._made


def _number(decision: Decision) -> float:
    return math.nan if decision.threshold is None else decision.threshold
