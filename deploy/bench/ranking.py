"""`edgefm bench ranking`: what the language model adds to the FM on the samples that the FM is least sure of.

A place shows some of its labels more often than others: of one label all images, of the next half of them, then a third, and
so on, in an order that every seed draws anew; none of them twice. Half of what is shown has been there before; the FM's answers
to it are counted, and the model is told of them. Of the other half, the samples with the smallest margins are ranked anew: by
the FM alone, with the counts, as the product does, and with the model's opinion beside them. Ground truth chooses what a place
shows, and scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from ...cloud.language import uses
from ...cloud.language.machine import DecoderMachine
from ...cloud.recent import RECENT
from ...models.foundation import FoundationModel, build_pool, load_foundation_model
from ...models.language.decoder import Decoder
from ...models.language.tokenizer import Message, TextTokenizer, tokenizer_of
from ...models.language.weights import open_checkpoint
from ...models.pool import LabelPool, Recognition
from ..demo_results import describe_environment
from .bootstrap import interval
from .labels import Scored

CANDIDATES = 5
UNSURE = 0.25
"""Share of a place's samples that are ranked anew."""
WEIGHTS = (0.1, 0.25, 0.5, 1.0)
"""Of the model's opinion (`rank_weight` of the cloud's settings)."""


def bench_ranking(data: Sequence[Path], weights: Path, labels: int, seeds: int, console: Console) -> dict[str, Any]:
    """Shares of unsure samples answered right, with 95 % intervals of the differences over seeds and images.

    Args:
        labels: of a place; where the data has more, every seed draws that many.

    Raises:
        InputError: a data set has no images below `val/<label>/`.
    """
    model, checkpoint = load_foundation_model("synclip"), open_checkpoint(weights)
    tokenizer = tokenizer_of(checkpoint)
    machine = DecoderMachine(Decoder(checkpoint, "quantised"), tokenizer.ends)
    rows = []
    for path in data:
        data_set = Scored.open(path, model)
        by_seed = []
        for seed in range(seeds):
            place = Place.draw(data_set, model, labels, seed)
            told = f"{place.name}, seed {seed}"
            by_seed.append(
                [
                    (row, _ranked_right(place, row, machine, tokenizer))
                    for row in track(place.unsure, told, console=console)
                ]
            )
        drawn = min(labels, len(set(data_set.truth)))
        rows.append({"data": data_set.name, "labels": drawn} | _row(by_seed, len(data_set.truth)))
        ways = ((name, way["right"]) for name, way in rows[-1].items() if isinstance(way, dict))
        console.print(f"{data_set.name}: " + ", ".join(f"{name} {share:.3f}" for name, share in ways))
    return {
        "language_model": weights.name,
        "candidates": CANDIDATES,
        "unsure": UNSURE,
        "seeds": seeds,
        "rows": rows,
        "environment": describe_environment(0),
    }


@dataclass(frozen=True)
class Place:
    """What one seed shows of a data set.

    Attributes:
        found: of the M images of the data set.
        recent: the FM's answers to the earlier half of what is shown, oldest first.
        unsure: rows of the later half that are ranked anew.
    """

    name: str
    truth: np.ndarray  # (M,) str
    pool: LabelPool
    found: Recognition
    recent: list[str]
    unsure: np.ndarray

    @classmethod
    def draw(cls, data: Scored, model: FoundationModel, count: int, seed: int) -> Place:
        random = np.random.default_rng(seed)
        labels = random.permutation(sorted(set(data.truth)))[:count].tolist()
        pool = build_pool(model, sorted(labels))
        found = pool.recognise(data.embeddings, CANDIDATES)
        shares = {label: 1 / (n + 1) for n, label in enumerate(labels)}
        shown = random.permutation(len(data.truth))
        shown = shown[[random.random() < shares.get(label, 0.0) for label in data.truth[shown]]]
        earlier, later = shown[: len(shown) // 2], shown[len(shown) // 2 :]
        answers = pool.answers(found)
        unsure = later[np.argsort(found.margins[later])[: math.ceil(UNSURE * len(later))]]
        return cls(Path(data.name).stem, data.truth, pool, found, [answers[row] for row in earlier[-RECENT:]], unsure)


def _ranked_right(place: Place, row: int, machine: DecoderMachine, tokenizer: TextTokenizer) -> dict[str, bool]:
    """Of one image, whether each way is right."""
    labels, found = place.pool.labels, place.found
    candidates = {labels[i]: float(x) for i, x in zip(found.indices[row], found.similarities[row], strict=True)}
    fm = uses.fm_log_probabilities(place.pool, candidates)
    tokens = {label: len(tokenizer.encode(f" {label}")) for label in fm}

    def scores(messages: Sequence[Message]) -> dict[str, float]:
        prompt = [*tokenizer.chat(messages), *tokenizer.encode(uses.BEGUN)]
        return dict(zip(fm, machine.scores(prompt, 0, [tokenizer.encode(f" {label}") for label in fm]), strict=True))

    told = scores(uses.rank_messages(place.name, place.recent, place.pool.descriptions, list(fm)))
    untold = scores(uses.rank_messages_without(list(fm)))
    counts = uses.frequencies(list(fm), place.recent)
    ways = {"FM": uses.ranking(fm), "FM and counts": uses.ranking(fm, counts)}
    for weight in WEIGHTS:
        some = uses.ranking(fm, counts, uses.opinion(told, untold, tokens, weight))
        ways[f"FM, counts and language model, {weight:g}"] = some
    return {name: ranked[0].label == place.truth[row] for name, ranked in ways.items()}


def _row(by_seed: Sequence[Sequence[tuple[int, dict[str, bool]]]], images: int) -> dict[str, Any]:
    """Of every way what is right of what was ranked, and its gains over the FM alone and over the counts."""
    ranked = np.zeros((len(by_seed), images))
    right = {name: np.zeros_like(ranked) for name in by_seed[0][0][1]}
    for seed, some in enumerate(by_seed):
        for row, hits in some:
            ranked[seed, row] = 1.0
            for name, hit in hits.items():
                right[name][seed, row] = hit

    def gain(name: str, more: np.ndarray) -> dict[str, Any]:
        return {name: round(float(more.sum() / ranked.sum()), 3), f"{name}_interval": interval(more, ranked)}

    result: dict[str, Any] = {"samples": int(ranked.sum())}
    for name, hits in right.items():
        result[name] = {"right": round(float(hits.sum() / ranked.sum()), 3)}
        if name != "FM":
            result[name] |= gain("gain", hits - right["FM"])
            result[name] |= gain("over_counts", hits - right["FM and counts"])
    return result
