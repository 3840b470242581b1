"""What an experiment is: a measurement that gives plain data, and a way to show that data. Reports need the data alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ...models.device_profile import DeviceProfile
from ...models.errors import ConfigError
from ..bench.bootstrap import interval
from ..replay.timing import CloudProfile, Timing
from ..traces import Trace, constant_trace
from .fm_stages import StageCosts
from .rivals import Rival
from .study import LookAtFM, Version

Data = Mapping[str, Any]
SYSTEMS = (
    "edgefm",
    "cloud-only",
    "edge-only",
    "spinn",
    "persephonee",
    "FM on the device",
    "fixed-threshold",
    "oracle-threshold",
)


@dataclass(frozen=True)
class Link:
    """A pair of traces."""

    name: str
    uplink: Trace
    downlink: Trace

    @classmethod
    def constant(cls, mbit_per_s: float) -> Link:
        """As fast in both directions."""
        return cls(f"{mbit_per_s:g} Mbit/s", constant_trace(mbit_per_s), constant_trace(mbit_per_s))


@dataclass(frozen=True)
class Traffic:
    """What devices send: stated on every figure. `propagation_ms` is one way."""

    rate: float = 2.0
    payload_bytes: int = 20_000
    propagation_ms: float = 25.0
    deadline_ms: float = 1000.0

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf or self.payload_bytes < 1 or not 0 <= self.propagation_ms < math.inf:
            raise ConfigError(
                f"traffic needs a positive rate, a payload of a byte at least, and a propagation that is not negative; got "
                f"{self.rate:g} samples/s, {self.payload_bytes} bytes, {self.propagation_ms:g} ms"
            )

    def __str__(self) -> str:
        return (
            f"{self.rate:g} samples/s, {self.payload_bytes / 1000:g} kB each, round trip {2 * self.propagation_ms:g} ms"
        )


@dataclass(frozen=True)
class Material:
    """What experiments are made of; small, whatever it took to make.

    Attributes:
        looks: names, in the order in which the device met them.
        fm: by look.
        versions: of all looks, seeds and methods.
        device: what the student takes here.
        samples: replayed for each system, trace and seed.
        added_labels, uploads: see `edgefm.deploy.evaluate.lessons`.
        profile: of this device, for the students.
        rivals: by seed, on the first look; `stages` is what the FM's pieces cost on the device.
        systems: those compared, of `SYSTEMS`.
    """

    looks: tuple[str, ...]
    fm: Mapping[str, LookAtFM]
    versions: Sequence[Version]
    seeds: int
    target: float
    student: str
    device: Timing
    cloud: CloudProfile
    links: Sequence[Link]
    traffic: Traffic
    samples: int
    added_labels: Sequence[Data] = ()
    uploads: Sequence[Data] = ()
    profile: DeviceProfile | None = None
    rivals: Sequence[Rival] = ()
    stages: StageCosts | None = None
    systems: tuple[str, ...] = SYSTEMS

    def version(self, look: str, seed: int, method: str, samples: int | None = None) -> Version:
        """That version; without `samples` the one that has learned most."""
        fitting = [
            v
            for v in self.versions
            if (v.look, v.seed, v.method) == (look, seed, method) and samples in (None, v.samples)
        ]
        return max(fitting, key=lambda version: version.samples)


@dataclass(frozen=True)
class Table:
    """Cells are text; the first column is a heading."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Chart:
    """`name` is made of letters, digits and dashes, and distinct within a report."""

    name: str
    caption: str
    draw: Callable[[Figure], None]
    height_in: float = 3.6


@dataclass(frozen=True)
class Shown:
    """`findings`: what came out, in sentences made from the figures."""

    findings: Sequence[str]
    tables: Sequence[Table]
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Experiment:
    """A preset.

    Attributes:
        objective: which the switcher followed, and under what traffic: printed with it.
        measure: JSON data from material.
        show: what a report prints of that data.
    """

    name: str
    title: str
    objective: Callable[[Material], str]
    measure: Callable[[Material], dict[str, Any]]
    show: Callable[[Data], Shown]


def estimate(values: Sequence[np.ndarray] | np.ndarray) -> dict[str, Any]:
    """Mean over (seeds, images), with its 95 % bootstrap interval over both."""
    stacked = np.asarray(values, float)
    return {"mean": round(float(stacked.mean()), 5), "interval": interval(stacked)}


def estimate_ratio(values: np.ndarray, beside: np.ndarray) -> dict[str, Any]:
    """Of the means of two (seeds, images) arrays, drawn together for the interval."""
    return {"mean": round(float(values.mean() / beside.mean()), 4), "interval": interval(values, beside)}


def system_estimates(versions: Sequence[Version]) -> dict[str, Any]:
    """Of a version of each seed, on the scoring images of one look."""
    return {
        "edge_share": estimate([v.on_edge for v in versions]),
        "system_accuracy": estimate([v.system_right for v in versions]),
        "fm_accuracy": estimate([v.recording.cloud_right for v in versions]),
        "student_accuracy": estimate([v.recording.edge_right for v in versions]),
        "system_minus_fm": estimate([v.system_right.astype(float) - v.recording.cloud_right for v in versions]),
    }


def told(value: Data, factor: float = 1.0, digits: int = 3, sign: bool = False) -> str:
    """An estimate as text: mean and interval, none of them -0."""
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    mean, low, high = (
        form.format(round(factor * number, digits) + 0.0) for number in (value["mean"], *value["interval"])
    )
    return f"{mean} [{low}, {high}]"
