"""`latency-accuracy`: what each system's answers take and are worth, on each link (the paper's latency bars)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from . import contest
from .charts import system_style
from .contest import Maker, Run
from .experiment import Chart, Data, Experiment, Link, Material, Shown, Table, told
from .study import FULL

_PARTS = ("edge", "network", "cloud")
_SHADES = {"edge": "#1f5a96", "network": "#bdbdbd", "cloud": "#f2b134"}
_HATCHES = {"edge": "", "network": "", "cloud": "///"}
_WITHIN = 0.01


def measure(material: Material) -> dict[str, Any]:
    look = material.looks[0]
    versions = [material.version(look, seed, FULL) for seed in range(material.seeds)]
    best_fixed = contest.lowest_threshold(versions, 1 - material.target)
    rows = []
    for link in material.links:
        cloud_only = contest.compete(material, look, link, contest.cloud_only(material))
        for name, run_system in _systems(material, best_fixed).items():
            system = re.split(r" \(|, ", name)[0]
            if system in material.systems:
                run = cloud_only if system == "cloud-only" else run_system(material, look, link)
                rows.append({"link": link.name, "system": name, **run.described(cloud_only)})
    return {
        "look": look,
        "samples": material.samples,
        "seeds": material.seeds,
        "target": material.target,
        "traffic": str(material.traffic),
        "learned_from": versions[0].samples,
        "links": [link.name for link in material.links],
        "rows": rows,
    }


def _systems(material: Material, best_fixed: float) -> dict[str, Callable[[Material, str, Link], Run]]:
    def with_maker(make: Maker, method: str = FULL) -> Callable[[Material, str, Link], Run]:
        return lambda m, look, link: contest.compete(m, look, link, make, method)

    allowed = 1 - material.target
    bounded = {
        f"edgefm (bound {bound:g} ms)": with_maker(
            contest.product(material, objective="latency_bound", latency_bound_ms=bound)
        )
        for bound in contest.BOUNDS_MS
    }
    return {
        f"edgefm (target {material.target:g})": with_maker(contest.product(material, accuracy_target=material.target)),
        **bounded,
        "cloud-only": with_maker(contest.cloud_only(material)),
        "edge-only": with_maker(contest.edge_only(material)),
        "edge-only, version 0": with_maker(contest.edge_only(material), "version 0"),
        "spinn": with_maker(contest.spinn(material)),
        "persephonee": with_maker(contest.persephonee(material)),
        "FM on the device": with_maker(contest.fm_on_device(material)),
        "fixed-threshold": with_maker(contest.fixed(material, lambda version: best_fixed)),
        "oracle-threshold": with_maker(
            contest.fixed(material, lambda version: contest.lowest_threshold([version], allowed))
        ),
    }


_COLUMNS = (
    "system",
    "mean ms",
    "p50",
    "p95",
    "p99",
    "of cloud-only",
    "edge",
    "fallback",
    "accuracy - FM, points",
    "accuracy - cloud-only, points",
)
_CAPTION = (
    "Latency and accuracy are paired over images; 95 % intervals over images and seeds. Minus the FM: what it says of every "
    "image, on any link. A query of cloud-only that meets its deadline leaves no answer. The thresholds of fixed-threshold and "
    "oracle-threshold are chosen with ground truth: the best that any single one, and one for each student, could be."
)


def show(data: Data) -> Shown:
    tables = [
        Table(
            _COLUMNS,
            [_cells(row) for row in data["rows"] if row["link"] == link],
            f"{link}." if number else f"{link}. {_CAPTION}",
        )
        for number, link in enumerate(data["links"])
    ]
    setting = (
        f"{data['look']}, a student customized on {data['learned_from']} samples; {data['traffic']}; {data['samples']} samples "
        f"replayed for each of {data['seeds']} seeds, from a cold start."
    )
    charts = [
        Chart(
            "latency-accuracy-bars",
            f"Mean latency by where it is spent. {setting}",
            _bars(data),
            2.2 + len(data["links"]),
        )
    ]
    charts.append(
        Chart(
            "latency-accuracy-plane",
            f"Accuracy against mean latency; edgefm under its target and its bounds. {setting}",
            _plane(data),
            4.6,
        )
    )
    return Shown(_findings(data), tables, charts)


def _cells(row: Data) -> tuple[str, ...]:
    return (
        row["system"],
        told(row["latency_ms"], digits=1),
        *(f"{row['percentiles_ms'][p]:.0f}" for p in ("p50", "p95", "p99")),
        told(row["latency_over_cloud_only"], digits=2),
        f"{row['shares']['edge']:.0%}",
        f"{row['shares']['fallback']:.1%}",
        told(row["accuracy_minus_fm"], 100, 1, sign=True),
        told(row["accuracy_minus_cloud_only"], 100, 1, sign=True),
    )


def _findings(data: Data) -> list[str]:
    found = []
    for link in data["links"]:
        row = next((r for r in data["rows"] if r["link"] == link and r["system"].startswith("edgefm (target")), None)
        if row is None:
            continue
        gain = row["accuracy_minus_fm"]
        verdict = "within" if gain["mean"] >= -_WITHIN else "not within"
        found.append(
            f"{link}: at an accuracy {100 * gain['mean']:+.1f} points from the FM's ({verdict} one point), the mean latency of "
            f"edgefm is {told(row['latency_over_cloud_only'], digits=2)} of cloud-only's."
        )
    return found


def _bars(data: Data) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(data["links"]), sharey=True, squeeze=False)[0]
        for ax, link in zip(axes, data["links"], strict=True):
            rows = [row for row in data["rows"] if row["link"] == link][::-1]
            names, left = [row["system"] for row in rows], [0.0] * len(rows)
            for part in _PARTS:
                widths = [row["parts_ms"][part] for row in rows]
                ax.barh(
                    names, widths, left=left, label=part, color=_SHADES[part], hatch=_HATCHES[part], edgecolor="white"
                )
                left = [x + w for x, w in zip(left, widths, strict=True)]
            for name, end in zip(names, left, strict=True):
                ax.text(end, name, f" {end:.0f}", va="center", fontsize=7)
            ax.set_xlim(0, max(left) * 1.15)
            ax.set_title(link, fontsize=9)
            ax.set_xlabel("mean latency (ms)")
            ax.grid(visible=False, axis="y")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)

    return draw


def _plane(data: Data) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(data["links"]), sharey=True, squeeze=False)[0]
        for ax, link in zip(axes, data["links"], strict=True):
            for number, row in enumerate(row for row in data["rows"] if row["link"] == link):
                name, setting = _name_and_setting(row["system"])
                at = row["latency_ms"]["mean"], 100 * row["accuracy"]["mean"]
                style = system_style(name)
                ax.plot(
                    *at, linestyle="", color=style["color"], marker=style["marker"], mec="#222222", ms=7, label=name
                )
                offset = (6, -9) if number % 2 else (-2, 6)
                ax.annotate(setting.removeprefix("bound "), at, xytext=offset, textcoords="offset points", fontsize=6)
            ax.set_title(link, fontsize=9)
            ax.set_xlim(left=0)
            ax.set_xlabel("mean latency (ms)")
        axes[0].set_ylabel("accuracy (%)")
        handles, names = axes[0].get_legend_handles_labels()
        once = dict(zip(names, handles, strict=True))
        figure.legend(once.values(), once.keys(), loc="outside right upper", fontsize=7, ncols=1)

    return draw


def _name_and_setting(system: str) -> tuple[str, str]:
    """`edgefm (bound 50 ms)` apart; most systems have no setting."""
    name, _, setting = system.partition(" (")
    return name, setting.removesuffix(")")


EXPERIMENT = Experiment(
    "latency-accuracy",
    "Latency and accuracy on recorded links",
    lambda m: (
        f"accuracy target {m.target} and latency bounds of {', '.join(f'{b:g}' for b in contest.BOUNDS_MS)} ms; {m.traffic}"
    ),
    measure,
    show,
)
