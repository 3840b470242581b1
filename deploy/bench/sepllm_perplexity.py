"""Perplexity of books under masks of attention, and how far two masks are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...models.language.decoder import Decoder
from ...models.language.windows import window_losses
from .bootstrap import interval
from .cells import Cells
from .devices import told
from .sepllm_masks import Mask, seen, shares
from .sepllm_material import Material

Losses = Sequence[Sequence[float]]
"""(rounds, books): nats a token of the windows that were scored."""


def score(decoder: Decoder, windows: torch.Tensor, mask: Mask, separators: torch.Tensor, seed: int) -> list[float]:
    """Nats a token of each of (B, T) windows."""
    kept = mask.kept(windows, separators, seed)
    found = []
    with torch.inference_mode():
        for row, window in enumerate(windows):  # one at a time: the logits of one are what memory holds
            one = None if kept is None else kept[row : row + 1]
            found.append(round(float(window_losses(decoder, window[None], mask.pattern, one)[0]), 5))
    return found


def score_round(decoder: Decoder, material: Material, masks: Sequence[Mask], number: int, cells: Cells) -> None:
    """The window `number` of every book under every mask."""
    windows, seed = material.scored[:, number], material.seed + number
    for mask in masks:
        cells.cell(
            _name(mask.name, number),
            lambda mask=mask: score(decoder, windows, mask, material.separators, seed),
            told(decoder.device),
        )


def losses_of(name: str, material: Material, cells: Cells) -> Losses:
    """Of a mask, as far as it has been scored."""
    found = (cells.values.get(_name(name, number)) for number in range(material.sizes.rounds))
    return [losses for losses in found if losses is not None]


def perplexities(material: Material, masks: Sequence[Mask], cells: Cells) -> list[dict[str, Any]]:
    """Rows, a mask each, of what has been scored so far: shares over all windows, perplexity by book and over all, the latter
    over full attention's and, for SepLLM's rivals, over its with the same n."""
    losses = {mask.name: losses_of(mask.name, material, cells) for mask in masks}
    rows = []
    for mask in masks:
        scored = np.array(losses[mask.name])  # (rounds, books)
        if not len(scored):
            continue
        counts = [
            seen(mask.pattern, material.sizes.window, mask.kept(windows, material.separators, material.seed + number))
            for number, windows in enumerate(material.scored.unbind(dim=1))
        ]
        mean, peak = shares(counts)
        row: dict[str, Any] = {"mask": mask.name, "neighbours": mask.pattern.neighbours, "keep": mask.keep}
        row |= {"mean_share": round(mean, 4), "peak_share": round(peak, 4), "windows": scored.size}
        row |= {"perplexity": round(math.exp(scored.mean()), 3)}
        by_book = zip(material.names, scored.mean(axis=0), strict=True)
        row["by_book"] = {book: round(math.exp(loss), 2) for book, loss in by_book}
        rows.append(row | relations(mask.name, losses))
    return rows


def relations(name: str, losses: Mapping[str, Losses]) -> dict[str, Any]:
    """A mask's perplexity over full attention's and, for SepLLM's rivals, over its with the same n; what is not there is left
    out."""
    own = f"sepllm n={name.rpartition('=')[2]}"
    others = {"of_full": "full", "of_sepllm": own}
    return {
        key: ratio(losses[name], losses[other]) for key, other in others.items() if other in losses and other != name
    }


def _name(mask: str, number: int) -> str:
    return f"perplexity/{mask}/{number}"


def ratio(losses: Losses, beside: Losses) -> dict[str, Any] | None:
    """Of two perplexities on the same windows, with its 95 % bootstrap interval over books and windows; None without any."""
    rounds = min(len(losses), len(beside))
    if not rounds:
        return None
    apart = (np.array(losses[:rounds]) - np.array(beside[:rounds])).T  # (books, rounds)
    low, high = (round(math.exp(bound), 4) for bound in interval(apart))
    return {"ratio": round(math.exp(apart.mean()), 4), "interval": [low, high]}
