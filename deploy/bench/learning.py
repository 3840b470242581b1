"""`edgefm bench learning`: what a student learns from n samples that the FM has labelled, clean and under bad conditions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ...cloud.config import CustomizationConfig
from ...models.foundation import load_foundation_model
from ...models.students import student_profile
from ..conditions import CONDITIONS
from .learner import EVIDENCE, Learner, Place, Score, choose_threshold, every_core, learning_result, summarise

_TOLERANCE = 0.01


def bench_learning(
    data: Sequence[Path], student: str, samples: Sequence[int], seeds: int, target: float, console: Console
) -> dict[str, Any]:
    """The edge share at an accuracy target, against n, for each data set and condition; as many at once as there are cores.

    Raises:
        InputError: a data set has too few images, or another layout than `train/<label>/`, `val/<label>/`.
    """
    rows = []
    work = [(path, condition, student, samples, seeds, target) for path in data for condition in CONDITIONS]
    with every_core(console) as each:
        for some in each(_under, work):
            rows += some
            for row in some:
                console.print(_line(row))
    result = learning_result(rows, target, student=student, seeds=seeds)
    console.print(_table(result))
    return result


def _under(
    path: Path, condition: str, student: str, samples: Sequence[int], seeds: int, target: float
) -> list[dict[str, Any]]:
    """A row for each number of samples; torch and the student on one thread, since others learn beside it."""
    model, config = load_foundation_model("synclip"), CustomizationConfig(threads=1)
    learner = Learner(model, student_profile(student), config)
    place = Place.open(path, model, max(samples) + EVIDENCE)
    seen = learner.look(place.stream_under(condition), config.views)
    scored = learner.look(place.scoring_under(condition), 1)
    rows = []
    for count in samples:
        scores, methods, seconds = [], [], []
        for seed in range(seeds):
            order = np.random.default_rng(seed).permutation(len(place.stream))
            began = time.perf_counter()
            learnt = learner.learn(seen.at(order[:count]), place.pool) if count else learner.version0(place.pool)
            seconds.append(time.perf_counter() - began)
            evidence = seen.at(order[max(samples) : max(samples) + EVIDENCE])
            threshold = choose_threshold(learnt, evidence, place.pool, target)
            scores.append(Score.of(learnt, threshold, scored, place))
            methods.append(learnt.method)
        rows.append(
            {
                "data": place.name,
                "condition": condition,
                "samples": count,
                **summarise(scores),
                "methods": {method: methods.count(method) for method in sorted(set(methods))},
                "learning_s": round(float(np.median(seconds)), 1),
            }
        )
    return rows


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['data']} {row['condition']} n={row['samples']}: edge share {row['edge_share']:.3f}, system - FM "
        f"{row['system_minus_fm']:+.3f}, student {row['student_accuracy']:.3f}, FM {row['fm_accuracy']:.3f}, "
        f"{row['methods']}, {row['learning_s']} s"
    )


def _table(result: dict[str, Any]) -> Table:
    counts = sorted({row["samples"] for row in result["rows"]})
    table = Table(title=f"Edge share (system minus FM accuracy, points), target {result['accuracy_target']}")
    table.add_column("data")
    table.add_column("condition")
    for count in counts:
        table.add_column("version 0" if count == 0 else f"{count} samples", justify="right")
    cells: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        mark = "" if row["system_minus_fm"] >= -_TOLERANCE else " !"
        cell = f"{row['edge_share']:.3f} ({100 * row['system_minus_fm']:+.1f}){mark}"
        cells.setdefault((row["data"], row["condition"]), []).append(cell)
    for key, values in cells.items():
        table.add_row(*key, *values)
    return table
