"""`crossover`: which system wins, over how slow the device is and how fast the link."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from . import contest
from .charts import SYSTEMS
from .experiment import Chart, Data, Experiment, Link, Material, Shown, Table

SLOWNESS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
MBIT_PER_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
WITHIN = 0.01
_TIE = 0.02
_SIMPLEST_FIRST = ("cloud-only", "FM on the device", "persephonee", "edgefm", "spinn")
_WITHOUT_CLOUD = ("persephonee", "FM on the device")
_NAMES = ("edgefm", "cloud-only", "spinn", "persephonee", "FM on the device")
_MARKS = {"edgefm": "E", "cloud-only": "C", "spinn": "S", "persephonee": "P", "FM on the device": "D"}


def measure(material: Material) -> dict[str, Any]:
    """One cell: mean latency and accuracy of each system. The winner is the fastest of those that keep the accuracy: the 95 %
    interval of what they lose against the FM reaches up to a point. All that have a target aim at just that point, so that
    their means alone would be a throw of a coin. Nor does one win whose mean is above the deadline: it does not keep up."""
    look = material.looks[0]
    rows = []
    for slowness in SLOWNESS:
        alone = _cells(material, Link.constant(MBIT_PER_S[0]), _without_link(material, slowness))
        for mbit in MBIT_PER_S:
            cells = {**alone, **_cells(material, Link.constant(mbit), _with_link(material, slowness))}
            rows.append(
                {"mbit_per_s": mbit, "slowness": slowness, "systems": cells, "winner": _winner(material, cells)}
            )
    return {
        "look": look,
        "traffic": str(material.traffic),
        "samples": material.samples,
        "seeds": material.seeds,
        "device_ms": round(material.device.p50_ms, 3),
        "rows": rows,
    }


def _with_link(material: Material, slowness: float) -> dict[str, contest.Maker]:
    return {
        "edgefm": contest.product(material, slowness, accuracy_target=material.target),
        "cloud-only": contest.cloud_only(material, slowness),
        "spinn": contest.spinn(material, slowness),
    }


def _without_link(material: Material, slowness: float) -> dict[str, contest.Maker]:
    return {
        "persephonee": contest.persephonee(material, slowness),
        "FM on the device": contest.fm_on_device(material, slowness),
    }


def _cells(material: Material, link: Link, makers: Mapping[str, contest.Maker]) -> dict[str, Any]:
    runs = {
        name: contest.compete(material, material.looks[0], link, make)
        for name, make in makers.items()
        if name in material.systems
    }
    return {
        name: {"mean_ms": round(float(run.latency_ms.mean()), 2), "minus_fm": run.accuracy_minus_fm()}
        for name, run in runs.items()
    }


def _winner(material: Material, cells: Data) -> str | None:
    """The fastest that is fit; of those as fast but for `_TIE`, the simplest: SPINN that sends every image is cloud-only."""
    fit = {
        name: cell["mean_ms"]
        for name, cell in cells.items()
        if cell["minus_fm"]["interval"][1] >= -WITHIN and cell["mean_ms"] <= material.traffic.deadline_ms
    }
    tied = [name for name, ms in fit.items() if ms <= (1 + _TIE) * min(fit.values())]
    return min(tied, key=_SIMPLEST_FIRST.index) if tied else None


def show(data: Data) -> Shown:
    rows = data["rows"]
    table = Table(
        ("device slower by", *(f"{mbit:g} Mbit/s" for mbit in MBIT_PER_S)),
        [
            (f"{slowness:g}", *(_cell(row) for row in rows if row["slowness"] == slowness))
            for slowness in dict.fromkeys(row["slowness"] for row in rows)
        ],
        "The fastest system that keeps the FM's accuracy, and its mean latency in ms. E edgefm, C cloud-only, S spinn, "
        "P persephonee, D the whole FM on the device; - none keeps the accuracy in less than the deadline.",
    )
    won = {name: sum(row["winner"] == name for row in rows) for name in _NAMES}
    findings = [
        f"Of {len(rows)} combinations of device and link, "
        + ", ".join(f"{name} wins {count}" for name, count in won.items())
        + "."
    ]
    alone = sorted(
        slowness
        for slowness in {row["slowness"] for row in rows}
        if all(row["winner"] in _WITHOUT_CLOUD for row in rows if row["slowness"] == slowness)
    )
    if alone:
        findings.append(
            f"On a device up to {alone[-1]:g} times slower than the one measured the FM itself is small enough: run it there, "
            "and no cloud. 'edgefm profile --fm' measures it on yours."
        )
    caption = (
        "Which system is fastest of those that lose no more than a point against the FM (95 % interval) in less than the "
        f"deadline: {data['look']}; {data['traffic']}; {data['samples']} samples, {data['seeds']} seeds, edgefm from a cold "
        f"start. At 1 the student takes {data['device_ms']:.1f} ms; the cloud stays as fast as it is."
    )
    return Shown(findings, [table], [Chart("crossover-map", caption, _map(rows), 3.8)])


def _cell(row: Data) -> str:
    winner = row["winner"]
    return "-" if winner is None else f"{_MARKS[winner]} {row['systems'][winner]['mean_ms']:.0f}"


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
        ax.set(xlabel="bandwidth (Mbit/s)", ylabel="device slower by")
        ax.grid(visible=False)
        handles = [
            ax.scatter([], [], marker="s", s=60, color=SYSTEMS[n]["color"], label=f"{_MARKS[n]} {n}") for n in _NAMES
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=5)

    return draw


EXPERIMENT = Experiment(
    "crossover",
    "Which system, for which device and link",
    lambda m: f"accuracy target {m.target}; constant links; {m.traffic}",
    measure,
    show,
)
