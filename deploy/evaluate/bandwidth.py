"""`bandwidth`: how the switcher follows a link in time, and how often the latency bound is broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ..timeline import ROUTES
from . import contest
from .experiment import Chart, Data, Experiment, Link, Material, Shown, Table

_WINDOW_S = 10.0
_SHOWN_S = 600.0
_CONSTANT_MBIT_PER_S = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
_NOTED = 0.2
"""A prediction farther off than this is looked into."""


def measure(material: Material) -> dict[str, Any]:
    look = material.looks[0]
    rows = []
    for link in material.links:
        for name, switcher in _objectives(material).items():
            run = contest.compete(material, look, link, contest.product(material, **switcher))
            first = run.replayed[0]
            window = np.floor(first.arrival_ms / 1e3 / _WINDOW_S).astype(int)
            bound = switcher.get("latency_bound_ms")
            rows.append(
                {
                    "link": link.name,
                    "objective": name,
                    "bound_ms": bound,
                    "mean_ms": round(float(run.latency_ms.mean()), 3),
                    "predicted_ms": round(_predicted(run), 3),
                    "missed_ms": round(_missed(run), 3),
                    "accuracy": round(float(run.right.mean()), 4),
                    "edge_share": run.shares["edge"],
                    "bound_broken": None if bound is None else _broken(run, bound),
                    "series": _series(first, window),
                }
            )
    return {
        "look": look,
        "window_s": _WINDOW_S,
        "traffic": str(material.traffic),
        "seeds": material.seeds,
        "samples": material.samples,
        "rows": rows,
        "constant": _on_constant_links(material),
    }


def _on_constant_links(material: Material) -> list[dict[str, Any]]:
    rows = []
    for mbit in _CONSTANT_MBIT_PER_S:
        link = Link.constant(mbit)
        for name, switcher in _objectives(material).items():
            run = contest.compete(material, material.looks[0], link, contest.product(material, **switcher))
            rows.append(
                {
                    "mbit_per_s": mbit,
                    "objective": name,
                    "mean_ms": round(float(run.latency_ms.mean()), 3),
                    "predicted_ms": round(_predicted(run), 3),
                }
            )
    return rows


def _objectives(material: Material) -> dict[str, dict[str, Any]]:
    bounds = {f"bound {b:g} ms": {"objective": "latency_bound", "latency_bound_ms": b} for b in contest.BOUNDS_MS}
    return {**bounds, f"target {material.target:g}": {"accuracy_target": material.target}}


def _predicted(run: contest.Run) -> float:
    """Mean over what the switcher had a finite prediction for."""
    predicted = np.concatenate([replayed.predicted_ms for replayed in run.replayed])
    return float(predicted[np.isfinite(predicted)].mean())


def _missed(run: contest.Run) -> float:
    """What queries that met their deadline took beyond their prediction, in ms over all samples."""
    total, predicted, route = (
        np.concatenate([getattr(replayed, name) for replayed in run.replayed])
        for name in ("total_ms", "predicted_ms", "route")
    )
    missed = (route == ROUTES.index("fallback")) & np.isfinite(predicted)
    return float((total - predicted)[missed].sum() / np.isfinite(predicted).sum())


def _broken(run: contest.Run, bound_ms: float) -> dict[str, float]:
    """Share of windows of time whose mean latency is above the bound, and of samples that are."""
    windows, samples = [], []
    for replayed in run.replayed:
        window = np.floor(replayed.arrival_ms / 1e3 / _WINDOW_S).astype(int)
        means = _means(replayed.total_ms, window)
        windows.append(means[~np.isnan(means)] > bound_ms)
        samples.append(replayed.total_ms > bound_ms)
    return {
        "windows": round(float(np.concatenate(windows).mean()), 4),
        "samples": round(float(np.concatenate(samples).mean()), 4),
    }


def _means(values: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Of the numbers among the values; NaN where there is none."""
    numbers = ~np.isnan(values)
    counts = np.bincount(window, numbers)
    return np.divide(
        np.bincount(window, np.where(numbers, values, 0.0)), counts, out=np.full(len(counts), np.nan), where=counts > 0
    )


def _series(replayed: Any, window: np.ndarray) -> dict[str, list[float | None]]:
    """Means by window of time, of the first seed."""
    shown = window < _SHOWN_S / _WINDOW_S
    columns = {
        "bandwidth_mbps": replayed.bandwidth_mbps,
        "threshold": np.where(np.isfinite(replayed.threshold), replayed.threshold, np.nan),
        "edge_share": (replayed.route == ROUTES.index("edge")).astype(float),
        "latency_ms": replayed.total_ms,
    }
    means = {name: _means(values[shown], window[shown]) for name, values in columns.items()}
    return {n: [None if np.isnan(v) else round(float(v), 5) for v in values] for n, values in means.items()}


