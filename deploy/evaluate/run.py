"""`edgefm evaluate`: makes the material that the chosen experiments need, on every core, and measures them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...models.device_profile import DeviceProfile
from ...models.errors import ConfigError, InputError
from ...models.foundation import load_foundation_model
from ..bench.learner import Place, on_every_core
from ..demo_results import describe_environment
from ..replay.stream import Stream, measure_cloud, record
from ..replay.timing import CloudProfile, Timing, student_timing
from ..traces import constant_trace, downlink_beside, open_trace
from . import lessons, study
from .experiment import Data, Experiment, Link, Material, Traffic, estimate
from .fm_stages import StageCosts
from .looks import Look, take
from .rivals import measure_stages, teach_rivals
from .students import profile_here

FORMAT = 1
_PROFILED_IMAGES = 200
_CONTESTS = {"latency-accuracy", "crossover"}
"""With rivals in them."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    counts: tuple[int, ...]
    evidence: int
    scoring: int
    seeds: int
    samples: int
    budgets: tuple[int, ...]
    profiled_frames: int


FULL_SIZE = Size((100, 200, 400, 800, 1600), 1000, 500, 3, 4000, (200, 400), 60)
QUICK_SIZE = Size((100, 200), 200, 150, 3, 800, (100,), 20)


@dataclass(frozen=True)
class EvaluateOptions:
    """See `edgefm evaluate --help`. `data`: one place or two; the last look is the first place by night."""

    data: tuple[Path, ...]
    traces: tuple[str, ...]
    student: str
    target: float
    quick: bool
    traffic: Traffic
    device_profile: Path | None = None
    cloud_profile: Path | None = None

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("an evaluation needs --data, laid out train/<label>/, val/<label>/")
        names = [path.name for path in self.data]
        if len(set(names)) != len(names):
            raise InputError(f"two data sets have one name: {', '.join(names)}")
        if not 0 < self.target <= 1:
            raise ConfigError(f"the accuracy target is a share in (0, 1], got {self.target}")


def evaluate(options: EvaluateOptions, experiments: Sequence[Experiment], console: Console) -> dict[str, Any]:
    """Measures the experiments; returns their data as JSON, for `edgefm.deploy.evaluate.report`.

    Raises:
        InputError, TraceError, ConfigError: bad data, traces or profiles.
    """
    began = time.perf_counter()
    links = [_link(spec) for spec in options.traces] or [_default_link(rate) for rate in (2.0, 10.0)]
    size = QUICK_SIZE if options.quick else FULL_SIZE
    names = {experiment.name for experiment in experiments}
    device, cloud, profile = _profiles(options, "students" in names, size, console)
    stages = _stages(options, console) if names & _CONTESTS else None
    with tempfile.TemporaryDirectory(prefix="edgefm-evaluate-") as folder:
        material = _material(options, size, names, links, device, cloud, profile, stages, Path(folder), console)
    measured = {}
    for experiment in experiments:
        started = time.perf_counter()
        with console.status(f"{experiment.name} ..."):
            data = experiment.measure(material)
        seconds = round(time.perf_counter() - started, 1)
        measured[experiment.name] = {"objective": experiment.objective(material), "data": data, "seconds": seconds}
        console.print(f"{experiment.name}: {seconds:.0f} s")
    return {
        "format": FORMAT,
        "quick": options.quick,
        "student": options.student,
        "accuracy_target": options.target,
        "seeds": size.seeds,
        "looks": list(material.looks),
        "traffic": str(options.traffic),
        "device_ms": {"p50": device.p50_ms, "p95": device.p95_ms},
        "cloud": cloud.model_dump(mode="json", exclude={"machine"}),
        "experiments": measured,
        "seconds": round(time.perf_counter() - began, 1),
        "environment": describe_environment(0),
    }


def _link(spec: str) -> Link:
    uplink = open_trace(spec)
    name = Path(spec).name.removesuffix(".up") if spec.endswith(".up") else uplink.name
    return Link(name, uplink, open_trace(downlink_beside(spec)))


def _default_link(rate: float) -> Link:
    return Link(f"{rate:g} Mbit/s", constant_trace(rate), constant_trace(rate))


def _profiles(
    options: EvaluateOptions, students: bool, size: Size, console: Console
) -> tuple[Timing, CloudProfile, DeviceProfile | None]:
    """Of the device and the cloud: given, or measured on this machine before it is busy."""
    profile = None if options.device_profile is None else DeviceProfile.load(options.device_profile)
    cloud = None if options.cloud_profile is None else CloudProfile.load(options.cloud_profile)
    device = None if profile is None else student_timing(profile, options.student)
    with console.status("Measuring student and FM on this machine ..."):
        if cloud is None or device is None:
            model = load_foundation_model("synclip")
            stream = Stream.open(options.data[0], _PROFILED_IMAGES)
            cloud = cloud or measure_cloud(stream, model)
            device = device or record(stream, model, options.student)[1]
    if profile is None and students:
        profile = profile_here(size.profiled_frames, console)
    return device, cloud, profile


