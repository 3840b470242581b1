"""Settings of the edge agent."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from ..models.checks import check_device_id, check_environment_name, check_target, require_finite
from ..models.errors import ConfigError, InputError
from ..proto.limits import DEFAULT_PORT

LEAST_MARGINS = 50
"""Of the running version, that a threshold can be chosen among."""

Objective = Literal["accuracy_target", "latency_bound"]


@dataclass(frozen=True)
class SwitcherConfig:
    """How the switcher decides (EdgeFM, section 5; design: Switching).

    Attributes:
        objective: `accuracy_target` takes the smallest cloud use whose estimated graded agreement with the FM
            (`edgefm.models.confidence`) reaches `accuracy_target`: 0.99 lets the answers be one point less accurate than
            the FM's; `latency_bound` the largest threshold whose predicted mean latency keeps `latency_bound_ms`.
        caution: standard errors that are taken off the estimated agreement before it is set against `accuracy_target`; 0
            takes the estimate as it is: more is answered on the edge, and the target is missed more often than kept.
        audit_share: share of the samples the edge would answer that go to the FM all the same, at random.
        window: margins and pieces of evidence remembered.
        min_evidence: with fewer, agreement counts as not estimable and samples go to the cloud; a new version's
            calibration stands for half of it.
        rebuild_every: samples after which the table is rebuilt at the latest.
        latency_form: `charged` counts the student for every sample; `paper` only for those answered on the edge.
    """

    objective: Objective = "accuracy_target"
    accuracy_target: float = 0.99
    caution: float = 1.0
    latency_bound_ms: float = 200.0
    audit_share: float = 0.02
    window: int = 1000
    min_evidence: int = 150
    rebuild_every: int = 20
    latency_form: Literal["charged", "paper"] = "charged"
    seed: int = 0

    def __post_init__(self) -> None:
        require_finite(self)
        if self.objective not in get_args(Objective):
            raise ConfigError(f"the objective is {' or '.join(get_args(Objective))}, got {self.objective!r}")
        if not 0 < self.accuracy_target <= 1:
            raise ConfigError(f"accuracy_target is a share in (0, 1], got {self.accuracy_target}")
        if self.caution < 0:
            raise ConfigError(f"caution is a number of standard errors, 0 or more, got {self.caution}")
        if not 0 <= self.audit_share <= 1:
            raise ConfigError(f"audit_share is a share in [0, 1], got {self.audit_share}")
        if self.latency_bound_ms <= 0:
            raise ConfigError(f"latency_bound_ms must be positive, got {self.latency_bound_ms}")
        if min(self.window, self.min_evidence, self.rebuild_every) < 1:
            raise ConfigError("window, min_evidence and rebuild_every must be at least 1")
        if self.window < LEAST_MARGINS or self.min_evidence > 2 * self.window:
            raise ConfigError(
                f"window must be at least {LEAST_MARGINS} and half of min_evidence, or agreement is never estimable and "
                f"every sample goes to the cloud; got window {self.window} and min_evidence {self.min_evidence}"
            )


@dataclass(frozen=True)
class AgentConfig:
    """One agent.

    Attributes:
        cloud: host:port of the cloud service.
        environment: where the device stands; letters, digits, dots, dashes, underscores.
        labels: first labels of the environment, if the cloud does not know it yet.
        device_id: distinguishes devices of one environment; empty: one made once and kept in `state_dir`.
        state_dir: holds the last good student and pool, partial downloads, and the samples that wait for upload.
        student: profile asked for when the environment is new; empty takes the cloud's default; `auto` the most
            accurate one that fits `device_profile` (and then `threads` is the profile's too).
        device_profile: JSON file of this device, see `edgefm.models.device_profile`.
        deadline_ms: a cloud query's one deadline; past it the edge's own answer is given.
        connect_timeout_s: how long registration may take before the agent starts from its state_dir; an agent with nothing
            there waits longer for a cloud that is there.
        fps: frames taken from the source per second; 0 takes them as fast as they are answered.
        max_pending: cloud queries on their way at once, at most.
        threads: of the student; 0 takes all cores.
        upload: what may leave the device beside queries: nothing (`never`), samples that wanted the FM and did not get its
            answer (`uncertain`), or those the edge answered too (`all`).
        spool_bytes: of images that wait for upload, at most; past it the most certain is dropped.
        retention_days: what has waited longer is deleted.
        upload_bytes_per_day: of images uploaded on one UTC day, at most; queries do not count. 0: no cap.
        slower_than: a new student that takes more than this multiple of the time of the running one of the same profile is
            refused.
    """

    cloud: str = f"127.0.0.1:{DEFAULT_PORT}"
    environment: str = "default"
    labels: tuple[str, ...] = ()
    device_id: str = ""
    state_dir: Path = Path("edgefm-agent")
    student: str = ""
    device_profile: Path | None = None
    deadline_ms: float = 1000.0
    connect_timeout_s: float = 20.0
    fps: float = 0.0
    max_pending: int = 32
    threads: int = 0
    upload: Literal["never", "uncertain", "all"] = "uncertain"
    spool_bytes: int = 64 * 1024 * 1024
    retention_days: float = 30.0
    upload_bytes_per_day: int = 0
    slower_than: float = 1.5
    switcher: SwitcherConfig = field(default_factory=SwitcherConfig)

    def __post_init__(self) -> None:
        require_finite(self)
        try:
            check_environment_name(self.environment)
            check_device_id(self.device_id)
        except InputError as error:
            raise ConfigError(str(error)) from None
        check_target(self.cloud)
        if self.deadline_ms <= 0 or self.connect_timeout_s <= 0:
            raise ConfigError("deadline_ms and connect_timeout_s must be positive")
        if self.fps < 0 or self.max_pending < 1:
            raise ConfigError("fps must not be negative; max_pending must be at least 1")
        if self.spool_bytes < 1 or self.retention_days <= 0 or self.upload_bytes_per_day < 0:
            raise ConfigError(
                "spool_bytes and retention_days must be positive, upload_bytes_per_day must not be negative; got "
                f"{self.spool_bytes}, {self.retention_days} and {self.upload_bytes_per_day}"
            )
        if self.slower_than <= 1:
            raise ConfigError(f"slower_than is a multiple above 1, got {self.slower_than}")
