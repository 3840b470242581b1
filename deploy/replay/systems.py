"""What a device does with a frame: the product's own router, and the simplest alternatives to it."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from ...edge.config import SwitcherConfig
from ...edge.router import Router
from ...edge.switcher import Decision
from ...models.versions import Calibration
from .recording import Recording

MAX_PENDING = 32
FRAMING_BYTES = 140
"""Of a query beside its image: message, HTTP/2 and gRPC framing; measured on real connections."""


class System(Protocol):
    """A system under replay. Samples are rows of its recording; times are in virtual ms.

    Attributes:
        device_ms: (N,) what the device computes for each sample before it decides.
        size_bytes: (N,) what a query sends.
        work: (N,) share of the FM's computation that a query leaves to the cloud.
    """

    device_ms: np.ndarray
    size_bytes: np.ndarray
    work: np.ndarray

    def decide(self, sample: int, device_ms: float, now_ms: float) -> Decision: ...

    def asked(self, sample: int, query: int, size_bytes: int, now_ms: float) -> None: ...

    def answered(self, sample: int, query: int, now_ms: float, server_ms: float, propensity: float) -> None: ...

    def failed(self, query: int, now_ms: float) -> None:
        """The query met its deadline."""
        ...

    @property
    def bandwidth_mbps(self) -> float: ...


class EdgeFM:
    """The product: student, then the router of `edgefm.edge`."""

    def __init__(self, recording: Recording, device_ms: np.ndarray, router: Router) -> None:
        self.device_ms = device_ms
        self.size_bytes = recording.size_bytes
        self.work = np.ones(len(recording))
        self.router = router
        self._margins = recording.margins.tolist()
        self._agreements = recording.agreements.tolist()

    def decide(self, sample: int, device_ms: float, now_ms: float) -> Decision:
        return self.router.decide(self._margins[sample], device_ms, now_ms)

    def asked(self, sample: int, query: int, size_bytes: int, now_ms: float) -> None:
        self.router.asked(query, size_bytes, now_ms)

    def answered(self, sample: int, query: int, now_ms: float, server_ms: float, propensity: float) -> None:
        self.router.answered(query, now_ms, server_ms)
        self.router.learn(self._margins[sample], self._agreements[sample], propensity)

    def failed(self, query: int, now_ms: float) -> None:
        self.router.failed(query, now_ms, late=True)

    @property
    def bandwidth_mbps(self) -> float:
        return self.router.link.bandwidth_mbps


def edgefm(
    recording: Recording, device_ms: np.ndarray, config: SwitcherConfig, deadline_ms: float, calibration: Calibration
) -> EdgeFM:
    router = Router(config, deadline_ms, MAX_PENDING)
    router.model_changed(calibration)
    return EdgeFM(recording, device_ms, router)


class Fixed:
    """Answers on the edge from a threshold on that never moves: 0 is edge-only, infinity cloud-only.

    Cloud-only devices have no student to wait for: give them `device_ms` of 0 and what encodes and sends alone costs.
    """

    def __init__(self, recording: Recording, device_ms: np.ndarray, threshold: float) -> None:
        self.device_ms = device_ms
        self.size_bytes = recording.size_bytes
        self.work = np.ones(len(recording))
        self.threshold = threshold
        self._margins = recording.margins.tolist()

    def decide(self, sample: int, device_ms: float, now_ms: float) -> Decision:
        to_cloud = self._margins[sample] < self.threshold
        return Decision(to_cloud, "margin", float(to_cloud), self.threshold, math.nan)

    def asked(self, sample: int, query: int, size_bytes: int, now_ms: float) -> None:
        pass

    def answered(self, sample: int, query: int, now_ms: float, server_ms: float, propensity: float) -> None:
        pass

    def failed(self, query: int, now_ms: float) -> None:
        pass

    @property
    def bandwidth_mbps(self) -> float:
        return math.nan
