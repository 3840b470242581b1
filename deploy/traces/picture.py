"""A trace as a picture, drawn by matplotlib; readable without colour."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ...models.cache import write_atomic
from ...models.errors import ConfigError
from ..plots import COLOURS, picture, short
from .rates import rates_of_trace
from .statistics import TraceSummary, outages
from .trace import Trace

SUFFIXES = (".png", ".svg")
_MOST_STEPS = 2000


def check_picture_name(path: Path) -> None:
    """Raises `ConfigError` unless the name ends in `.png` or `.svg`."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"a picture's name ends in {' or '.join(SUFFIXES)}; got {path}")


def save_picture(trace: Trace, summary: TraceSummary, path: Path) -> None:
    """Draws rate over time, mean and percentiles, and outages, into a PNG or SVG.

    Raises:
        ConfigError: the name ends in neither. StoreError: the disk refuses.
    """
    check_picture_name(path)
    kind = "png" if path.suffix.lower() == ".png" else "svg"
    write_atomic(path, picture(lambda figure: _draw(figure, trace, summary), (9, 3.6), kind))


def _draw(figure: Figure, trace: Trace, summary: TraceSummary) -> None:
    window_ms = max(summary.window_ms, -(-trace.period_ms // _MOST_STEPS))
    edges_ms, mbit_per_s = rates_of_trace(trace, window_ms)
    starts_ms, ends_ms = outages(trace, summary.outage_ms)
    ax, strip = figure.subplots(2, 1, sharex=True, height_ratios=(14, 1))
    ax.stairs(mbit_per_s, edges_ms / 1000, fill=True, color=COLOURS["student"], label=f"mean of {window_ms} ms")
    ax.stairs(mbit_per_s, edges_ms / 1000, baseline=None, color=COLOURS["edge"], lw=0.8)
    ax.axhline(summary.mean_mbit_per_s, color="black", lw=1.4, label=f"mean {summary.mean_mbit_per_s:.3g}")
    for percentile, dash in ((95, (0, (6, 3))), (50, (0, (3, 2))), (5, (0, (1, 2)))):
        rate = summary.percentiles_mbit_per_s[percentile]
        ax.axhline(rate, color="#444444", ls=dash, lw=1.1, label=f"{percentile}th percentile {rate:.3g}")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("rate (Mbit/s)")
    ax.set_xlim(0, trace.duration_s)
    title = f"{short(summary.name, 60)}: {summary.outages} outages of {summary.outage_ms} ms or more"
    ax.set_title(f"{title}, {100 * summary.outage_share:.1f} % of the time", fontsize=9, loc="left")
    strip.broken_barh(
        [*zip(starts_ms / 1000, (ends_ms - starts_ms) / 1000, strict=True)], (0, 1), color="black", lw=0.8
    )
    strip.set_ylim(0, 1)
    strip.set_yticks([0.5], ["outages"])
    strip.grid(visible=False)
    strip.set_xlabel("time (s)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5)
