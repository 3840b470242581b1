"""Settings of the cloud service."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..models.checks import require_finite
from ..models.errors import ConfigError
from ..models.students import DEFAULT_STUDENT
from ..proto.limits import DEFAULT_PORT, MAX_PORT


@dataclass(frozen=True)
class CustomizationConfig:
    """When and how a student learns (design: Customization; EdgeFM, section 4).

    Attributes:
        first_at: samples labelled by the FM that start the first run.
        growth: the next run starts at this multiple of the samples of the last one: 100, 200, 400, ...
        held_out: share of the samples that no version ever trains on: the gate and the calibration use them.
        weight_cap: a sample that was sent by chance (an audit) counts for the samples like it that were not, but at most for
            this many.
        prior_samples: weight of version 0 against the samples, in samples of average feature energy.
        tail_from: samples from which on the tail of the backbone is trained too; below, the head alone.
        tail_samples: samples that train the tail, at most: the newest half of them, and of the older ones as many at
            random, so that an environment that returns is not forgotten.
        views: of each sample that trains the tail: the sample itself, and others as its camera might have taken it.
        epochs: passes over them.
        learning_rate: of the tail (AdamW).
        lambda_mse: weight of the MSE term beside the contrastive one.
        softness: temperature of the contrastive term, as a multiple of the FM's.
        int8_may_cost: a quantised version is published where its agreement with the FM, on the held-out samples and
            weighted, is at most this much lower.
    """

    first_at: int = 100
    growth: float = 2.0
    held_out: float = 0.2
    weight_cap: float = 5.0
    prior_samples: float = 1500.0
    tail_from: int = 400
    tail_samples: int = 3000
    views: int = 4
    epochs: int = 4
    learning_rate: float = 3e-4
    lambda_mse: float = 10.0
    softness: float = 3.0
    int8_may_cost: float = 0.01
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        require_finite(self)
        for name in ("first_at", "tail_from", "tail_samples", "views", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"customization: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "softness"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"customization: {name} must be above 0, got {getattr(self, name)}")
        for name in ("prior_samples", "lambda_mse", "int8_may_cost", "seed", "threads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"customization: {name} must not be negative, got {getattr(self, name)}")
        if self.growth <= 1:
            raise ConfigError(f"customization: growth must be above 1, got {self.growth}; runs would never end")
        if self.weight_cap < 1:
            raise ConfigError(f"customization: weight_cap must be at least 1, got {self.weight_cap}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"customization: held_out is a share between 0 and 1, got {self.held_out}; it judges")


@dataclass(frozen=True)
class DriftConfig:
    """When an environment counts as changed (`edgefm.cloud.drift`).

    Attributes:
        baseline: samples, answered by student and FM both, that a new version is compared with later; and
        window: those of one look at the margins; for the margins both go on until they are worth `effective` equally
            weighted samples.
        tolerance: rise of disagreement at equal margins that is not worth an alarm.
        average_run: samples to a false alarm of the agreement test, on average, at least.
        margin_level: chance that a version ever raises a false alarm of the margin test.
        least_shift: Kolmogorov-Smirnov distance of the margins below which no alarm is raised.
        recent: samples of the agreement that is reported.
    """

    baseline: int = 300
    window: int = 200
    effective: float = 60.0
    tolerance: float = 0.03
    average_run: float = 10_000.0
    margin_level: float = 0.01
    least_shift: float = 0.15
    recent: int = 500

    def __post_init__(self) -> None:
        require_finite(self)
        if min(self.baseline, self.window, self.recent) < 20:
            raise ConfigError("drift: baseline, window and recent must be at least 20")
        if not 0 < self.margin_level < 1 or not 0 < self.average_run < 1e15 or not 0 < self.effective < 1e6:
            raise ConfigError(
                "drift: margin_level is a probability in (0, 1), average_run in (0, 1e15), effective in (0, 1e6)"
            )
        if not 0 <= self.tolerance < 1 or not 0 <= self.least_shift <= 1:
            raise ConfigError(
                f"drift: tolerance is in [0, 1) and least_shift in [0, 1], got {self.tolerance}, {self.least_shift}"
            )


@dataclass(frozen=True)
class LanguageConfig:
    """The cloud's language model (`edgefm.cloud.language`).

    Attributes:
        model: a GGUF file, or a folder of transformers' files; None runs none.
        precision: of weights and activations; `quantised` keeps weights in blocks of few bits.
        policy: how requests share the model: `continuous`, `sequence` (scheduling by predicted length) or `static` batches.
        lengths: expected lengths of answers are `learned` from earlier ones, or the model is `asked` before each.
        places: answers in the making at once, at most.
        cache_tokens: tokens whose keys and values are held for them together, at most.
        max_tokens: of one answer, at most.
        max_queue: requests that wait for a place, at most.
        rank_weight: of the model's own opinion in a ranking, against the FM's log-probability; 0 does without.
            SmolLM2's was of no use (`edgefm bench ranking`); a larger model's may be.
    """

    model: Path | None = None
    precision: Literal["float32", "bfloat16", "quantised"] = "quantised"
    policy: Literal["continuous", "sequence", "static"] = "continuous"
    lengths: Literal["learned", "asked"] = "learned"
    places: int = 8
    cache_tokens: int = 16_384
    max_tokens: int = 1024
    max_queue: int = 256
    rank_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.rank_weight < math.inf:
            raise ConfigError(f"language: rank_weight must be 0 or more, got {self.rank_weight}")
        # A label's description is four requests of 48 tokens at once.
        for name, least in (("places", 1), ("cache_tokens", 1024), ("max_tokens", 64), ("max_queue", 8)):
            if getattr(self, name) < least:
                raise ConfigError(f"language: {name} must be at least {least}, got {getattr(self, name)}")
        for name, known in (
            ("precision", ("float32", "bfloat16", "quantised")),
            ("policy", ("continuous", "sequence", "static")),
            ("lengths", ("learned", "asked")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"language: {name} is one of {', '.join(known)}, got {getattr(self, name)!r}")


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
        max_delay_ms: how long a sample waits for its batch to fill, at most; not at all after a batch of one.
        max_queue: samples that wait for the FM, at most; past it devices are told to come again later.
        store_bytes: quota of the stored images and embeddings; 0: none. What goes first: `edgefm.cloud.store`.
        retention_days: older samples are removed; 0: never.
        health_period_s: how often the store is written to and a failed FM asked again.
        metrics_port: serves Prometheus metrics at /metrics; 0 takes a free one, None serves none.
        metrics_host: loopback unless told otherwise.
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
    max_queue: int = 1024
    store_bytes: int = 0
    retention_days: float = 0.0
    health_period_s: float = 2.0
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    customization: CustomizationConfig = field(default_factory=CustomizationConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)

    def __post_init__(self) -> None:
        require_finite(self)
        if self.max_batch < 1 or self.max_queue < self.max_batch:
            raise ConfigError(
                f"max_batch must be at least 1 and max_queue at least max_batch, got {self.max_batch}, {self.max_queue}"
            )
        if not 0.01 <= self.health_period_s <= 3600:
            raise ConfigError(f"health_period_s is between 0.01 and 3600, got {self.health_period_s}")
        if min(self.store_bytes, self.retention_days, self.max_delay_ms) < 0:
            raise ConfigError("store_bytes, retention_days and max_delay_ms must not be negative")
        for name, port in (("port", self.port), ("metrics_port", self.metrics_port)):
            if port is not None and not 0 <= port <= MAX_PORT:
                raise ConfigError(f"{name} is between 0 and {MAX_PORT}, got {port}")
