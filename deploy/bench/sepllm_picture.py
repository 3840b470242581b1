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
        drawn = {"color": colour, "ls": dash, "marker": marker}
        before = [(row["mean_share"], row["perplexity"]) for name, row in rows.items() if name.startswith(start)]
        after = sorted((rows[name]["mean_share"], one) for name, one in trained.items() if name.startswith(start))
        if before:
            ax.plot(*zip(*before, strict=True), ms=5, label=label, **drawn)
        if after:
            ax.plot(*zip(*after, strict=True), ms=8, mfc="white", lw=0.9, **drawn)
    if trained:
        ax.plot([], [], color="black", ls="none", marker="o", ms=8, mfc="white", label="hollow: post-trained")
    ax.set(xlabel="mean key-value share (of full attention's)", ylabel="perplexity")
    ax.legend(loc="upper right")
