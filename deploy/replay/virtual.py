"""A replay of the product in virtual time."""

from __future__ import annotations

import numpy as np

from ...models.versions import Calibration
from ..timeline import ROUTES
from .arrivals import fixed_rate
from .engine import Engine, Network, Replayed
from .recording import Recording
from .settings import Outcome, ReplaySettings
from .systems import System, edgefm
from .timing import CloudProfile, Timing
from .virtual_cloud import VirtualCloud
from .virtual_link import VirtualLink


def run_virtual(
    recording: Recording,
    device: Timing,
    cloud: CloudProfile,
    settings: ReplaySettings,
    arrivals_ms: np.ndarray | None = None,
    begin_ms: float = 0.0,
) -> tuple[Replayed, System]:
    """Replays `settings.samples` of the recording, from its begin again when it ends.

    Args:
        arrivals_ms: (samples,) instead of the settings' even rate.
        begin_ms: where on the traces the first frame comes.
    """
    rng = np.random.default_rng([settings.seed, 0])
    stream = recording.repeated(settings.samples)
    if settings.payload_bytes is not None:
        stream = stream.with_payload(settings.payload_bytes)
    if arrivals_ms is None:
        arrivals_ms = fixed_rate(settings.samples, settings.rate)
    network = Network(
        VirtualLink(settings.uplink, begin_ms), VirtualLink(settings.downlink, begin_ms), settings.propagation_ms
    )
    engine = Engine(network, VirtualCloud(cloud, settings.seed), settings.deadline_ms)
    device_ms = device.draw(rng, len(stream))
    system = edgefm(stream, device_ms, settings.switcher, settings.deadline_ms, Calibration())
    return engine.run(system, arrivals_ms), system


def outcome_of(replayed: Replayed) -> Outcome:
    return Outcome.of(replayed.total_ms, [ROUTES[route] for route in replayed.route])
