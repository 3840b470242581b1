"""`edgefm evaluate`: makes the material that the chosen experiments need, on every core, and measures them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...edge.config import SwitcherConfig
from ...models.device_profile import DeviceProfile
from ...models.errors import ConfigError, InputError
from ...models.foundation import load_foundation_model
from ..bench.learner import Place, every_core
from ..demo_results import describe_environment
from ..replay.stream import Stream, measure_cloud, record
from ..replay.timing import CloudProfile, Timing, student_timing
from ..traces import downlink_beside, open_trace
from . import lessons, study
from .experiment import SYSTEMS, Data, Experiment, Link, Material, Traffic, estimate, estimate_ratio, system_estimates
from .fm_stages import StageCosts
from .looks import Look, open_look, take
from .open_set import LEAST_LABELS
from .rivals import measure_stages, teach_rivals
from .students import profile_here

FORMAT = 2
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
QUICK_SIZE = Size((200,), 100, 100, 3, 600, (100,), 20)


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
    systems: tuple[str, ...] = SYSTEMS

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("an evaluation needs --data, laid out train/<label>/, val/<label>/")
        _refuse_twins("data sets", [Look(path, "clean").name for path in self.data])
        if unknown := [name for name in self.systems if name not in SYSTEMS]:
            raise ConfigError(f"there is no system {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
        if not 0 < self.target <= 1:
            raise ConfigError(f"the accuracy target is a share in (0, 1], got {self.target}")


def evaluate(
    options: EvaluateOptions,
    experiments: Sequence[Experiment],
    console: Console,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measures the experiments; returns their data as JSON, for `edgefm.deploy.evaluate.report`.

    `keep` is called after each with the result so far: one that fails or is interrupted costs itself alone.

    Raises:
        InputError, TraceError, ConfigError: bad data, traces or profiles.
    """
    began = time.perf_counter()
    links = [_link(spec) for spec in options.traces] or [Link.constant(rate) for rate in (2.0, 10.0)]
    _refuse_twins("links", [link.name for link in links])
    size = QUICK_SIZE if options.quick else FULL_SIZE
    names = {experiment.name for experiment in experiments}
    costs = _costs(options, names, size, console)
    with tempfile.TemporaryDirectory(prefix="edgefm-evaluate-") as folder, every_core(console) as each:
        material = _material(options, size, names, links, costs, Path(folder), each, console)
    measured: dict[str, Any] = {}
    result = {
        "format": FORMAT,
        "quick": options.quick,
        "student": options.student,
        "accuracy_target": options.target,
        "caution": SwitcherConfig.caution,
        "seeds": size.seeds,
        "looks": list(material.looks),
        "traffic": str(options.traffic),
        "device_ms": {"p50": costs.device.p50_ms, "p95": costs.device.p95_ms},
        "cloud": costs.cloud.model_dump(mode="json", exclude={"machine"}),
        "experiments": measured,
        "seconds": 0.0,
        "environment": describe_environment(0),
    }
    for experiment in experiments:
        started = time.perf_counter()
        with console.status(f"{experiment.name} ..."):
            data = experiment.measure(material)
        seconds = round(time.perf_counter() - started, 1)
        measured[experiment.name] = {"objective": experiment.objective(material), "data": data, "seconds": seconds}
        console.print(f"{experiment.name}: {seconds:.0f} s")
        result["seconds"] = round(time.perf_counter() - began, 1)
        keep(result)
    return result


def _refuse_twins(what: str, names: Sequence[str]) -> None:
    """Raises InputError: results are kept by name."""
    if twins := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two {what} are called {twins[0]!r}; rename one of the files")


def _link(spec: str) -> Link:
    uplink = open_trace(spec)
    name = Path(spec).name.removesuffix(".up") if spec.endswith(".up") else uplink.name
    return Link(name, uplink, open_trace(downlink_beside(spec)))


@dataclass(frozen=True)
class _Costs:
    """Of the device, the cloud, every student and the FM's pieces: given, or measured on this machine before it is busy."""

    device: Timing
    cloud: CloudProfile
    profile: DeviceProfile | None
    stages: StageCosts | None


def _costs(options: EvaluateOptions, names: set[str], size: Size, console: Console) -> _Costs:
    profile = None if options.device_profile is None else DeviceProfile.load(options.device_profile)
    cloud = None if options.cloud_profile is None else CloudProfile.load(options.cloud_profile)
    device = None if profile is None else student_timing(profile, options.student)
    if profile is not None and names & _CONTESTS:
        _fm_cost(profile)
    every_student = profile
    if profile is None and "students" in names:
        # Before all else is measured: it warns where the machine has been busy.
        every_student = profile_here(size.profiled_frames, console)
    model, stages = load_foundation_model("synclip"), None
    with console.status("Measuring student and FM on this machine ..."):
        if cloud is None or device is None:
            stream = Stream.open(options.data[0], _PROFILED_IMAGES)
            cloud = cloud or measure_cloud(stream, model, options.student)
            device = device or record(stream, model, options.student)[1]
        if names & _CONTESTS:
            place = Place.open(options.data[0], model, _PROFILED_IMAGES)
            stages = measure_stages(model, [frame.encoded for frame in place.stream[:_PROFILED_IMAGES]], place)
            if profile is not None:  # the device's figures, and not this machine's
                stages = stages.slower(_fm_cost(profile) / stages.whole_ms)
    return _Costs(device, cloud, every_student, stages)


