"""`edgefm bench returning`: what a student still knows of the day when the day returns after the night.

One environment, by day and then by night, each with samples that the FM labelled. What the product learns from the store of
both is set beside what it would have learned from the newest samples alone, with as many of them for the tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ...cloud.config import CustomizationConfig
from ...cloud.learning import held_out_mask
from ...models.foundation import load_foundation_model
from ...models.students import student_profile
from .learner import EVIDENCE, Learner, Place, Score, choose_threshold, every_core, learning_result, summarise

DAY, NIGHT = "clean", "night"


def bench_returning(
    data: Sequence[Path], student: str, samples: int, seeds: int, target: float, console: Console
) -> dict[str, Any]:
    """Edge share and accuracy by day and by night, of students that have seen one or both.

    Args:
        samples: of each look. The tail trains on as many as one look has, so that what is old has to make room.

    Raises:
        InputError: a data set has too few images, or another layout than `train/<label>/`, `val/<label>/`.
    """
    rows = []
    with every_core(console) as each:
        for some in each(_at, [(path, student, samples, seeds, target) for path in data]):
            rows += some
    result = learning_result(rows, target, student=student, samples=samples, seeds=seeds)
    console.print(_table(result))
    return result


def _at(path: Path, student: str, samples: int, seeds: int, target: float) -> list[dict[str, Any]]:
    """A row for each student and look."""
    model, config = load_foundation_model("synclip"), CustomizationConfig(threads=1)
    config = replace(config, tail_samples=int((~held_out_mask(np.arange(samples), config)).sum()))
    learner = Learner(model, student_profile(student), config)
    place = Place.open(path, model, 2 * samples + EVIDENCE)
    seen = {look: learner.look(place.stream_under(look), config.views) for look in (DAY, NIGHT)}
    scored = {look: learner.look(place.scoring_under(look), 1) for look in (DAY, NIGHT)}
    scores: dict[tuple[str, str], list[Score]] = {}
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(place.stream))
        day, night = seen[DAY].at(order[:samples]), seen[NIGHT].at(order[samples : 2 * samples])
        students = {
            "version 0": learner.version0(place.pool),
            "day": learner.learn(day, place.pool),
            "day, then night": learner.learn(day.then(night), place.pool, judge_from=samples),
            "night alone": learner.learn(night, place.pool),
        }
        for look in (DAY, NIGHT):
            evidence = seen[look].at(order[2 * samples : 2 * samples + EVIDENCE])
            for name, learnt in students.items():
                threshold = choose_threshold(learnt, evidence, place.pool, target)
                scores.setdefault((name, look), []).append(Score.of(learnt, threshold, scored[look], place))
    return [{"data": place.name, "learned": n, "look": look, **summarise(s)} for (n, look), s in scores.items()]


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"Student accuracy, edge share (system minus FM accuracy, points), target {result['accuracy_target']}"
    )
    for column in ("data", "learned from", "by day", "by night"):
        table.add_column(column)
    cells: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        cell = f"{row['student_accuracy']:.3f}, {row['edge_share']:.3f} ({100 * row['system_minus_fm']:+.1f})"
        cells.setdefault((row["data"], row["learned"]), []).append(cell)
    for (data, learned), by_look in cells.items():
        table.add_row(data, learned, *by_look)
    return table
