"""`margins`: does the margin tell when the student agrees with the FM, and are the estimates of what it costs true?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..bench.bootstrap import estimate_of_seeds, resampled
from .charts import OTHERS
from .detection import auroc
from .experiment import Chart, Data, Experiment, Material, Shown, Table
from .study import FULL, HEAD

_BINS = 10
_CASES = ("version 0", HEAD, FULL)


def measure(material: Material) -> dict[str, Any]:
    rows = []
    for look in material.looks:
        fm_answers = material.fm[look].similarities.argmax(axis=1)
        for method in _CASES:
            versions = [material.version(look, seed, method) for seed in range(material.seeds)]
            agrees = np.array([v.similarities.argmax(axis=1) == fm_answers for v in versions])  # (S, M)
            margins = np.array([v.recording.margins for v in versions])
            cost = np.array([1.0 - v.recording.agreements for v in versions])
            lost = np.array([v.recording.cloud_right.astype(float) - v.recording.edge_right for v in versions])
            rows.append(
                {
                    "look": look,
                    "method": method,
                    "samples": versions[0].samples,
                    "auroc": _auroc(margins, agrees),
                    "reliability": _reliability(margins, agrees, cost, lost),
                }
            )
    return {"looks": list(material.looks), "seeds": material.seeds, "rows": rows}


def _auroc(margins: np.ndarray, agrees: np.ndarray) -> dict[str, Any]:
    """Of the margin for agreement: mean over seeds, and its bootstrap interval over seeds and images; (S, M) arrays."""
    images = resampled(margins.shape[1])
    return estimate_of_seeds(np.array([auroc(*each, images) for each in zip(margins, agrees, strict=True)]))


def _reliability(margins: np.ndarray, agrees: np.ndarray, cost: np.ndarray, lost: np.ndarray) -> list[dict[str, float]]:
    """By tenths of the margin, over all seeds: agreement, and accuracy lost against the FM, estimated and true."""
    order = np.argsort(margins, axis=None)
    values = {"margin": margins, "agreement": agrees, "cost_estimated": cost, "cost_true": lost}
    return [
        {name: round(float(each.ravel()[rows].mean()), 5) for name, each in values.items()}
        for rows in np.array_split(order, _BINS)
    ]


def show(data: Data) -> Shown:
    table = Table(
        ("look", "student", "samples", "AUROC of the margin", "accuracy lost if all is answered: estimated", "true"),
        [
            (
                row["look"],
                row["method"],
                str(row["samples"]),
                f"{row['auroc']['mean']:.3f} [{row['auroc']['interval'][0]:.3f}, {row['auroc']['interval'][1]:.3f}]",
                *(
                    f"{100 * float(np.mean([part[k] for part in row['reliability']])):+.1f}"
                    for k in ("cost_estimated", "cost_true")
                ),
            )
            for row in data["rows"]
        ],
        "AUROC for \u201cthe student agrees with the FM\u201d. Accuracy in points.",
    )
    areas = [row["auroc"]["mean"] for row in data["rows"]]
    findings = [
        f"The margin tells whether the student agrees with the FM with an AUROC of {min(areas):.2f} to {max(areas):.2f}."
    ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(data["looks"]), sharey=True, squeeze=False)[0]
        for ax, look in zip(axes, data["looks"], strict=True):
            rows = [row for row in data["rows"] if row["look"] == look and row["method"] == FULL]
            for key, label, style in (
                ("cost_estimated", "estimated without ground truth", OTHERS[0]),
                ("cost_true", "true", OTHERS[1]),
            ):
                points = rows[0]["reliability"]
                ax.plot([p["margin"] for p in points], [100 * p[key] for p in points], label=label, ms=4, **style)
            ax.axhline(0, color="#222222", lw=0.8)
            ax.set_title(look, fontsize=9)
            ax.set_xlabel("margin (cosine), tenths of the samples")
        axes[0].set_ylabel("accuracy lost against the FM (points)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)

    caption = (
        "Reliability of the graded agreement: accuracy that the customized student's answers lose against the FM's, by tenths "
        f"of the margin, {data['seeds']} seeds."
    )
    return Shown(findings, [table], [Chart("margins-reliability", caption, draw)])


EXPERIMENT = Experiment(
    "margins",
    "What the margin tells",
    lambda material: "all scoring images, answered by student and FM alike; no link in it",
    measure,
    show,
)
