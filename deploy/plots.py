"""The report's plots, drawn by matplotlib without pyplot: no window, no global figure, no lasting settings.

One colour, hatch and dash per thing, the same in every plot, and told apart without colour too.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from .timeline import ROUTES, Bins, Record

COLOURS = {
    "edge": "#1f5a96",
    "cloud": "#f2b134",
    "fallback": "#b3261e",
    "FM": "#5e3c99",
    "system": "#3a9d6a",
    "student": "#7fbde8",
}
HATCHES = {"edge": "", "cloud": "///", "fallback": "xxx", "FM": "", "system": "---", "student": "\\\\\\"}
DASHES = {"edge": "-", "cloud": "--", "fallback": ":"}
MARKERS = {"edge": "o", "cloud": "s", "fallback": "^"}
ENVIRONMENT_LINES: tuple[tuple[str, Any, str], ...] = (  # colour, dash, marker
    ("#222222", "-", "o"),
    ("#8c510a", "--", "s"),
    ("#7a7a7a", "-.", "^"),
    ("#4d7c0f", ":", "D"),
    ("#b0508e", (0, (6, 1, 1, 1, 1, 1)), "v"),
    ("#1b7f8c", (0, (8, 3)), "P"),
)
BANDS = ("#ececec", "#d2d2d2")
CDF_POINTS = 200
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.parse_math": False,  # a "$" in a label is a dollar sign
    "svg.fonttype": "none",  # text stays text: legible, searchable, small
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
}


def edge_share_axes(ax: Axes, environments: Sequence[Mapping[str, Any]]) -> None:
    """Plot (a): edge share against samples labelled by the FM; version 0 as a star."""
    if not environments:
        return _no_data(ax)
    for i, environment in enumerate(environments):
        colour, dash, marker = ENVIRONMENT_LINES[i % len(ENVIRONMENT_LINES)]
        samples, shares = zip(*environment["edge_share"], strict=True)
        ax.plot(
            samples,
            shares,
            color=colour,
            linestyle=dash,
            marker=marker,
            ms=4,
            label=short(environment["name"]),
        )
        if environment["version0"]["edge_share"] is not None:
            star = {"ms": 13, "mfc": "white", "mec": colour, "clip_on": False, "zorder": 5}
            ax.plot([0], [environment["version0"]["edge_share"]], "*", **star)
    ax.plot([], [], "*", ms=11, mfc="white", mec="#222222", label="version 0 (before any sample)")
    ax.set(xlabel="samples labelled by the FM", ylabel="edge share (%)")
    ax.set_xlim(left=0)
    low, high = ax.get_ylim()
    ax.set_ylim(max(0.0, min(low, high - 0.2)), min(1.02, max(high, low + 0.2)))
    ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))  # whole percents
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=None))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return None


def accuracy_axes(ax: Axes, environments: Sequence[Mapping[str, Any]]) -> None:
    """Plot (d): accuracy of FM, system, student and student version 0 per environment, values printed."""
    if not environments:
        return _no_data(ax)
    bars = (
        ("FM", "FM", lambda e: e["fm_accuracy"]),
        ("system (edge + cloud)", "system", lambda e: e["system_accuracy"]),
        ("student alone", "student", lambda e: e["student_accuracy"]),
        ("student alone, version 0", "student", lambda e: e["version0"]["student_accuracy"]),
    )
    x = np.arange(len(environments))
    width = 0.2
    for i, (label, thing, value) in enumerate(bars):
        heights = [float(value(e)) for e in environments]
        first = label.endswith("version 0")
        face, line = ("white", COLOURS[thing]) if first else (COLOURS[thing], "white")
        hatch = "" if first else HATCHES[thing]
        drawn = ax.bar(
            x + (i - 1.5) * width, heights, width * 0.92, color=face, edgecolor=line, hatch=hatch, label=label
        )
        ax.bar_label(
            drawn,
            [f"{100 * h:.1f}" for h in heights],
            padding=2,
            fontsize=8,
            rotation=90 if len(environments) > 4 else 0,
        )
    ax.set_xticks(x, [short(e["name"]) for e in environments])
    ax.set_xlim(-0.6, len(environments) - 0.4)
    ax.set_ylim(0, 1.1)
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=None))
    ax.set_ylabel("accuracy on the scoring images (%)")
    ax.grid(visible=False, axis="x")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return None


def routes_figure(fig: Figure, bins: Bins | None) -> None:
    """Plot (b): share of edge, cloud and fallback over time, under a strip that names the environments."""
    if bins is None:
        return _no_data(fig.subplots())
    strip, ax = fig.subplots(2, 1, sharex=True, height_ratios=(2, 12))
    base = np.zeros(len(bins.edges_s) - 1)
    for route in ROUTES:
        top = base + bins.share[route]
        style = {"facecolor": COLOURS[route], "edgecolor": "white", "hatch": HATCHES[route], "linewidth": 0}
        ax.stairs(top, bins.edges_s, baseline=base, fill=True, label=route, **style)
        base = top
    ax.set_ylim(0, 1)
    ax.set_ylabel("share of answers (%)")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=None))
    _time_axes(strip, [ax], bins)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return None


def switching_figure(fig: Figure, bins: Bins | None) -> None:
    """Plot (e): threshold (with the median margin) and bandwidth estimate over time."""
    if bins is None:
        return _no_data(fig.subplots())
    strip, upper, lower = fig.subplots(3, 1, sharex=True, height_ratios=(2, 7, 7))
    upper.stairs(bins.threshold, bins.edges_s, baseline=None, color="#111111", lw=1.6, label="threshold")
    middle_s = (bins.edges_s[:-1] + bins.edges_s[1:]) / 2
    upper.plot(middle_s, bins.margin, ":", color="#666666", lw=1.2, label="median margin")
    upper.set_ylabel("margin (cosine)")
    lower.stairs(
        bins.bandwidth_mbps,
        bins.edges_s,
        baseline=None,
        color="#111111",
        lw=1.6,
    )
    lower.set_ylabel("bandwidth\nestimate (Mbit/s)")
    lower.set_ylim(bottom=0)
    _time_axes(strip, [upper, lower], bins)
    fig.legend(*upper.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return None


def latency_axes(ax: Axes, timeline: Sequence[Record]) -> None:
    """Plot (c): cumulative distribution of the end-to-end latency per route; filled marks at p50 and p95."""
    if not timeline:
        return _no_data(ax)
    for route in ROUTES:
        total_ms = np.array([record["total_ms"] for record in timeline if record["route"] == route], dtype=float)
        if not total_ms.size:
            continue
        total_ms = np.maximum(total_ms, 1e-3)  # a log axis has no zero
        q = np.linspace(0, 1, min(CDF_POINTS, max(2, total_ms.size)))
        marks = np.searchsorted(q, (0.5, 0.95))
        ax.plot(
            np.quantile(total_ms, q),
            q,
            lw=2,
            ms=6,
            markevery=list(marks),
            label=f"{route} ({total_ms.size:,})",
            color=COLOURS[route],
            linestyle=DASHES[route],
            marker=MARKERS[route],
        )
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=None))
    ax.set(xlabel="time to the answer (ms, log scale)", ylabel="answers within this time (%)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return None


def _time_axes(strip: Axes, axes: Sequence[Axes], bins: Bins) -> None:
    """Environment bands in the strip and behind `axes`, dashed lines at new students, the time axis below."""
    start, end = bins.edges_s[0], bins.edges_s[-1]
    for i, (left, right, name) in enumerate(bins.bands):
        strip.axvspan(left, right, ymin=0.5, color=BANDS[i % 2], lw=0)
        if right - left > 0.08 * (end - start):
            strip.text((left + right) / 2, 0.74, short(name), ha="center", va="center", fontsize=8, clip_on=True)
        for ax in axes:
            ax.axvspan(left, right, color=BANDS[i % 2], alpha=0.45, lw=0, zorder=0)
    strip.set_axis_off()
    strip.set_ylim(0, 1)
    labelled_s = -np.inf
    for time_s, version in bins.new_students:
        for ax in axes:
            ax.axvline(time_s, color="black", ls=(0, (4, 2)), lw=1)
        if time_s - labelled_s > 0.035 * (end - start):
            strip.text(time_s, 0.16, f"v{version}", ha="center", va="center", fontsize=8)
            labelled_s = time_s
    axes[-1].set_xlim(start, end)
    axes[-1].set_xlabel("time since the start (s)")


def _no_data(ax: Axes) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, "No data in this run.", ha="center", va="center", color="#555555", transform=ax.transAxes)


def short(name: object, length: int = 26) -> str:
    text = str(name)
    return text if len(text) <= length else text[: length - 1] + "…"


@contextmanager
def _styled() -> Iterator[None]:
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has other fonts
        yield


def svg(name: str, draw: Callable[[Figure], None], height_in: float) -> str:
    """An `<svg>` element for an HTML page: no prolog, namespaces or metadata; its ids begin with `name`."""
    buffer = io.StringIO()
    with _styled(), mpl.rc_context({"svg.hashsalt": name}):
        figure = Figure(figsize=(8, height_in), layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: '[^;\"]*", "font-family: inherit", text)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    return f'<svg {box.group(0) if box else ""} role="img" aria-labelledby="{name}-caption">{body}'


def picture(draw: Callable[[Figure], None], size_in: tuple[float, float], kind: str = "png", dpi: int = 110) -> bytes:
    """A file of that kind (`png`, `svg`), the same for the same drawing."""
    buffer = io.BytesIO()
    with _styled(), mpl.rc_context({"svg.hashsalt": "edgefm"}):
        figure = Figure(figsize=size_in, layout="constrained", dpi=dpi)
        draw(figure)
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def save_png(path: Path, draw: Callable[[Figure], None], size_in: tuple[float, float], dpi: int = 110) -> None:
    path.write_bytes(picture(draw, size_in, dpi=dpi))
