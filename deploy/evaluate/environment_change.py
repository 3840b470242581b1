"""`environment-change`: what is answered on the edge, and how well, while the device learns of new surroundings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from .charts import LINES, percent
from .experiment import Chart, Data, Experiment, Material, Shown, Table, system_estimates, told
from .study import FULL, HEAD

_METHODS = (FULL, HEAD)


def measure(material: Material) -> dict[str, Any]:
    rows = []
    for look in material.looks:
        cases = [("version 0", 0)] + [
            (method, count)
            for method in _METHODS
            for count in sorted({v.samples for v in material.versions if v.look == look and v.method == method})
        ]
        for method, count in cases:
            versions = [material.version(look, seed, method, count) for seed in range(material.seeds)]
            rows.append({"look": look, "method": method, "samples": count, **system_estimates(versions)})
    return {"looks": list(material.looks), "target": material.target, "seeds": material.seeds, "rows": rows}


def show(data: Data) -> Shown:
    table = Table(
        ("look", "learned", "samples", "edge share", "system - FM, points", "student", "FM"),
        [
            (
                row["look"],
                row["method"],
                str(row["samples"]),
                told(row["edge_share"]),
                told(row["system_minus_fm"], 100, 1, sign=True),
                f"{row['student_accuracy']['mean']:.3f}",
                f"{row['fm_accuracy']['mean']:.3f}",
            )
            for row in data["rows"]
        ],
        "Means with 95 % intervals. 0 samples: the version that the device brought along, before anything is learned here.",
    )
    caption = (
        "Against samples that the FM has labelled since the surroundings changed; the bars are 95 % intervals over images and "
        f"{data['seeds']} seeds, the dashed line is the student that has seen no sample. The threshold keeps the accuracy "
        f"within {100 * (1 - data['target']):.1f} point of the FM's as estimated without ground truth."
    )
    return Shown(
        _findings(data),
        [table],
        [
            Chart("environment-change-share", f"Edge share. {caption}", _drawn(data, "edge_share", "edge share (%)")),
            Chart(
                "environment-change-accuracy",
                f"Accuracy of the system minus the FM's. {caption}",
                _drawn(data, "system_minus_fm", "system - FM (points)"),
            ),
        ],
    )


def _findings(data: Data) -> list[str]:
    found = []
    for look in data["looks"]:
        rows = [row for row in data["rows"] if row["look"] == look and row["method"] == FULL]
        first, last = rows[0], rows[-1]
        found.append(
            f"{look}: the edge share went from {first['edge_share']['mean']:.0%} to {last['edge_share']['mean']:.0%} with "
            f"{last['samples']} samples, the system stood {100 * last['system_minus_fm']['mean']:+.1f} points from the FM."
        )
    worst = min((row for row in data["rows"] if row["method"] == FULL), key=lambda row: row["system_minus_fm"]["mean"])
    found.append(
        f"The system's least against the FM, while the device learns: {told(worst['system_minus_fm'], 100, 1, sign=True)} points "
        f"({worst['look']}, {worst['samples']} samples)."
    )
    return found


def _drawn(data: Data, value: str, label: str) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        looks = data["looks"]
        axes = figure.subplots(1, len(looks), sharey=True, squeeze=False)[0]
        for ax, look in zip(axes, looks, strict=True):
            for method in _METHODS:
                rows = [row for row in data["rows"] if row["look"] == look and row["method"] == method]
                counts, means = [r["samples"] for r in rows], [100 * r[value]["mean"] for r in rows]
                low, high = ([100 * r[value]["interval"][side] for r in rows] for side in (0, 1))
                spread = [
                    [m - b for m, b in zip(means, low, strict=True)],
                    [t - m for m, t in zip(means, high, strict=True)],
                ]
                ax.errorbar(counts, means, spread, label=method, capsize=2, lw=1.5, ms=4, **LINES[method])
            version0 = next(row for row in data["rows"] if row["look"] == look and row["method"] == "version 0")
            ax.axhline(100 * version0[value]["mean"], label="version 0", **LINES["version 0"])
            ax.set_title(look, fontsize=9)
            ax.set_xscale("symlog", linthresh=100)
            counts = sorted({row["samples"] for row in data["rows"]})
            ax.set_xticks(counts, [str(count) for count in counts], fontsize=7, rotation=45)
            ax.minorticks_off()
            ax.set_xlabel("samples labelled by the FM")
        axes[0].set_ylabel(label)
        percent(axes[0], value)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)

    return draw


EXPERIMENT = Experiment(
    "environment-change",
    "The surroundings change",
    lambda material: f"accuracy target {material.target}; what is shown does not depend on the link",
    measure,
    show,
)
