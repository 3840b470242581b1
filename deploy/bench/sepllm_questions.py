"""Questions under masks: what of the cache they hold, and how far the answers are those of full attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...models.attention.pattern import Pattern
from ...models.language.decoder import Decoder
from ...models.language.generate import Sampling, generate_batch
from ...models.language.windows import window_logits
from .cells import Cells
from .questions import final
from .sepllm_masks import Mask, masks, seen, shares
from .sepllm_material import Material

_FULL = "answers/full"


def agreement(decoder: Decoder, material: Material, cells: Cells) -> list[Mask]:
    """Lets full attention answer; then measures, for SepLLM and for sinks and window at its mean share, the share of tokens of
    those answers that the mask too thinks likeliest. Returns the masks; none where the time is over."""
    answers = cells.cell(_FULL, lambda: _answers(material, Pattern(), None))
    if answers is None:
        return []
    sequences, neighbours = _sequences(material.asked, answers), material.sizes.neighbours
    compared = masks(sequences, material.separators, neighbours)[1 : 1 + 2 * len(neighbours)]
    for mask in compared:
        cells.cell(
            f"agreement/{mask.name}",
            lambda mask=mask: _agreeing(decoder, sequences, answers, mask, material.separators),
        )
    return compared


def answered(material: Material, compared: Sequence[Mask], cells: Cells) -> None:
    """Lets the model answer under each mask."""
    for mask in compared:
        separators = material.separators if mask.keep == "separators" else None
        cells.cell(
            f"answers/{mask.name}",
            lambda mask=mask, separators=separators: _answers(material, mask.pattern, separators),
        )


def _answers(material: Material, pattern: Pattern, separators: torch.Tensor | None) -> list[list[int]]:
    """Greedy, by the file's own few bits: they stand for the same weights, and decode faster."""
    decoder = Decoder(material.checkpoint, "quantised", pattern, separators=separators)
    most = [Sampling(material.sizes.answer)] * len(material.asked)
    return generate_batch(decoder, material.asked, material.tokenizer.ends, most)


def summarised(material: Material, compared: Sequence[Mask], cells: Cells) -> list[dict[str, Any]]:
    """Rows, a mask each, of what has been measured so far; `same_final` of `with_final` results that full attention gave."""
    full = cells.values.get(_FULL)
    if full is None:
        return []
    sequences, results = _sequences(material.asked, full), _finals(material, full)
    rows = []
    for mask in compared:
        counts = [seen(mask.pattern, some.shape[1], mask.kept(some, material.separators, 0)) for some in sequences]
        mean, peak = shares(counts)
        row: dict[str, Any] = {"mask": mask.name, "neighbours": mask.pattern.neighbours}
        row |= {"mean_share": round(mean, 4), "peak_share": round(peak, 4)}
        if (same := cells.values.get(f"agreement/{mask.name}")) is not None:
            tokens = sum(map(len, same))
            row |= {"tokens": tokens, "agreement": round(sum(map(sum, same)) / tokens, 4)}
        if (answers := cells.values.get(f"answers/{mask.name}")) is not None:
            pairs = list(zip(_finals(material, answers), results, strict=True))
            row["same_final"] = sum(a is not None and a == b for a, b in pairs)
            row["with_final"] = sum(b is not None for _, b in pairs)
        rows.append(row)
    return rows


def _finals(material: Material, answers: Sequence[Sequence[int]]) -> list[str | None]:
    return [final(material.tokenizer.decode(tokens)) for tokens in answers]


def _sequences(asked: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """(1, T) each, of a prompt and its answer."""
    return [torch.tensor([[*prompt, *said]]) for prompt, said in zip(asked, answers, strict=True)]


@torch.inference_mode()
def _agreeing(
    decoder: Decoder,
    sequences: Sequence[torch.Tensor],
    answers: Sequence[Sequence[int]],
    mask: Mask,
    separators: torch.Tensor,
) -> list[list[bool]]:
    """By answer, of each of its tokens: it is the likeliest under the mask, given all before it."""
    found = []
    for sequence, said in zip(sequences, answers, strict=True):
        logits = window_logits(decoder, sequence, mask.pattern, mask.kept(sequence, separators, 0))[
            0
        ]  # (T, vocabulary)
        likeliest = logits[-len(said) - 1 : -1].argmax(dim=-1)
        found.append((likeliest == torch.tensor(said)).tolist())
    return found
