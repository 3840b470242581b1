"""One colour, dash and mark for each thing in all charts of the laboratory, told apart in greyscale too."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from .study import FULL, HEAD

LINES: dict[str, dict[str, Any]] = {
    FULL: {"color": "#1f5a96", "linestyle": "-", "marker": "o"},
    HEAD: {"color": "#b3261e", "linestyle": "--", "marker": "s"},
    "version 0": {"color": "#555555", "linestyle": (0, (5, 3)), "lw": 1.2},
}

OTHERS: tuple[dict[str, Any], ...] = (  # of what is neither a system nor a way of learning
    {"color": "#00798c", "linestyle": "-", "marker": "o"},
    {"color": "#c2185b", "linestyle": "--", "marker": "s"},
    {"color": "#8a8d80", "linestyle": ":", "marker": "^"},
)

SYSTEMS: dict[str, dict[str, Any]] = {  # of bars and marks, dark to light
    "edgefm": {"color": "#1f5a96", "hatch": "", "marker": "o"},
    "cloud-only": {"color": "#f2b134", "hatch": "///", "marker": "s"},
    "edge-only": {"color": "#7fbde8", "hatch": "\\\\\\", "marker": "v"},
    "edge-only, version 0": {"color": "#d5d5d5", "hatch": "...", "marker": "^"},
    "fixed-threshold": {"color": "#b3261e", "hatch": "xxx", "marker": "D"},
    "oracle-threshold": {"color": "#3a9d6a", "hatch": "---", "marker": "P"},
    "spinn": {"color": "#5e3c99", "hatch": "++", "marker": "X"},
    "persephonee": {"color": "#8c510a", "hatch": "oo", "marker": "*"},
    "FM on the device": {"color": "#222222", "hatch": "**", "marker": "p"},
}


def system_style(name: str) -> dict[str, Any]:
    """Of a system, whatever bound follows its name in brackets."""
    return SYSTEMS[name.split(" (")[0]]


def percent(ax: Axes, value: str) -> None:
    """Limits of an axis in per cent; differences keep their own."""
    if value == "edge_share":
        ax.set_ylim(0, 102)
    else:
        ax.axhline(0, color="#222222", lw=0.8)
