"""The table of students. No torch here: the device reads it too; building and exporting is `student_graph`."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError
from .images import Preprocess

DEFAULT_STUDENT = "lite0-128"


@dataclass(frozen=True)
class StudentProfile:
    """One student architecture at one input size.

    Attributes:
        parameters_m, macs_m: millions, of the backbone without its classifier (the head adds D x feature_dim).
    """

    name: str
    backbone: str
    input_size: int
    feature_dim: int
    parameters_m: float
    macs_m: float

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess(self.input_size)


PROFILES: dict[str, StudentProfile] = {
    profile.name: profile
    for profile in (
        StudentProfile("lite0-64", "tf_efficientnet_lite0", 64, 1280, 3.37, 31),
        StudentProfile("lite0-96", "tf_efficientnet_lite0", 96, 1280, 3.37, 71),
        StudentProfile("lite0-128", "tf_efficientnet_lite0", 128, 1280, 3.37, 125),
        StudentProfile("lite0-160", "tf_efficientnet_lite0", 160, 1280, 3.37, 196),
    )
}


def student_profile(name: str) -> StudentProfile:
    """Looks a profile up; raises `ConfigError` naming the ones there are."""
    try:
        return PROFILES[name]
    except KeyError:
        raise ConfigError(f"unknown student {name!r}; choose one of {', '.join(PROFILES)}") from None
