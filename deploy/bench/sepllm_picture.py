"""Perplexity against the mean key-value share, as a picture; readable without colour."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...models.cache import write_atomic
from ..plots import ENVIRONMENT_LINES, picture

_SERIES = (  # how a mask's name begins, and what the legend says
    ("sepllm", "SepLLM"),
    ("window, mean", "sinks and window, SepLLM's mean share"),
    ("window, peak", "sinks and window, SepLLM's peak share"),
    ("random", "random tokens"),
)


def save_picture(result: Mapping[str, Any], path: Path) -> None:
    """Draws what `bench_sepllm` measured into a .png or .svg. Raises StoreError: the disk refuses."""
    kind = path.suffix.lower().removeprefix(".")
    write_atomic(path, picture(lambda figure: _draw(figure, result), (7, 4.2), kind))


def _draw(figure: Figure, result: Mapping[str, Any]) -> None:
    ax, rows = figure.subplots(), {row["mask"]: row for row in result["perplexity"]}
    trained = {row["mask"]: row["perplexity"] for row in (result["post_training"] or {"masks": ()})["masks"]}
    if "full" in rows:
        ax.axhline(rows["full"]["perplexity"], color="black", lw=1.2, label="full attention")
    if "full" in trained:
        ax.axhline(trained["full"], color="black", lw=1.2, ls=":", label="full attention, post-trained")
    for (start, label), (colour, dash, marker) in zip(_SERIES, ENVIRONMENT_LINES, strict=False):
        before = [row for name, row in rows.items() if name.startswith(start)]
        if before:
            shares = [row["mean_share"] for row in before]
            perplexity = [row["perplexity"] for row in before]
            ax.plot(shares, perplexity, color=colour, ls=dash, marker=marker, ms=5, label=label)
        for name, perplexity in trained.items():
            if name.startswith(start):
                hollow = {"mfc": "white", "ms": 9, "ls": "none", "label": f"{label}, post-trained"}
                ax.plot(rows[name]["mean_share"], perplexity, color=colour, marker=marker, **hollow)
    ax.set(xlabel="mean key-value share (of full attention's)", ylabel="perplexity")
    ax.set_xlim(left=0)
    ax.legend()
