"""What post-training makes of a mask: the same tokens of other books, all weights, for SepLLM, its rivals at equal shares, and
full attention, which shows what the books alone teach."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ...models.language.decoder import Decoder
from ...models.language.train import Training, post_train
from ...models.language.weights import Checkpoint
from .books import windows
from .cells import Cells
from .devices import told
from .sepllm_masks import Mask
from .sepllm_material import Material
from .sepllm_perplexity import Losses, losses_of, ratio, relations, score

RATES = (3e-5, 1e-4, 3e-4, 1e-3)
_FIRST = 3
"""Full attention, SepLLM and its window of the first n: trained before the others."""


@dataclass(frozen=True)
class PostTraining:
    """Attributes:
    tokens: that each mask learns from.
    batch: windows a step.
    """

    tokens: int
    batch: int


def post_trained(
    material: Material, masks: Sequence[Mask], training: PostTraining, device: torch.device, cells: Cells
) -> dict[str, Any] | None:
    """Finds a learning rate with SepLLM of the first n, then trains under each mask; None where the time is over.

    Args:
        masks: of `sepllm_masks.masks`.

    Returns:
        `rate`, `swept` (losses on windows not trained on, by rate), and by mask what `_trained` measures, `masks`.
    """
    length, encode = material.sizes.trained, material.tokenizer.encode
    count = max(training.tokens // length, 1)
    tried = max(count // 8, training.batch)
    drawn = windows(material.others, tried + training.batch + count, length, encode, material.seed)
    swept, held_out, learnt = drawn.split((tried, training.batch, count))
    checkpoint, name = _kept_in_memory(material.checkpoint), f"{learnt.numel()} tokens, {training.batch} windows a step"
    losses = {}
    for rate in RATES:

        def sweep(rate: float = rate) -> float:
            decoder = Decoder(checkpoint, device=device)
            _learn(decoder, material, swept, masks[1], Training(rate, training.batch))
            return round(float(np.mean(score(decoder, held_out, masks[1], material.separators, 0))), 5)

        found = cells.cell(f"sweep/{rate:g}/{name}", sweep, told(device))
        if found is None:
            return None
        losses[rate] = found
    best = Training(min(losses, key=lambda rate: losses[rate]), training.batch)
    found = {
        mask.name: cells.cell(
            f"post-training/{mask.name}/{name}",
            lambda mask=mask: _trained(Decoder(checkpoint, device=device), material, learnt, mask, best),
            told(device),
        )
        for mask in (*masks[1:_FIRST], masks[0], *masks[_FIRST:])
    }
    return {
        "rate": best.learning_rate,
        "swept": {f"{rate:g}": loss for rate, loss in losses.items()},
        "swept_tokens": swept.numel(),
        "tokens": learnt.numel(),
        "window": length,
        "batch": best.batch,
        "masks": {name: one for name, one in found.items() if one is not None},
    }


def _kept_in_memory(checkpoint: Checkpoint) -> Checkpoint:
    """Whose weights are unpacked once; copies come out, as training changes them."""
    read = functools.cache(checkpoint.read)
    return replace(checkpoint, read=lambda name: read(name).clone())


def _learn(decoder: Decoder, material: Material, tokens: torch.Tensor, mask: Mask, training: Training) -> list[float]:
    kept = mask.kept(tokens, material.separators, 0)
    return list(post_train(decoder, tokens, mask.pattern, kept, training))


def _trained(
    decoder: Decoder, material: Material, learnt: torch.Tensor, mask: Mask, training: Training
) -> dict[str, Any]:
    """Mean losses of each tenth of the steps and minutes, then (rounds, books) losses of the windows that are scored."""
    began = time.perf_counter()
    losses = _learn(decoder, material, learnt, mask, training)
    minutes = (time.perf_counter() - began) / 60
    after = [
        score(decoder, some, mask, material.separators, material.seed + number)
        for number, some in enumerate(material.scored.unbind(dim=1))
    ]
    tenths = [round(float(np.mean(part)), 4) for part in np.array_split(losses, min(len(losses), 10))]
    return {"losses": tenths, "minutes": round(minutes, 2), "after": after}


def compared(found: dict[str, Any], material: Material, cells: Cells) -> dict[str, Any]:
    """The same with a row for each mask: perplexity after training over that before it on the windows that have been scored
    then, over full attention's after training and, for SepLLM's rivals, over its with the same n."""
    after: dict[str, Losses] = {name: one["after"] for name, one in found["masks"].items()}
    rows = []
    for name, one in found["masks"].items():
        row = {"mask": name, "minutes": one["minutes"], "losses": one["losses"]}
        row |= {"windows": np.size(after[name]), "perplexity": round(math.exp(np.mean(after[name])), 3)}
        row["of_before"] = ratio(after[name], losses_of(name, material, cells))
        rows.append(row | relations(name, after))
    return {**found, "masks": rows}
