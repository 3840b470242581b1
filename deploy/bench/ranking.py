"""`edgefm bench ranking`: what the language model adds to the FM on the samples that the FM is least sure of.

A place shows some labels more often than others: samples are drawn with weights 1, 1/2, 1/3, ... over its labels in random order.
The FM answers some of them, which is what the model is told of the place; of the others, those with the smallest margins are
ranked anew. Beside the model stands what counting those answers does without one. Ground truth weighs the draw and scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
from ...models.pool import LabelPool
from ..demo_results import describe_environment
from .bootstrap import interval
from .labels import Scored

CANDIDATES = 5
UNSURE = 0.25
"""Share of a place's samples that are ranked anew."""


def bench_ranking(data: Sequence[Path], weights: Path, samples: int, seeds: int, console: Console) -> dict[str, Any]:
    """Shares of unsure samples answered right, `samples` a place and seed, with 95 % intervals of the differences."""
    model, checkpoint = load_foundation_model("synclip"), open_checkpoint(weights)
    tokenizer = tokenizer_of(checkpoint)
    machine = DecoderMachine(Decoder(checkpoint, "quantised"), tokenizer.ends)
    rows = []
    for path in data:
        place = Scored.open(path, model)
        right = [_right(model, place, machine, tokenizer, samples, seed, console) for seed in range(seeds)]
        together = {name: np.stack([each[name] for each in right]) for name in right[0]}  # (seeds, samples)
        row: dict[str, Any] = {"data": place.name, "samples": samples}
        for name, hits in together.items():
            row[name] = {"right": round(float(hits.mean()), 3)}
            if name != "FM":
                gain = hits - together["FM"]
                row[name] |= {"gain": round(float(gain.mean()), 3), "gain_interval": interval(gain)}
        rows.append(row)
        console.print(", ".join(f"{name} {row[name]['right']:.3f}" for name in together) + f" ({place.name})")
    return {
        "language_model": weights.name,
        "candidates": CANDIDATES,
        "unsure": UNSURE,
        "seeds": seeds,
        "rows": rows,
        "environment": describe_environment(0),
    }


def _right(
    model: FoundationModel,
    place: Scored,
    machine: DecoderMachine,
    tokenizer: TextTokenizer,
    samples: int,
    seed: int,
    console: Console,
) -> dict[str, np.ndarray]:
    """(samples,) 1 where each way is right."""
    random = np.random.default_rng(seed)
    labels = sorted(set(place.truth))
    pool = build_pool(model, labels)
    weights = dict(zip(random.permutation(labels), 1 / np.arange(1, len(labels) + 1), strict=True))
    order = random.permutation(len(place.truth))
    earlier, later = order[: len(order) // 2], order[len(order) // 2 :]
    found = pool.recognise(place.embeddings, CANDIDATES)
    answers = pool.answers(found)
    recent = [answers[i] for i in _drawn(random, earlier, place, weights, RECENT)]
    unsure = later[np.argsort(found.margins[later])[: max(int(UNSURE * len(later)), 1)]]
    hits: dict[str, list[bool]] = {"FM": [], "FM and counts": [], "FM and language model": []}
    for i in track(_drawn(random, unsure, place, weights, samples), f"{place.name}, seed {seed}", console=console):
        candidates = {labels[index]: float(x) for index, x in zip(found.indices[i], found.similarities[i], strict=True)}
        fm = uses.fm_log_probabilities(pool, candidates)
        for name, best in (
            ("FM", max(fm, key=lambda label: fm[label])),
            ("FM and counts", _counted(fm, recent)),
            ("FM and language model", _ranked(machine, tokenizer, pool, Path(place.name).stem, recent, fm)),
        ):
            hits[name].append(best == place.truth[i])
    return {name: np.array(each, np.float64) for name, each in hits.items()}


def _drawn(
    random: np.random.Generator, among: np.ndarray, place: Scored, weights: dict[str, float], count: int
) -> np.ndarray:
    p = np.array([weights[label] for label in place.truth[among]])
    return random.choice(among, count, p=p / p.sum())


def _counted(fm: dict[str, float], recent: Sequence[str]) -> str:
    """The FM's likelihood and Laplace's estimate of how often each label comes."""
    counts = Counter(recent)
    return max(fm, key=lambda label: fm[label] + np.log(counts[label] + 1))


def _ranked(
    machine: DecoderMachine,
    tokenizer: TextTokenizer,
    pool: LabelPool,
    place: str,
    recent: Sequence[str],
    fm: dict[str, float],
) -> str:
    def scores(messages: Sequence[Message]) -> dict[str, float]:
        prompt = [*tokenizer.chat(messages), *tokenizer.encode(uses.BEGUN)]
        found = machine.scores(prompt, 0, [tokenizer.encode(f" {label}") for label in fm])
        return dict(zip(fm, found, strict=True))

    told = scores(uses.rank_messages(place, recent, pool.descriptions, list(fm)))
    untold = scores(uses.rank_messages_without(list(fm)))
    tokens = {label: len(tokenizer.encode(f" {label}")) for label in fm}
    return uses.ranking(fm, told, untold, tokens)[0].label
