"""A trace in the terminal: its figures, and a chart whose columns are as high as the mean rate of their stretch of time."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..logs import plain
from .rates import rates_of_trace
from .statistics import OUTAGE_MS, TraceSummary, outages
from .trace import Trace

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:#"
_OUTAGE = "x"
_AXIS = 9  # characters left of the columns
_NARROWEST = 40


def print_trace(trace: Trace, summary: TraceSummary, console: Console) -> None:
    """The figures, then the chart, as wide as the console."""
    percentiles = "  ".join(f"p{p} {figure(rate)}" for p, rate in summary.percentiles_mbit_per_s.items())
    outage = f"{summary.outages} of {summary.outage_ms} ms or more"
    if summary.outages:
        outage += f", longest {summary.longest_outage_ms:,} ms, {100 * summary.outage_share:.2g} % of the time"
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in (
        ("trace", plain(summary.name)),
        ("duration", f"{figure(summary.duration_s)} s, {summary.opportunities:,} packets of 1500 bytes"),
        ("mean", f"{figure(summary.mean_mbit_per_s)} Mbit/s"),
        (f"in {summary.window_ms} ms", f"{percentiles}  Mbit/s"),
        ("outages", outage),
    ):
        table.add_row(Text(name, "dim"), Text(value))
    console.print(table)
    console.print()
    chart = draw_trace(trace, console.width, outage_ms=summary.outage_ms, ascii_only=console.options.ascii_only)
    console.print(Text(chart), soft_wrap=True)


def draw_trace(trace: Trace, width: int, height: int = 8, outage_ms: int = OUTAGE_MS, ascii_only: bool = False) -> str:
    """`height` + 3 lines of at most `width` characters (but 40): columns, outages, time axis, unit."""
    levels = _ASCII if ascii_only else _EIGHTHS
    steps = len(levels) - 1  # in a character's height
    window_ms = -(-trace.period_ms // (max(width, _NARROWEST) - _AXIS))
    _, mbit_per_s = rates_of_trace(trace, window_ms)
    columns, top = mbit_per_s.size, mbit_per_s.max()
    heights = np.rint(mbit_per_s / top * height * steps).astype(int)
    lines = []
    for row in range(height, 0, -1):
        label = figure(row / height * top) if row in (height, height // 2) else ""
        bars = "".join(levels[part] for part in np.clip(heights - (row - 1) * steps, 0, steps))
        lines.append(f"{label:>7} |{bars}")
    begun = np.zeros(columns + 1, dtype=int)
    for start_ms, end_ms in zip(*outages(trace, outage_ms), strict=True):
        begun[start_ms // window_ms] += 1
        begun[(end_ms - 1) // window_ms + 1] -= 1
    marks = "".join(_OUTAGE if out else " " for out in np.cumsum(begun[:-1]))
    end = f"{figure(trace.duration_s)} s"
    lines.append(f"{'0':>7} |{marks}")
    lines.append(f"{'':{_AXIS}}0 s{end:>{max(columns - 3, len(end) + 1)}}")
    lines.append(f"{'':{_AXIS}}Mbit/s in {figure(window_ms)} ms; {_OUTAGE}: outages")
    return "\n".join(line.rstrip() for line in lines)


def figure(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
