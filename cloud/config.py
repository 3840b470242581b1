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
        tail_from: samples from which on the tail of the backbone is trained too; below, the head alone.
        tail_samples: samples that train the tail, at most: the newest half of them, and of the older ones as many at
            random, so that an environment that returns is not forgotten.
        views: of each sample that trains the tail: the sample itself, and others as its camera might have taken it.
        epochs: passes over them.
        learning_rate: of the tail (AdamW).
        lambda_mse: weight of the MSE term beside the contrastive one.
        softness: temperature of the contrastive term, as a multiple of the FM's.
    """

    first_at: int = 100
    growth: float = 2.0
    held_out: float = 0.2
    prior_samples: float = 1500.0
    tail_from: int = 400
    tail_samples: int = 3000
    views: int = 4
    epochs: int = 4
    learning_rate: float = 3e-4
    lambda_mse: float = 10.0
    softness: float = 3.0
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
