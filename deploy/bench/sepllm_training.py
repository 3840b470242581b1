"""What post-training makes of a mask: the same tokens of other books, all weights, for SepLLM, for sinks and window at its mean
share, and for full attention, which shows what the books alone teach."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...models.language.decoder import Decoder
from ...models.language.train import Training, post_train
from .books import windows
from .cells import Cells
from .sepllm_masks import Mask
from .sepllm_material import Material
from .sepllm_perplexity import losses_of, ratio, score

RATES = (3e-5, 1e-4, 3e-4)


def post_trained(material: Material, masks: Sequence[Mask], tokens: int, cells: Cells) -> dict[str, Any] | None:
    """Finds a learning rate with SepLLM, then trains under each of three masks; None where the time is over.

    Args:
        masks: of `sepllm_masks.masks`: full attention, SepLLM, sinks and window.
        tokens: for each.

    Returns:
        `rate`, `swept` (losses on windows not trained on, by rate), and by mask what `_trained` measures, `masks`.
    """
    sizes, encode = material.sizes, material.tokenizer.encode
    count = max(tokens // sizes.trained, 1)
    drawn = windows(material.others, 2 * sizes.swept + count, sizes.trained, encode, material.seed)
    swept, held_out, learnt = drawn.split((sizes.swept, sizes.swept, count))
    full, sepllm, window = masks[:3]
    losses = {}
    for rate in RATES:
        found = cells.cell(f"sweep/{rate:g}", lambda rate=rate: _swept(material, swept, held_out, sepllm, rate))
        if found is None:
            return None
        losses[rate] = found
    best = min(losses, key=lambda rate: losses[rate])
    found = {
        mask.name: cells.cell(
            f"post-training/{mask.name}/{learnt.numel()} tokens",
            lambda mask=mask: _trained(material, learnt, mask, best),
        )
        for mask in (sepllm, window, full)
    }
    return {
        "rate": best,
        "swept": {f"{rate:g}": loss for rate, loss in losses.items()},
        "tokens": learnt.numel(),
        "window": sizes.trained,
        "batch": Training().batch,
        "masks": {name: one for name, one in found.items() if one is not None},
    }


def _swept(material: Material, learnt: torch.Tensor, held_out: torch.Tensor, mask: Mask, rate: float) -> float:
    decoder = Decoder(material.checkpoint)
    for _ in post_train(decoder, learnt, mask.pattern, mask.kept(learnt, material.separators, 0), Training(rate)):
        pass
    losses = score(decoder, held_out, mask, material.separators, 0)
    return round(sum(losses) / len(losses), 5)


def _trained(material: Material, learnt: torch.Tensor, mask: Mask, rate: float) -> dict[str, Any]:
    """Losses of every step and minutes, then (rounds, books) losses of the windows that are scored."""
    decoder, began = Decoder(material.checkpoint), time.perf_counter()
    kept = mask.kept(learnt, material.separators, 0)
    steps = [round(loss, 4) for loss in post_train(decoder, learnt, mask.pattern, kept, Training(rate))]
    minutes = (time.perf_counter() - began) / 60
    rounds = material.scored.unbind(dim=1)
    after = [score(decoder, some, mask, material.separators, 0) for some in rounds]
    return {"step_losses": steps, "minutes": round(minutes, 1), "after": after}


def compared(found: dict[str, Any], material: Material, cells: Cells) -> dict[str, Any]:
    """The same with a row for each mask: perplexity after training, and before it on the windows that have been scored then."""
    after = {name: one["after"] for name, one in found["masks"].items()}
    rows = []
    for name, one in found["masks"].items():
        row = {"mask": name, "minutes": one["minutes"], "step_losses": one["step_losses"]}
        row |= {"windows": np.size(after[name]), "perplexity": round(math.exp(np.mean(after[name])), 3)}
        row["of_before"] = ratio(after[name], losses_of(name, material, cells))
        row |= {f"of {other}": ratio(after[name], after[other]) for other in after if other != name}
        rows.append(row)
    return {**found, "masks": rows}
