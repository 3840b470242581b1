"""The table of students. No torch here: the device reads it too; building and exporting is `student_graph`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    from .images import Preprocess

DEFAULT_STUDENT = "lite0-128"
INT8_SUFFIX = "-int8"


@dataclass(frozen=True)
class StudentProfile:
    """One student architecture at one input size.

    Attributes:
        parameters_m, macs_m: millions, of the backbone without its classifier (the head adds D x feature_dim).
        int8: its versions are quantised, where the gate finds that it costs at most a point of agreement. Version 0 is not:
            there are no samples yet to calibrate and to judge it on.
    """

    name: str
    backbone: str
    input_size: int
    feature_dim: int
    parameters_m: float
    macs_m: float
    int8: bool = False

    @property
    def preprocess(self) -> Preprocess:
        from .images import Preprocess  # numpy and Pillow: the command line reads this table at every start

        return Preprocess(self.input_size)


_FLOAT = (
    StudentProfile("lite0-64", "tf_efficientnet_lite0", 64, 1280, 3.37, 31),
    StudentProfile("lite0-96", "tf_efficientnet_lite0", 96, 1280, 3.37, 71),
    StudentProfile("lite0-128", "tf_efficientnet_lite0", 128, 1280, 3.37, 125),
    StudentProfile("lite0-160", "tf_efficientnet_lite0", 160, 1280, 3.37, 196),
)
PROFILES: dict[str, StudentProfile] = {
    profile.name: profile
    for float_profile in _FLOAT
    for profile in (float_profile, replace(float_profile, name=f"{float_profile.name}{INT8_SUFFIX}", int8=True))
}


def student_profile(name: str) -> StudentProfile:
    """Looks a profile up; raises `ConfigError` naming the ones there are."""
    try:
        return PROFILES[name]
    except KeyError:
        raise ConfigError(f"unknown student {name!r}; choose one of {', '.join(PROFILES)}") from None


@dataclass(frozen=True)
class MeasuredAccuracy:
    """A student's accuracy on one data set, against ground truth: of version 0, and customized by the FM's labels."""

    data: str
    version0: float
    customized: float


@cache
def measured_accuracy(name: str) -> tuple[MeasuredAccuracy, ...]:
    """What `edgefm bench students --json` found, one for each data set; the files beside this module are its results.
    Empty for a student that was never measured."""
    results = [json.loads(path.read_bytes()) for path in sorted(Path(__file__).parent.glob("students-*.json"))]
    return tuple(
        MeasuredAccuracy(result["data"], row["version0_accuracy"], row["accuracy"])
        for result in results
        for row in result["students"]
        if row["student"] == name
    )