def _stages(options: EvaluateOptions, console: Console) -> StageCosts:
    with console.status("Measuring the FM in pieces on this machine ..."):
        model = load_foundation_model("synclip")
        place = Place.open(options.data[0], model, _PROFILED_IMAGES)
        return measure_stages(model, [frame.encoded for frame in place.stream[:_PROFILED_IMAGES]], place)


def _material(
    options: EvaluateOptions,
    size: Size,
    names: set[str],
    links: Sequence[Link],
    device: Timing,
    cloud: CloudProfile,
    profile: DeviceProfile | None,
    stages: StageCosts | None,
    folder: Path,
    console: Console,
) -> Material:
    looks = [Look(path, "clean") for path in options.data] + [Look(options.data[0], "night")]
    stream = max(size.counts) + size.evidence
    work = [(look, options.student, stream, size.scoring, folder / str(i)) for i, look in enumerate(looks)]
    began = time.perf_counter()
    folders = list(on_every_core(take, work, console))
    console.print(f"{len(looks)} looks at {stream} + {size.scoring} images: {time.perf_counter() - began:.0f} s")
    seen, settings = (
        list(zip(looks, folders, strict=True)),
        study.StudySettings(options.student, size.counts, size.evidence, options.target),
    )
    began = time.perf_counter()
    needs_study = bool(names - {"uploads", "students"})
    tasks = [(seen, settings, seed) for seed in range(size.seeds)] if needs_study else []
    versions = [version for some in on_every_core(study.study, tasks, console) for version in some]
    material = Material(
        looks=tuple(look.name for look in looks),
        fm={look.name: study.fm_of(look, where) for look, where in seen},
        versions=versions,
        seeds=size.seeds,
        target=options.target,
        student=options.student,
        device=device,
        cloud=cloud,
        links=links,
        traffic=options.traffic,
        samples=size.samples,
        profile=profile,
    )
    if names & _CONTESTS:
        work = [(looks[0], settings, size.scoring, size.seeds)]
        material = replace(material, rivals=next(iter(on_every_core(teach_rivals, work, console))), stages=stages)
    night = seen[-1]
    if "uploads" in names:
        material = replace(material, uploads=_uploads((seen[0], night), settings, size, console))
    if "open-set" in names:
        material = replace(material, added_labels=_added(seen[0], settings, size, console))
    console.print(f"Learning: {time.perf_counter() - began:.0f} s")
    return material


def _uploads(
    seen: Sequence[tuple[Look, Path]], settings: study.StudySettings, size: Size, console: Console
) -> list[Data]:
    tasks = [(*each, settings, size.budgets, seed) for each in seen for seed in range(size.seeds)]
    results = list(on_every_core(lessons.upload_policies, tasks, console))
    rows = []
    for number, (look, _) in enumerate(seen):
        seeds = results[number * size.seeds : (number + 1) * size.seeds]
        cells = [[seed[place] for seed in seeds] for place in range(len(seeds[0]))]
        drawn = {c[0]["budget"]: [r["on_edge"] for r in c] for c in cells if c[0]["policy"] == "random"}
        for cell in cells:
            on_edge = [row["on_edge"] for row in cell]
            beside = np.array(on_edge, float) - np.array(drawn[cell[0]["budget"]], float)
            rows.append(
                {
                    "look": look.name,
                    "policy": cell[0]["policy"],
                    "budget": cell[0]["budget"],
                    "edge_share": estimate(on_edge),
                    "system_minus_fm": estimate([row["gain"] for row in cell]),
                    "student_accuracy": estimate([row["student_right"] for row in cell]),
                    "edge_share_minus_random": estimate(beside),
                }
            )
    return rows


def _added(seen: tuple[Look, Path], settings: study.StudySettings, size: Size, console: Console) -> list[Data]:
    tasks = [(*seen, settings, max(size.counts), seed) for seed in range(size.seeds)]
    results = list(on_every_core(lessons.added_labels, tasks, console))
    least = min(len(result["fm"]) for result in results)
    row = {name: estimate([result[name][:least] for result in results]) for name in ("fm", "before", "after")}
    return [{"labels": f"every fifth label of {seen[0].name}", **row}]
