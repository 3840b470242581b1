"""`open-set`: samples of no label in the pool, and labels that are added as text while the system runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..bench.bootstrap import estimate_of_seeds, resampled
from .charts import OTHERS
from .detection import auroc, fpr95
from .experiment import Chart, Data, Experiment, Material, Shown, Table, told
from .study import FULL, LookAtFM

Score = Callable[[np.ndarray], np.ndarray]
_FOLDS = 4
_HATCHES = ("", "///", "---")

LEAST_LABELS = 3
"""Two stay in the pool when one is taken out: a margin needs both."""


def measure(material: Material) -> dict[str, Any]:
    """A quarter of the labels at a time is taken out of the pool: its images are the samples of no label."""
    look = material.looks[0]
    fm = material.fm[look]
    versions = [material.version(look, seed, FULL) for seed in range(material.seeds)]
    scores = _scores(fm.temperature)
    rows = [
        {"model": model, "score": name, **_detection([answer(v, name) for v in versions], fm)}
        for model, answer in {
            "FM": lambda v, name: _Answerer(fm.similarities, fm.similarities, scores[name], -1.0),
            "student": lambda v, name: _Answerer(v.similarities, v.similarities, scores[name], -1.0),
            "system": lambda v, name: _Answerer(v.similarities, fm.similarities, scores[name], v.threshold),
        }.items()
        for name in scores
    ]
    return {
        "look": look,
        "seeds": material.seeds,
        "labels": len(fm.labels),
        "folds": _FOLDS,
        "learned_from": versions[0].samples,
        "rows": rows,
        "added": [dict(row) for row in material.added_labels],
    }


@dataclass(frozen=True)
class _Answerer:
    """Scores samples by what the student says where its margin reaches the threshold, else by what the FM says."""

    student: np.ndarray  # (M, K) similarities
    fm: np.ndarray
    score: Score
    threshold: float

    def __call__(self, kept: np.ndarray) -> np.ndarray:
        """(M,) scores under the labels that are kept."""
        student, fm = self.student[:, kept], self.fm[:, kept]
        on_edge = _margin(student) >= self.threshold
        return np.where(on_edge, self.score(student), self.score(fm))


def _scores(temperature: float) -> Mapping[str, Score]:
    """(M, K) similarities -> (M,), high where the sample is of a label in the pool."""

    def energy(similarities: np.ndarray) -> np.ndarray:
        scaled = similarities / temperature
        top = scaled.max(axis=1, keepdims=True)
        return (top[:, 0] + np.log(np.exp(scaled - top).sum(axis=1))) * temperature

    return {"margin": _margin, "top similarity": lambda similarities: similarities.max(axis=1), "energy": energy}


def _margin(similarities: np.ndarray) -> np.ndarray:
    two = np.sort(similarities, axis=1)[:, -2:]
    return two[:, 1] - two[:, 0]


def _detection(answerers: Sequence[_Answerer], fm: LookAtFM) -> dict[str, Any]:
    """AUROC, and the share of samples of no label that pass where 95 % of the others do, of the answerers of all seeds: means
    over seeds and folds, with 95 % intervals over images and seeds, drawn together."""
    images, folds = resampled(len(fm.truth)), [_folds(answerer, fm) for answerer in answerers]
    return {
        name: estimate_of_seeds(
            np.array([np.mean([measure(scores, known, images) for scores, known in each], axis=0) for each in folds])
        )
        for name, measure in (("auroc", _auroc), ("fpr95", fpr95))
    }


def _auroc(scores: np.ndarray, known: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """NaN where a draw has samples of one kind alone."""
    both = counts[:, known].any(axis=1) & counts[:, ~known].any(axis=1)
    return np.where(both, auroc(scores, known, counts), np.nan)


def _folds(answerer: _Answerer, fm: LookAtFM) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every part of the labels that is taken out: (M,) scores, and (M,) whether the label is still in the pool."""
    labels = np.array(fm.labels, dtype=object)
    folds = min(_FOLDS, len(labels))
    hidden = [np.arange(len(labels)) % folds == fold for fold in range(folds)]
    return [(answerer(~out), ~np.isin(fm.truth, labels[out])) for out in hidden]


def show(data: Data) -> Shown:
    table = Table(
        ("who answers", "score", "AUROC", "FPR at 95 %"),
        [(row["model"], row["score"], told(row["auroc"]), told(row["fpr95"])) for row in data["rows"]],
        f"A quarter of the {data['labels']} labels at a time is taken out of the pool; its images should be told from the "
        "others. FPR: how many of them pass where 95 % of the others do. The system's score is that of the model that answers.",
    )
    added = Table(
        ("added labels", "FM", "student, as it was", "student, after the next update"),
        [(row["labels"], told(row["fm"]), told(row["before"]), told(row["after"])) for row in data["added"]],
        "Accuracy on images of labels that were added as text to a pool in use: with the student that has learned without "
        "them, and with the next one.",
    )
    best = {
        model: max((r for r in data["rows"] if r["model"] == model), key=lambda r: r["auroc"]["mean"])
        for model in ("FM", "student", "system")
    }
    findings = [
        f"Samples of no label are told from others best by {row['score']}: AUROC {row['auroc']['mean']:.2f} ({model})."
        for model, row in best.items()
    ]
    findings += [
        f"Labels added as text: accuracy {row['before']['mean']:.2f} at once, {row['after']['mean']:.2f} after the next update; "
        f"the FM's is {row['fm']['mean']:.2f}."
        for row in data["added"]
    ]

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        models, names = list(best), list(dict.fromkeys(row["score"] for row in data["rows"]))
        for place, (name, style, hatch) in enumerate(zip(names, OTHERS, _HATCHES, strict=True)):
            rows = [next(r for r in data["rows"] if (r["model"], r["score"]) == (model, name)) for model in models]
            means = [row["auroc"]["mean"] for row in rows]
            spread = np.array(
                [
                    [row["auroc"]["mean"] - row["auroc"]["interval"][0] for row in rows],
                    [row["auroc"]["interval"][1] - row["auroc"]["mean"] for row in rows],
                ]
            )
            ax.bar(
                np.arange(len(models)) + (place - 1) * 0.27,
                means,
                0.25,
                yerr=np.maximum(spread, 0),
                capsize=2,
                label=name,
                color=style["color"],
                hatch=hatch,
                edgecolor="white",
            )
        ax.set_xticks(np.arange(len(models)), models)
        ax.set_ylim(0.5, 1.0)
        ax.set_ylabel("AUROC of \u201cknown\u201d")
        ax.grid(visible=False, axis="x")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)

    caption = (
        f"Telling samples of no label, {data['look']}, a student customized on {data['learned_from']} samples, "
        f"{data['seeds']} seeds; bars from 0.5, which is chance."
    )
    return Shown(findings, [table, *([added] if data["added"] else [])], [Chart("open-set-auroc", caption, draw, 3.0)])


EXPERIMENT = Experiment(
    "open-set",
    "Samples and labels that nobody foresaw",
    lambda m: f"thresholds by accuracy target {m.target}; no link in it",
    measure,
    show,
)
