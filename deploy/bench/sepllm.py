"""`edgefm bench sepllm`: SepLLM on real text beside full attention, sinks and window, and tokens kept at random.

Perplexity of books at equal shares of key-value entries, without training and after it; a long stream through a cache of fixed
size; answers to questions. Books are scored round by round under all masks, and parts are written down as they come, so that
what was cut short is balanced and goes on where it ended.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...models.language.decoder import Decoder
from ..demo_results import describe_environment
from . import sepllm_questions, sepllm_training
from .cells import Cells
from .sepllm_masks import masks
from .sepllm_material import Sizes, load_material
from .sepllm_perplexity import perplexities, score_round
from .sepllm_streaming import BUDGETS, stream
from .sepllm_training import PostTraining


def bench_sepllm(
    weights: Path,
    books: Path,
    questions: Path,
    training: PostTraining | None,
    device: torch.device,
    minutes: float | None,
    seed: int,
    partial: Path | None,
    console: Console,
    sizes: Sizes | None = None,
) -> dict[str, Any]:
    """JSON data; `complete` is false where something is missing because the time was over.

    Args:
        training: None: nothing is trained.
        device: of perplexity and training. Streams and answers are measured on the CPU, whose time they tell.
        minutes, partial: see `Cells`.

    Raises:
        InputError: books or questions cannot be read, or are too few; the parts are of other settings.
        ModelError: the model cannot be read.
    """
    sizes = sizes or Sizes()
    material = load_material(weights, books, questions, seed, sizes)
    settings = {"model": weights.name, "seed": seed, "sizes": asdict(sizes), "books": material.names}
    cells = Cells(partial, settings, console, minutes)
    compared = masks([material.scored.flatten(0, 1)], material.separators, sizes.neighbours)
    decoder = Decoder(material.checkpoint, device=device)
    slow = decoder if device.type == "cpu" else Decoder(material.checkpoint)

    first = compared[: 1 + 2 * len(sizes.neighbours)]  # full attention, SepLLM, windows of its mean share
    score_round(decoder, material, first, 0, cells)
    answering = sepllm_questions.agreement(slow, material, cells)
    book, tokens = material.long
    streams = {
        name: cells.cell(f"streaming/{name}", lambda budget=budget: stream(slow, tokens, budget, material))
        for name, budget in BUDGETS.items()
    }
    for number in range(sizes.rounds):
        score_round(decoder, material, compared, number, cells)
    learnt = sepllm_training.post_trained(material, compared, training, device, cells) if training else None
    sepllm_questions.answered(material, answering, cells)

    rows = perplexities(material, compared, cells)
    for row in rows:
        console.print(f"{row['mask']}: {row['mean_share']:.3f} of the entries, perplexity {row['perplexity']:.2f}")
    return {
        **settings,
        "complete": cells.complete,
        "separator_share": round(float(material.separators[material.scored].double().mean()), 4),
        "perplexity": rows,
        "post_training": learnt and sepllm_training.compared(learnt, material, cells),
        "streaming": {"book": book, **streams},
        "questions": sepllm_questions.summarised(material, answering, cells),
        "seconds": cells.seconds,
        "devices": cells.devices,
        "threads": torch.get_num_threads(),
        "environment": describe_environment(seed),
    }