def _fm_cost(profile: DeviceProfile) -> float:
    """ms of the embedded FM on the device. Raises ConfigError where the profile does not say."""
    cost = profile.foundation_model
    if cost is None or cost.name != "synclip":
        raise ConfigError(
            "systems that run the FM on the device need its cost there: measure the profile with 'edgefm profile --fm synclip', "
            f"or leave out the presets {' and '.join(sorted(_CONTESTS))}"
        )
    return cost.frame_p50_ms


def _material(
    options: EvaluateOptions,
    size: Size,
    names: set[str],
    links: Sequence[Link],
    costs: _Costs,
    folder: Path,
    each: Callable[..., Iterator[Any]],
    console: Console,
) -> Material:
    """`each`: see `every_core`."""
    looks = [Look(path, "clean") for path in options.data] + [Look(options.data[0], "night")]
    stream = max(size.counts) + size.evidence
    began = time.perf_counter()
    folders = each(
        take, [(look, options.student, stream, size.scoring, folder / str(i)) for i, look in enumerate(looks)]
    )
    seen = list(zip(looks, folders, strict=True))
    console.print(f"{len(looks)} looks at {stream} + {size.scoring} images: {time.perf_counter() - began:.0f} s")

    if "open-set" in names and len(open_look(*seen[0]).pool.labels) < LEAST_LABELS:
        raise InputError(
            f"open-set takes labels out of the pool and needs {LEAST_LABELS} of them in {options.data[0]}; name the other presets"
        )

    began = time.perf_counter()
    settings = study.StudySettings(options.student, size.counts, size.evidence, options.target)
    needs_study, seeds = bool(names - {"uploads", "students"}), range(size.seeds)
    ends = (seen[0], seen[-1])
    studied = each(study.study, [(seen, settings, seed) for seed in seeds] if needs_study else [])
    taught = each(teach_rivals, [(looks[0], settings, size.scoring, size.seeds)] if names & _CONTESTS else [])
    sent = each(
        lessons.upload_policies,
        [(*end, settings, size.budgets, seed) for end in ends for seed in seeds] if "uploads" in names else [],
    )
    added = each(
        lessons.added_labels,
        [(*seen[0], settings, max(size.counts), seed) for seed in seeds] if "open-set" in names else [],
    )
    material = Material(
        looks=tuple(look.name for look in looks),
        fm={look.name: study.fm_of(look, where) for look, where in seen},
        versions=[version for some in studied for version in some],
        seeds=size.seeds,
        target=options.target,
        student=options.student,
        device=costs.device,
        cloud=costs.cloud,
        links=links,
        traffic=options.traffic,
        samples=size.samples,
        profile=costs.profile,
        rivals=next(taught, ()),
        stages=costs.stages,
        systems=options.systems,
        uploads=_uploads([version for some in sent for version in some]),
        added_labels=_added(looks[0], list(added)),
    )
    console.print(f"Learning: {time.perf_counter() - began:.0f} s")
    return material


def _uploads(versions: Sequence[study.Version]) -> list[Data]:
    """A row for each look, budget and policy, over the seeds, which come in the same order for all of them."""
    cells: dict[tuple[str, int, str], list[study.Version]] = {}
    for version in versions:
        cells.setdefault((version.look, version.samples, version.method), []).append(version)
    rows = []
    for (look, budget, policy), cell in cells.items():
        beside = [v.on_edge.astype(float) - r.on_edge for v, r in zip(cell, cells[look, budget, "random"], strict=True)]
        rows.append(
            {
                "look": look,
                "policy": policy,
                "budget": budget,
                **system_estimates(cell),
                "edge_share_minus_random": estimate(beside),
            }
        )
    return rows


def _added(look: Look, results: Sequence[dict[str, np.ndarray]]) -> list[Data]:
    """Of what came out for each seed; nothing where nothing did."""
    if not results:
        return []
    theirs = np.array([result["theirs"] for result in results], float)
    row = {
        name: estimate_ratio(np.array([result[name] for result in results], float), theirs)
        for name in ("fm", "before", "after")
    }
    return [{"labels": f"every fifth label of {look.name}", **row}]