def show(data: Data) -> Shown:
    table = Table(
        (
            "link, objective",
            "mean ms",
            "predicted ms",
            "edge share",
            "accuracy",
            "windows above the bound",
            "samples above",
        ),
        [
            (
                f"{row['link']}: {row['objective']}",
                f"{row['mean_ms']:.1f}",
                f"{row['predicted_ms']:.1f} ({_off_text(row, 0)})",
                f"{row['edge_share']:.0%}",
                f"{row['accuracy']:.3f}",
                *(
                    ("-", "-")
                    if row["bound_broken"] is None
                    else (f"{row['bound_broken'][k]:.1%}" for k in ("windows", "samples"))
                ),
            )
            for row in data["rows"]
        ],
        f"The bound is on the mean; windows are {data['window_s']:g} s. A sample that goes to the cloud may well be above it.",
    )
    bounded = [row for row in data["rows"] if row["bound_broken"] is not None]
    findings = [
        f"{row['link']}, {row['objective']}: mean {row['mean_ms']:.1f} ms, above the bound in "
        f"{row['bound_broken']['windows']:.0%} of all windows of {data['window_s']:g} s."
        for row in bounded
        if row["bound_ms"] == contest.BOUNDS_MS[1]
    ]
    findings += [_why(row) for row in data["rows"] if abs(_off(row)) > _NOTED]
    worst = max(data["constant"], key=lambda row: abs(_off(row)))
    findings.append(
        f"On constant links the prediction is at most {abs(_off(worst)):.1%} off ({worst['mbit_per_s']:g} Mbit/s, "
        f"{worst['objective']})."
    )
    links = sorted({row["link"] for row in data["rows"]}, key=[row["link"] for row in data["rows"]].index)
    charts = [
        Chart(
            f"bandwidth-{number}",
            f"{link}: the first {_SHOWN_S:g} s of one seed, means of {data['window_s']:g} s. Where there is no threshold, "
            f"everything is sent. {data['look']}; {data['traffic']}.",
            _drawn([row for row in data["rows"] if row["link"] == link], data["window_s"]),
            6.0,
        )
        for number, link in enumerate(links)
    ]
    objectives = list(dict.fromkeys(row["objective"] for row in data["constant"]))
    constant = Table(
        ("constant link", *objectives),
        [
            (
                f"{mbit:g} Mbit/s",
                *(
                    f"{row['mean_ms']:.1f} ({_off_text(row, 1)})"
                    for row in data["constant"]
                    if row["mbit_per_s"] == mbit
                ),
            )
            for mbit in dict.fromkeys(row["mbit_per_s"] for row in data["constant"])
        ],
        "Mean latency replayed, in ms, and how far off the switcher's predictions were, from a cold start.",
    )
    return Shown(findings, [table, constant], charts)


def _off(row: Data) -> float:
    return row["predicted_ms"] / row["mean_ms"] - 1


def _off_text(row: Data, digits: int) -> str:
    """In per cent; never -0."""
    return f"{round(100 * _off(row), digits) + 0.0:+.{digits}f}%"


def _why(row: Data) -> str:
    short_ms = row["mean_ms"] - row["predicted_ms"]
    return (
        f"{row['link']}, {row['objective']}: predicted {row['predicted_ms']:.1f} ms of {row['mean_ms']:.1f} ms. Of the "
        f"difference of {short_ms:.1f} ms, {row['missed_ms']:.1f} ms are queries that met their deadline, which no prediction "
        "foresees when they are sent; the rest is what waited for the link longer than the last answers did."
    )


_STYLES = (("#1f5a96", "-"), ("#b3261e", "--"), ("#3a9d6a", ":"), ("#222222", "-."))


def _drawn(rows: list[Data], window_s: float) -> Callable[[Figure], None]:
    panels = (
        ("bandwidth_mbps", "bandwidth\nestimate (Mbit/s)"),
        ("threshold", "threshold\n(margin, cosine)"),
        ("edge_share", "edge share"),
        ("latency_ms", "latency (ms)"),
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(panels), 1, sharex=True)
        for ax, (name, label) in zip(axes, panels, strict=True):
            for row, (colour, dash) in zip(rows, _STYLES, strict=True):
                values = [np.nan if v is None else v for v in row["series"][name]]
                ax.plot(np.arange(len(values)) * window_s, values, dash, color=colour, lw=1.3, label=row["objective"])
            ax.set_ylabel(label, fontsize=8)
            if name == "bandwidth_mbps":
                ax.set_yscale("log")  # the first answers may come so fast that hardly anything holds the estimate down
                ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                ax.yaxis.set_minor_formatter(NullFormatter())
            else:
                ax.set_ylim(bottom=0)
        axes[-1].set_xlabel("time (s)")
        figure.align_ylabels(axes)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)

    return draw


EXPERIMENT = Experiment(
    "bandwidth",
    "Along a link in time",
    lambda m: (
        f"latency bounds of {', '.join(f'{b:g}' for b in contest.BOUNDS_MS)} ms and accuracy target {m.target}; {m.traffic}"
    ),
    measure,
    show,
)
