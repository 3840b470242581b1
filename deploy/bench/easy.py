"""`edgefm bench easy`: what samples that the student found easy can teach beside those that the FM labelled.

Students of n samples that the FM labelled; of these alone, in as many steps as the next; of these and of easy ones with the
student's own word for a target, which asks it to say of every view what it said of the sample itself (consistency); of these
and of the same easy ones, labelled by the FM. Easy is what the student that learned from the n would answer on the edge.
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


def bench_easy(
    data: Sequence[Path],
    conditions: Sequence[str],
    student: str,
    samples: int,
    seen: int,
    seeds: int,
    target: float,
    console: Console,
) -> dict[str, Any]:
    """Edge share and accuracy of the four.

    Args:
        samples: labelled by the FM in all of them, enough for a tail.
        seen: further samples of the stream; the easy ones are among them.

    Raises:
        InputError: a data set has too few images, or another layout than `train/<label>/`, `val/<label>/`.
    """
    rows = []
    work = [(path, condition, student, samples, seen, seeds, target) for path in data for condition in conditions]
    with every_core(console) as each:
        for some in each(_under, work):
            rows += some
    result = learning_result(rows, target, student=student, samples=samples, seen=seen, seeds=seeds)
    console.print(_table(result))
    return result


def _under(
    path: Path, condition: str, student: str, samples: int, seen: int, seeds: int, target: float
) -> list[dict[str, Any]]:
    """A row for each of the four."""
    model, config = load_foundation_model("synclip"), CustomizationConfig(threads=1)
    learner = Learner(model, student_profile(student), config)
    place = Place.open(path, model, samples + seen + EVIDENCE)
    stream = learner.look(place.stream_under(condition), config.views)
    scored = learner.look(place.scoring_under(condition), 1)
    scores: dict[str, list[Score]] = {}
    easy_samples = []
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(place.stream))
        labelled, others = stream.at(order[:samples]), stream.at(order[samples : samples + seen])
        evidence = stream.at(order[samples + seen : samples + seen + EVIDENCE])
        taught = learner.learn(labelled, place.pool)
        said = taught.embed(others)
        margins = place.pool.recognise(said, top_k=1).margins
        easy = np.flatnonzero(margins >= choose_threshold(taught, evidence, place.pool, target))
        easy_samples.append(len(easy))
        own = replace(others, fm=said).at(easy)
        train = np.flatnonzero(~held_out_mask(np.arange(samples), config))
        again = labelled.at(np.resize(train, len(easy)))
        students = {
            "labelled by the FM": taught,
            "the same, as many steps": learner.learn(labelled, place.pool, beside=again),
            "and easy ones, by themselves": learner.learn(labelled, place.pool, beside=own),
            "and easy ones, by the FM": learner.learn(labelled, place.pool, beside=others.at(easy)),
        }
        for name, learnt in students.items():
            threshold = choose_threshold(learnt, evidence, place.pool, target)
            scores.setdefault(name, []).append(Score.of(learnt, threshold, scored, place))
    return [
        {
            "data": place.name,
            "condition": condition,
            "learned": name,
            "easy_samples": round(float(np.mean(easy_samples))),
            **summarise(some),
        }
        for name, some in scores.items()
    ]


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"{result['samples']} samples labelled by the FM, and easy ones; target {result['accuracy_target']}"
    )
    for column in (
        "data",
        "condition",
        "learned from",
        "easy",
        "student accuracy",
        "edge share",
        "system - FM, points",
    ):
        table.add_column(column)
    for row in result["rows"]:
        table.add_row(
            *(str(row[key]) for key in ("data", "condition", "learned", "easy_samples")),
            f"{row['student_accuracy']:.3f}",
            f"{row['edge_share']:.3f}",
            f"{100 * row['system_minus_fm']:+.1f}",
        )
    return table
