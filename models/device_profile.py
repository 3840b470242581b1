"""What students cost on one device: measured there by `edgefm profile`, or written by hand for another device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .cache import write_atomic
from .errors import ConfigError
from .students import PROFILES

DEVICE_PROFILE_FORMAT = 1

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StudentCost(_Frozen):
    """One student at one number of threads, one frame at a time.

    Attributes:
        threads: of ONNX Runtime, within the operator.
        preprocess_ms: from pixels to the student's input, median.
        session_p50_ms, session_p95_ms: the student itself.
        peak_rss_mb: most memory that a process with the agent's libraries and this student took, in 10^6 bytes.
        load_ms: reading the graph and preparing it.
    """

    student: str
    threads: Annotated[int, Field(ge=1)]
    preprocess_ms: Positive
    session_p50_ms: Positive
    session_p95_ms: Positive
    peak_rss_mb: Positive
    load_ms: Positive | None = None

    @field_validator("student")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in PROFILES:
            raise ValueError(f"there is no such student; there are {', '.join(PROFILES)}")
        return name

    @property
    def frame_ms(self) -> float:
        """What a decoded frame takes on the device, at the 95th percentile."""
        return self.preprocess_ms + self.session_p95_ms


class FoundationModelCost(_Frozen):
    """A foundation model on the device itself, one decoded frame at a time, preprocessing included; memory in 10^6 bytes."""

    name: Annotated[str, Field(min_length=1)]
    frame_p50_ms: Positive
    frame_p95_ms: Positive
    peak_rss_mb: Positive


class Limits(_Frozen):
    """What the device may spend. None: no limit.

    Attributes:
        latency_ms: for one decoded frame, at the 95th percentile: preprocessing and student.
        memory_mb: for the agent's process, in 10^6 bytes.
    """

    latency_ms: Positive | None = None
    memory_mb: Positive | None = None

    def __str__(self) -> str:
        latency = "any latency" if self.latency_ms is None else f"{self.latency_ms:g} ms a frame"
        return f"{latency}, " + ("any memory" if self.memory_mb is None else f"{self.memory_mb:g} MB")

    def keep(self, latency_ms: float, memory_mb: float) -> bool:
        """Whether something of that latency and memory keeps them."""
        return latency_ms <= (self.latency_ms or math.inf) and memory_mb <= (self.memory_mb or math.inf)


class DeviceProfile(_Frozen):
    """A device.

    Attributes:
        source: who says so: `edgefm profile` and when, or what the figures of a hand-written file were taken from.
        device: a name for people.
        foundation_model: where `edgefm profile --fm` measured one.
        machine: what `edgefm profile` found: processor, cores, memory, versions, temperature; free in a hand-written file.
    """

    format: int = DEVICE_PROFILE_FORMAT
    source: Annotated[str, Field(min_length=1)]
    device: Annotated[str, Field(min_length=1)]
    students: Annotated[list[StudentCost], Field(min_length=1)]
    foundation_model: FoundationModelCost | None = None
    limits: Limits = Limits()
    machine: dict[str, Any] = {}

    @field_validator("format")
    @classmethod
    def _readable(cls, number: int) -> int:
        if number != DEVICE_PROFILE_FORMAT:
            raise ValueError(f"this EdgeFM reads format {DEVICE_PROFILE_FORMAT}")
        return number

    def save(self, path: Path) -> None:
        """Raises `StoreError` when the disk refuses."""
        write_atomic(path, (self.model_dump_json(indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> DeviceProfile:
        """Raises `ConfigError`: there is no such file, or it is no device profile."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read the device profile {path}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "file"
            raise ConfigError(f"{path} is no device profile: {where}: {first['msg']}") from None
