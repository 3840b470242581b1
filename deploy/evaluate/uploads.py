"""`uploads`: which samples are worth a budget of the FM's answers?"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from .charts import OTHERS
from .experiment import Chart, Data, Experiment, Material, Shown, Table, told

_STYLES = dict(zip(("uncertain first", "random", "all"), OTHERS, strict=True))


def measure(material: Material) -> dict[str, Any]:
    rows = [dict(row) for row in material.uploads]
    return {"looks": list(dict.fromkeys(row["look"] for row in rows)), "seeds": material.seeds, "rows": rows}


def show(data: Data) -> Shown:
    rows = data["rows"]
    table = Table(
        ("look, policy", "budget", "edge share", "system - FM, points", "student", "edge share - random, points"),
        [
            (
                f"{row['look']}: {row['policy']}",
                str(row["budget"]),
                told(row["edge_share"]),
                told(row["system_minus_fm"], 100, 1, sign=True),
                f"{row['student_accuracy']['mean']:.3f}",
                told(row["edge_share_minus_random"], 100, 1, sign=True),
            )
            for row in rows
        ],
        "Four samples go past the device for each that the budget lets it send; paired over images and seeds, 95 % intervals.",
    )
    findings = []
    for row in rows:
        if row["policy"] == "uncertain first" and row["budget"] == max(r["budget"] for r in rows):
            low, high = row["edge_share_minus_random"]["interval"]
            verdict = "better" if low > 0 else "worse" if high < 0 else "no different beyond chance"
            findings.append(
                f"{row['look']}: with {row['budget']} answers of the FM, uncertain-first is {verdict} than random "
                f"({100 * row['edge_share_minus_random']['mean']:+.1f} points of edge share)."
            )

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(data["looks"]), sharey=True, squeeze=False)[0]
        for ax, look in zip(axes, data["looks"], strict=True):
            for policy, style in _STYLES.items():
                some = [row for row in rows if (row["look"], row["policy"]) == (look, policy)]
                means = [100 * row["edge_share"]["mean"] for row in some]
                low, high = ([100 * row["edge_share"]["interval"][side] for row in some] for side in (0, 1))
                below = [mean - bound for mean, bound in zip(means, low, strict=True)]
                above = [bound - mean for mean, bound in zip(means, high, strict=True)]
                ax.errorbar([r["budget"] for r in some], means, [below, above], capsize=2, ms=4, label=policy, **style)
            ax.set_title(look, fontsize=9)
            ax.set_xlabel("samples labelled by the FM")
        axes[0].set_ylabel("edge share (%)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)

    caption = f"Edge share at the accuracy target by policy of upload, at equal budgets; {data['seeds']} seeds."
    return Shown(findings, [table], [Chart("uploads-share", caption, draw)])


EXPERIMENT = Experiment(
    "uploads",
    "Which samples to send",
    lambda m: f"accuracy target {m.target}; budgets instead of a link",
    measure,
    show,
)
