"""From what the demo recorded to its result: the JSON that `edgefm.deploy.report` documents."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..cloud.registry import Registry
from .demo_data import DemoEnvironment
from .demo_label import AddedLabel
from .demo_scoring import StudentScores, accuracy, ask_fm, score_student
from .timeline import ROUTES

Record = dict[str, Any]


@dataclass(frozen=True)
class EnvironmentRun:
    """What one agent did in one environment.

    Attributes:
        summary: the agent's own, see `edgefm.edge.agent.Summary`.
        alarms: drift alarms that the cloud raised meanwhile: `kind`, `time_s` since the run began, `agreement` with the FM
            since the evidence began, and `baseline`, what it was when the version was new.
        added_label: that was held back at first.
    """

    environment: DemoEnvironment
    records: list[Record]
    summary: dict[str, Any]
    alarms: list[dict[str, Any]]
    added_label: AddedLabel | None


def assemble(
    runs: Sequence[EnvironmentRun],
    registry: Registry,
    cloud: str,
    *,
    objective: Mapping[str, Any],
    link: Mapping[str, Any],
    traffic: tuple[int, int],
    settings: str,
    seed: int,
) -> tuple[dict[str, Any], list[Record]]:
    """Scores every run; returns the result and the timeline of all answers.

    Args:
        cloud: host:port of the running cloud, asked for the FM's answers on the scoring images.
        traffic: bytes up and down over the shaped link.
        settings: TOML, of cloud and agent.
    """
    timeline = _timeline(runs)
    environments, added, began_s = [], None, 0.0
    for run in runs:
        scored, added_here = _score(run, registry, cloud, began_s)
        began_s += run.records[-1]["time_s"] if run.records else 0.0
        environments.append(scored)
        added = added or added_here
    routes = Counter(record["route"] for record in timeline)
    lost = sum(run.environment.frames - len(run.records) - run.summary["unreadable"] for run in runs)
    result = {
        "environments": environments,
        "latency_ms": {route: _latency([r for r in timeline if r["route"] == route]) for route in ROUTES},
        "answers": {"total": len(timeline), **{route: routes[route] for route in ROUTES}, "lost": lost},
        "bytes_up": traffic[0],
        "bytes_down": traffic[1],
        "added_label": added,
        "objective": dict(objective),
        "link": dict(link),
        "settings": settings,
        "environment": describe_environment(seed),
    }
    return result, timeline


def _timeline(runs: Sequence[EnvironmentRun]) -> list[Record]:
    """The runs one after another on one clock."""
    timeline, offset = [], 0.0
    for run in runs:
        name = run.environment.name
        timeline += [{**r, "time_s": r["time_s"] + offset, "environment": name} for r in run.records]
        offset = timeline[-1]["time_s"] if timeline else 0.0
    return timeline


def _score(
    run: EnvironmentRun, registry: Registry, cloud: str, began_s: float
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    environment = run.environment
    images = [image for image, _ in environment.scoring]
    fm = ask_fm(cloud, environment.place, images)
    known = all(truth is not None for _, truth in environment.scoring)
    truth = np.array([label for _, label in environment.scoring], dtype=object) if known else fm
    thresholds = _thresholds(run.records)
    scores = {number: score_student(registry, environment.place, number, images) for number in sorted({0, *thresholds})}
    final = max(thresholds, default=0)
    threshold = thresholds.get(final, np.inf)  # never past its cold start: all to the cloud
    system = scores[final].system_answers(threshold, fm)
    scored = {
        "name": environment.name,
        "labels": list(registry.pool(environment.place)[0].labels),
        "frames": len(run.records),
        "versions": run.summary["swaps"],
        "scoring_images": len(images),
        "scored_against": "ground truth" if known else "the FM",
        "fm_accuracy": accuracy(fm, truth),
        "system_accuracy": accuracy(system, truth),
        "student_accuracy": accuracy(scores[final].answers, truth),
        "version0": {
            "student_accuracy": accuracy(scores[0].answers, truth),
            "edge_share": scores[0].edge_share(thresholds[0]) if 0 in thresholds else None,
        },
        "drift": [{**alarm, "time_s": alarm["time_s"] + began_s} for alarm in run.alarms],
        "edge_share": _curve(environment.place, registry, scores, thresholds),
    }
    added = None
    if run.added_label is not None:
        label = run.added_label
        own = truth == label.name
        added = {
            "name": label.name,
            "environment": environment.name,
            "recognised_before": label.before,
            "fm_by_text": label.plain,
            "fm_described": label.described,
            "descriptions": list(label.descriptions),
            "recognised_after": accuracy(system[own], truth[own]) if own.any() else None,
        }
    return scored, added


def _thresholds(records: Sequence[Record]) -> dict[int, float]:
    """The last threshold in force for each student version, under the last pool where there is one."""
    final_pool = records[-1]["pool_version"] if records else ""
    found: dict[int, tuple[bool, float]] = {}
    for record in records:
        if record["threshold"] is not None:
            rank = record["pool_version"] == final_pool
            number = record["student_version"]
            if number not in found or rank >= found[number][0]:
                found[number] = (rank, record["threshold"])
    return {number: threshold for number, (_, threshold) in found.items()}


def _curve(
    place: str, registry: Registry, scores: Mapping[int, StudentScores], thresholds: Mapping[int, float]
) -> list[list[float]]:
    """[samples labelled by the FM that the version learned from, edge share on the scoring images]."""
    if not thresholds:
        return [[0, 0.0]]  # never past the cold start: everything went to the cloud
    return [
        [registry.manifest(place, number).samples, scores[number].edge_share(threshold)]
        for number, threshold in sorted(thresholds.items())
    ]


def _latency(records: Sequence[Record]) -> dict[str, float] | None:
    if not records:
        return None
    total = np.array([record["total_ms"] for record in records])
    return {
        "p50": float(np.percentile(total, 50)),
        "p95": float(np.percentile(total, 95)),
        "mean": float(total.mean()),
        "predicted_mean": float(np.mean([record["predicted_ms"] for record in records])),
    }


def describe_environment(seed: int, *others: str) -> dict[str, Any]:
    """Machine, versions (of `others` too), seed, command and date of a measurement."""
    packages = ("edgefm", "numpy", "onnxruntime", "grpcio", "protobuf", "torch", "timm", "pillow", *others)
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "seed": seed,
        "command": " ".join(["edgefm", *(_public(argument) for argument in sys.argv[1:])]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _public(argument: str) -> str:
    """A path's last part: where the user keeps his data is nobody's business in a report."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return shlex.quote(option + equals + (Path(value).name if "/" in value else value))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
