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
FRAMING_BYTES = 136
"""Of a query beside its image: message, HTTP/2 and gRPC framing; measured on real connections."""


class System(Protocol):
    """A system under replay. Samples are rows of its recording; times are in virtual ms.

    `edge_right`, `cloud_right`: (N,) bool, whether the device's answer and the cloud's name the label; final after the run.
    """

    @property
    def edge_right(self) -> np.ndarray: ...

    @property
    def cloud_right(self) -> np.ndarray: ...

    def begin(self, sample: int, now_ms: float) -> float:
        """The device takes a sample; returns how long it computes before it decides, in ms."""
        ...

    def decide(self, sample: int, device_ms: float, now_ms: float) -> Decision: ...

    def ask(self, sample: int, query: int, now_ms: float) -> tuple[int, float]:
        """The device sends a query; returns its bytes, and the share of the FM's computation left to the cloud."""
        ...

    def answered(self, sample: int, query: int, now_ms: float, server_ms: float, propensity: float) -> None: ...

    def failed(self, query: int, now_ms: float) -> None:
        """The query met its deadline."""
        ...

    @property
    def bandwidth_mbps(self) -> float: ...


class EdgeFM:
    """The product: student, then the router of `edgefm.edge`."""

    def __init__(self, recording: Recording, device_ms: np.ndarray, router: Router) -> None:
        self.router = router
        self.edge_right, self.cloud_right = recording.edge_right, recording.cloud_right
        self._device_ms = device_ms.tolist()
        self._size_bytes = recording.size_bytes.tolist()
        self._margins = recording.margins.tolist()
        self._agreements = recording.agreements.tolist()

    def begin(self, sample: int, now_ms: float) -> float:
        return self._device_ms[sample]

    def decide(self, sample: int, device_ms: float, now_ms: float) -> Decision:
        return self.router.decide(self._margins[sample], device_ms, now_ms)

    def ask(self, sample: int, query: int, now_ms: float) -> tuple[int, float]:
        size_bytes = self._size_bytes[sample]
        self.router.asked(query, size_bytes, now_ms)
        return size_bytes, 1.0

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


class Heedless:
    """What systems share that take no notice of the link."""

    def answered(self, sample: int, query: int, now_ms: float, server_ms: float, propensity: float) -> None:
        pass

    def failed(self, query: int, now_ms: float) -> None:
        pass

    @property
    def bandwidth_mbps(self) -> float:
        return math.nan


class Fixed(Heedless):
    """Answers on the edge from a threshold on that never moves: 0 is edge-only, infinity cloud-only.

    Cloud-only devices have no student to wait for: give them `device_ms` of 0 and what encodes and sends alone costs.
    """

    def __init__(self, recording: Recording, device_ms: np.ndarray, threshold: float) -> None:
        self.threshold = threshold
        self.edge_right, self.cloud_right = recording.edge_right, recording.cloud_right
        self._device_ms = device_ms.tolist()
        self._size_bytes = recording.size_bytes.tolist()
        self._margins = recording.margins.tolist()

    def begin(self, sample: int, now_ms: float) -> float:
        return self._device_ms[sample]

    def decide(self, sample: int, device_ms: float, now_ms: float) -> Decision:
        to_cloud = self._margins[sample] < self.threshold
        return Decision(to_cloud, "margin", float(to_cloud), self.threshold, math.nan)

    def ask(self, sample: int, query: int, now_ms: float) -> tuple[int, float]:
        return self._size_bytes[sample], 1.0
