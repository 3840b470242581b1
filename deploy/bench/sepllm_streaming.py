"""A book through key-value caches of a fixed size, many times longer than they are: perplexity on the way, time, memory."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import asdict
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ...models.attention.cache import StreamingBudget
from ...models.language.decoder import Decoder
from ...models.language.streaming import StreamingDecoder
from .high_water import lowered, risen_mib
from .sepllm_material import Material

BUDGETS = {
    "sepllm": StreamingBudget(4, 64, 256, 800),
    "sinks and window": StreamingBudget(4, 0, 320, 800),  # of the same capacity and the same mean usage
}


def stream(decoder: Decoder, tokens: torch.Tensor, budget: StreamingBudget, material: Material) -> dict[str, Any]:
    """Of (T,) tokens, in chunks as long as the cache has room: one entry after the other would be the same.

    Returns:
        JSON data: by 10,240 tokens (`Sizes.reported`) perplexity, ms a token, and how far memory has risen since the
        beginning; mean usage from the first compression on, beside the formula's.
    """
    streaming, reported = StreamingDecoder(decoder, budget, material.separators), material.sizes.reported
    gc.collect()
    before, state = lowered(), streaming.begin()
    losses = torch.empty(0)  # of what has been predicted
    usage: list[int] = []  # after each token
    rows, began = [], time.perf_counter()
    while state.length < len(tokens):
        room = streaming.make_room(state)
        to_report = reported - state.length % reported
        part = tokens[state.length : state.length + min(room, to_report)]
        ahead = tokens[state.length + 1 : state.length + 1 + len(part)]
        logits = streaming.prefill(state, part, every=True)  # (T, vocabulary)
        losses = torch.cat((losses, cross_entropy(logits[: len(ahead)], ahead, reduction="none")))
        held = len(state.caches[0])
        usage += range(held - len(part) + 1, held + 1)
        if state.length % reported == 0 or state.length == len(tokens):
            some, ended = losses[len(rows) * reported :], time.perf_counter()
            row = {"tokens": state.length, "perplexity": round(math.exp(some.mean()), 3)}
            row |= {"ms_per_token": round((ended - began) * 1e3 / len(some), 2)}
            rows.append(row | {"risen_mib": round(risen_mib(before))})
            began = ended
    steady = usage[budget.capacity :]
    return {
        "budget": asdict(budget),
        "rows": rows,
        "perplexity": round(math.exp(losses.mean()), 3),
        "mean_usage": round(sum(steady) / max(len(steady), 1), 1),
        "formula": budget.mean_usage,
        "peak_usage": max(usage),
    }
