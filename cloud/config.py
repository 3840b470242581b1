"""Settings of the cloud service."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..models.checks import require_finite
from ..models.students import DEFAULT_STUDENT
from ..proto.limits import DEFAULT_PORT


@dataclass(frozen=True)
class CustomizationConfig:
    """When and how a student learns (design: Customization; EdgeFM, section 4).

    Attributes:
        first_at: samples labelled by the FM that start the first run.
        growth: the next run starts at this multiple of the samples of the last one: 100, 200, 400, ...
        held_out: share of the samples, chosen by their hash, that no version ever trains on: the gate and the
            calibration use them.
        prior_samples: weight of version 0 against the samples, in samples of average feature energy.
        lambda_mse: weight of the MSE term beside the contrastive one.
        tau: temperature of the contrastive term.
        epochs: passes of the contrastive refinement; 0 leaves it out.
        learning_rate: of the contrastive refinement (Adam).
    """

    first_at: int = 100
    growth: float = 2.0
    held_out: float = 0.2
    prior_samples: float = 1500.0
    lambda_mse: float = 10.0
    tau: float = 0.1
    epochs: int = 8
    learning_rate: float = 3e-5
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        require_finite(self)


@dataclass(frozen=True)
class CloudConfig:
    """One cloud service.

    Attributes:
        data_dir: holds the sample store and the registry.
        foundation_model: URI, see `edgefm.models.foundation`.
        host: loopback unless told otherwise: there is no transport security yet.
        port: 0 takes a free one.
        port_file: where the port is written once the service answers.
        labels: the base pool that new environments start from.
        student: profile of devices that ask for none.
        max_batch: samples the FM sees at once, at most.
        max_delay_ms: how long a sample waits for its batch to fill, at most.
    """

    data_dir: Path = Path("edgefm-cloud")
    foundation_model: str = "synclip"
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    port_file: Path | None = None
    labels: tuple[str, ...] = ()
    student: str = DEFAULT_STUDENT
    max_batch: int = 16
    max_delay_ms: float = 5.0
    customization: CustomizationConfig = field(default_factory=CustomizationConfig)

    def __post_init__(self) -> None:
        require_finite(self)
