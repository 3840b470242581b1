"""How long device and cloud take, drawn from measured distributions.

What was measured are a median and a 95th percentile. Compute times are skewed to the right; a log-normal distribution has
exactly these two quantiles for parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...models.cache import write_atomic
from ...models.device_profile import DeviceProfile
from ...models.errors import ConfigError

_Z95 = 1.6449
CLOUD_PROFILE_FORMAT = 1

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Timing:
    """Milliseconds with the given median and 95th percentile; equal ones are a constant."""

    p50_ms: float
    p95_ms: float

    def __post_init__(self) -> None:
        if not 0 < self.p50_ms <= self.p95_ms < math.inf:
            raise ConfigError(f"a timing needs 0 < p50 <= p95, got p50 {self.p50_ms} ms and p95 {self.p95_ms} ms")

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """(count,) ms"""
        return self.p50_ms * np.exp(rng.standard_normal(count) * self._sigma)

    @property
    def mean_ms(self) -> float:
        return self.p50_ms * math.exp(self._sigma**2 / 2)

    @property
    def _sigma(self) -> float:
        return math.log(self.p95_ms / self.p50_ms) / _Z95

    def slower(self, times: float) -> Timing:
        return Timing(self.p50_ms * times, self.p95_ms * times)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cost(_Frozen):
    """Median and 95th percentile."""

    p50_ms: Positive
    p95_ms: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Cost:
        if self.p50_ms > self.p95_ms:
            raise ValueError("p50_ms is above p95_ms")
        return self

    @property
    def timing(self) -> Timing:
        return Timing(self.p50_ms, self.p95_ms)


class BatchCost(Cost):
    """Of one batch: decoding, preprocessing and the FM."""

    size: Annotated[int, Field(ge=1)]


class CloudProfile(_Frozen):
    """What the FM costs in the cloud; measured by `edgefm replay --cloud-profile-to`, or written by hand for another machine.

    Attributes:
        source: who says so, and when.
        batches: of ascending size; in between, times are interpolated, and beyond the last they grow as to it.
        call: of a query beside link, queue and batch: messages, gRPC and threads of both sides. None: nothing.
    """

    format: Annotated[int, Field(ge=CLOUD_PROFILE_FORMAT, le=CLOUD_PROFILE_FORMAT)] = CLOUD_PROFILE_FORMAT
    source: Annotated[str, Field(min_length=1)]
    foundation_model: Annotated[str, Field(min_length=1)]
    batches: Annotated[tuple[BatchCost, ...], Field(min_length=1)]
    call: Cost | None = None
    machine: dict[str, object] = {}

    @model_validator(mode="after")
    def _ascending(self) -> CloudProfile:
        sizes = [batch.size for batch in self.batches]
        if sizes != sorted(set(sizes)):
            raise ValueError(f"the batches must be of ascending size, got {sizes}")
        return self

    def timing(self, size: int) -> Timing:
        """Of a batch of that size."""
        sizes = [batch.size for batch in self.batches]
        p50, p95 = (np.array([getattr(batch, name) for batch in self.batches]) for name in ("p50_ms", "p95_ms"))
        scale = max(size / sizes[-1], 1.0)
        return Timing(float(np.interp(size, sizes, p50)) * scale, float(np.interp(size, sizes, p95)) * scale)

    def save(self, path: Path) -> None:
        """Raises `StoreError` when the disk refuses."""
        write_atomic(path, (self.model_dump_json(indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> CloudProfile:
        """Raises `ConfigError`: there is no such file, or it is no cloud profile."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read the cloud profile {path}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "file"
            raise ConfigError(f"{path} is no cloud profile: {where}: {first['msg']}") from None


def student_timing(profile: DeviceProfile, student: str) -> Timing:
    """Of a frame on that device, with the number of threads that is fastest there.

    Raises:
        ConfigError: the profile does not have this student.
    """
    costs = [cost for cost in profile.students if cost.student == student]
    if not costs:
        there = ", ".join(sorted({cost.student for cost in profile.students}))
        raise ConfigError(f"the profile of {profile.device} has no {student}; it has {there}")
    best = min(costs, key=lambda cost: cost.session_p50_ms)
    return Timing(best.preprocess_ms + best.session_p50_ms, best.preprocess_ms + best.session_p95_ms)
