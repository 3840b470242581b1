"""`crossover`: which system wins, over how slow the device is and how fast the link."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from ..traces import constant_trace
from . import contest
from .charts import SYSTEMS
from .experiment import Chart, Data, Experiment, Link, Material, Shown, Table

SLOWNESS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
MBIT_PER_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
WITHIN = 0.01
_SHARE_OF_SAMPLES, _LEAST = 0.2, 60
_NAMES = ("edgefm", "cloud-only", "spinn", "persephonee")
_MARKS = {"edgefm": "E", "cloud-only": "C", "spinn": "S", "persephonee": "P"}


def measure(material: Material) -> dict[str, Any]:
    """One cell: mean latency and accuracy of each system. The winner is the fastest of those that lose at most a point of
    accuracy against cloud-only's FM; on links that leave queries unanswered that may be none."""
    look = material.looks[0]
    few = replace(material, samples=max(round(_SHARE_OF_SAMPLES * material.samples), _LEAST))
    fm_accuracy = float(
        np.mean([few.version(look, seed, contest.FULL).recording.cloud_right.mean() for seed in range(few.seeds)])
    )
    rows = []
    for mbit in MBIT_PER_S:
        link = Link(f"{mbit:g} Mbit/s", constant_trace(mbit), constant_trace(mbit))
        for slowness in SLOWNESS:
            makers = {
                "edgefm": contest.product(few, slowness, accuracy_target=few.target),
                "cloud-only": contest.cloud_only(few),
                "spinn": contest.spinn(few, slowness),
                "persephonee": contest.persephonee(few, slowness),
            }
            runs = {name: contest.compete(few, look, link, make) for name, make in makers.items()}
            cells = {
                name: [round(float(run.latency_ms.mean()), 2), round(float(run.right.mean()), 4)]
                for name, run in runs.items()
            }
            fit = {name: ms for name, (ms, accuracy) in cells.items() if accuracy >= fm_accuracy - WITHIN}
            winner = min(fit, key=lambda name: fit[name]) if fit else None
            rows.append({"mbit_per_s": mbit, "slowness": slowness, "systems": cells, "winner": winner})
    return {
        "look": look,
        "traffic": str(material.traffic),
        "samples": few.samples,
        "seeds": few.seeds,
        "fm_accuracy": round(fm_accuracy, 4),
        "device_ms": round(material.device.p50_ms, 3),
        "rows": rows,
    }


def show(data: Data) -> Shown:
    rows = data["rows"]
    table = Table(
        ("device slower by", *(f"{mbit:g} Mbit/s" for mbit in MBIT_PER_S)),
        [
            (f"{slowness:g}", *(_cell(row) for row in rows if row["slowness"] == slowness))
            for slowness in dict.fromkeys(row["slowness"] for row in rows)
        ],
        "The fastest system within a point of the FM's accuracy, and its mean latency in ms. E edgefm, C cloud-only, S spinn, "
        "P persephonee; - none keeps the accuracy.",
    )
    won = {name: sum(row["winner"] == name for row in rows) for name in _NAMES}
    findings = [
        f"Of {len(rows)} combinations of device and link, "
        + ", ".join(f"{name} wins {count}" for name, count in won.items())
        + "."
    ]
    here = [row for row in rows if row["slowness"] == 1.0]
    if all(row["winner"] == "persephonee" for row in here):
        findings.append(
            "On a device as fast as this machine the FM itself is small enough: run it there, with early exits, and no cloud."
        )
    caption = (
        f"Which system is fastest within a point of the FM's accuracy ({data['fm_accuracy']:.3f}): {data['look']}; "
        f"{data['traffic']}; {data['samples']} samples, {data['seeds']} seeds. 1 is this machine, whose student takes "
        f"{data['device_ms']:.1f} ms; the cloud stays as fast as it is."
    )
    return Shown(findings, [table], [Chart("crossover-map", caption, _map(rows), 3.8)])


def _cell(row: Data) -> str:
    winner = row["winner"]
    return "-" if winner is None else f"{_MARKS[winner]} {row['systems'][winner][0]:.0f}"


def _map(rows: list[Data]) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        colours = ["white", *(SYSTEMS[name]["color"] for name in _NAMES)]
        grid = np.array(
            [
                [
                    next(
                        0 if row["winner"] is None else 1 + _NAMES.index(row["winner"])
                        for row in rows
                        if (row["slowness"], row["mbit_per_s"]) == (slowness, mbit)
                    )
                    for mbit in MBIT_PER_S
                ]
                for slowness in SLOWNESS
            ]
        )
        ax.pcolormesh(grid, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5, edgecolors="white", lw=1)
        for (y, x), value in np.ndenumerate(grid):
            name = _NAMES[value - 1] if value else ""
            ax.text(
                x + 0.5,
                y + 0.5,
                _MARKS.get(name, "-"),
                ha="center",
                va="center",
                fontsize=9,
                color="#111111" if name in ("", "cloud-only") else "white",
            )
        ax.set_xticks(np.arange(len(MBIT_PER_S)) + 0.5, [f"{mbit:g}" for mbit in MBIT_PER_S])
        ax.set_yticks(np.arange(len(SLOWNESS)) + 0.5, [f"{slowness:g}×" for slowness in SLOWNESS])
        ax.set(xlabel="bandwidth (Mbit/s)", ylabel="device slower than this machine")
        ax.grid(visible=False)
        handles = [
            ax.scatter([], [], marker="s", s=60, color=SYSTEMS[n]["color"], label=f"{_MARKS[n]} {n}") for n in _NAMES
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=4)

    return draw


EXPERIMENT = Experiment(
    "crossover",
    "Which system, for which device and link",
    lambda m: f"accuracy target {m.target}; constant links; {m.traffic}",
    measure,
    show,
)
