"""`edgefm bench labels`: what the language model's descriptions do to the FM's accuracy, on ImageNet's names and on others.

`other_names.json` names the same classes as a user might who has never seen ImageNet's list; it was written once, before any
result was known. Beside the label alone and with its descriptions two controls are scored: descriptions of another label of the
same set, which tell what any text at all does, and the label in plain templates, which tell what averaging does without a
language model. Ground truth scores, and does nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ...edge.frames import readable
from ...edge.sources import open_source
from ...models.errors import InputError
from ...models.foundation import FoundationModel, build_pool, load_foundation_model
from ...models.foundation.base import described_embeddings
from ...models.language.decoder import Decoder
from ...models.language.describe import descriptions, requests
from ...models.language.generate import generate_batch
from ...models.language.tokenizer import tokenizer_of
from ...models.language.weights import open_checkpoint
from ...models.pool import LabelPool
from ..demo_results import describe_environment
from .bootstrap import interval

TEMPLATES = ("a photo of a {}.", "a close-up photo of a {}.", "a picture of the {}.", "an image that shows a {}.")
WEIGHTS = (0.25, 0.5, 0.75, 1.0)
"""Of the descriptions beside the label, scored for comparison; the product's is `edgefm.models.foundation.base`'s."""
_TOGETHER = 4
"""Labels whose answers are decoded together."""
_BATCH = 32


@dataclass(frozen=True)
class Scored:
    """M images of a data set with what they show."""

    name: str
    embeddings: np.ndarray  # (M, D)
    truth: np.ndarray  # (M,) str

    @classmethod
    def open(cls, path: Path, model: FoundationModel) -> Scored:
        """Raises InputError: no image is to be read below `val/`."""
        frames = list(readable(open_source(path, "val/")))
        truth = np.array([PurePosixPath(frame.sample_id).parts[-2] for frame in frames], dtype=object)
        parts = [frames[start : start + _BATCH] for start in range(0, len(frames), _BATCH)]
        embeddings = np.vstack([model.embed_images([frame.image for frame in part]) for part in parts])
        return cls(path.name, embeddings, truth)


def bench_labels(data: Sequence[Path], weights: Path, earlier: Path | None, console: Console) -> dict[str, Any]:
    """Accuracies, and differences to the label alone with 95 % intervals.

    Args:
        earlier: results of an earlier run, whose descriptions are taken instead of asking the language model again.

    Raises:
        InputError: a data set with a class that has no other name, or no such results.
    """
    model, others = load_foundation_model("synclip"), _other_names()
    places = [Scored.open(path, model) for path in data]
    classes = {place.name: sorted(set(place.truth)) for place in places}
    unnamed = [label for labels in classes.values() for label in labels if label not in others]
    if unnamed:
        raise InputError(f"no other name is written down for {unnamed[0]!r}; take the wild and town archives")
    own = [label for labels in classes.values() for label in labels]
    wanted = [*own, *(others[label] for label in own)]
    written = _earlier(earlier, wanted) if earlier else _written(weights, wanted, console)
    rows = []
    for place in places:
        for names in ("own", "other"):
            labels = classes[place.name] if names == "own" else [others[label] for label in classes[place.name]]
            rows.append({"data": place.name, "names": names, **_compared(model, place, labels, written)})
    result = {
        "foundation_model": model.name,
        "language_model": weights.name,
        "rows": rows,
        "all": _together(rows),
        "descriptions": {label: list(written[label]) for label in wanted},
        "environment": describe_environment(0),
    }
    for row in rows:
        del row["gains"]
    console.print(_table(result))
    return result


def _other_names() -> dict[str, str]:
    return json.loads(Path(__file__).with_name("other_names.json").read_text(encoding="utf-8"))


def _earlier(path: Path, wanted: Sequence[str]) -> dict[str, tuple[str, ...]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["descriptions"]
        return {label: tuple(found[label]) for label in wanted}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} has no descriptions of all these labels ({error}); leave it out") from error


def _written(weights: Path, labels: Sequence[str], console: Console) -> dict[str, tuple[str, ...]]:
    checkpoint = open_checkpoint(weights)
    tokenizer, decoder = tokenizer_of(checkpoint), Decoder(checkpoint, "quantised")
    found = {}
    for start in track(range(0, len(labels), _TOGETHER), "Describing", console=console):
        part = labels[start : start + _TOGETHER]
        asked = [(label, messages, sampling) for label in part for messages, sampling in requests(label)]
        prompts = [tokenizer.chat(messages) for _, messages, _ in asked]
        answers = generate_batch(decoder, prompts, tokenizer.ends, [sampling for *_, sampling in asked])
        for label in part:
            texts = [tokenizer.decode(answer) for (of, *_), answer in zip(asked, answers, strict=True) if of == label]
            found[label] = descriptions(label, texts)
    return found


def _compared(
    model: FoundationModel, place: Scored, labels: Sequence[str], written: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """`labels`: names of the sorted classes, in their order."""
    shifted = (*labels[1:], labels[0])
    texts = {
        "described": {label: written[label] for label in labels},
        "described as another": {label: written[other] for label, other in zip(labels, shifted, strict=True)},
        "templates": {label: tuple(template.format(label) for template in TEMPLATES) for label in labels},
    }
    alone = _right(build_pool(model, labels), place)
    gains = {}
    scores: dict[str, Any] = {"label alone": {"accuracy": round(float(alone[0].mean()), 4), "unknown": alone[1]}}
    for name, given in texts.items():
        right, unknown = _right(build_pool(model, labels, given), place)
        gains[name] = [(right - alone[0])[place.truth == truth] for truth in sorted(set(place.truth))]
        scores[name] = {"accuracy": round(float(right.mean()), 4), "unknown": unknown, **_gain(gains[name])}
    some = {label: written[label] for label in labels if written[label]}
    in_front = {label: [f"{label}: {text}" for text in texts] for label, texts in some.items()}
    pool = build_pool(model, labels)
    weights = {
        form: {str(weight): _accuracy(model, pool, given, weight, place) for weight in WEIGHTS}
        for form, given in (("description", some), ("label: description", in_front))
    }
    return {
        "labels": len(labels),
        "labels_described": sum(bool(written[label]) for label in labels),
        "images": len(place.truth),
        "scores": scores,
        "accuracy_by_weight": weights,
        "gains": gains,
    }


def _accuracy(
    model: FoundationModel, pool: LabelPool, given: Mapping[str, Sequence[str]], weight: float, place: Scored
) -> float:
    mixed = replace(pool, embeddings=described_embeddings(model, pool.labels, given, weight))
    return round(float(_right(mixed, place)[0].mean()), 4)


def _right(pool: LabelPool, place: Scored) -> tuple[np.ndarray, float]:
    """(M,) 1 where the best label is the image's, and the share of images below the pool's floor."""
    found = pool.recognise(place.embeddings, top_k=1)
    classes = np.array(sorted(set(place.truth)), dtype=object)
    right = (classes[found.indices[:, 0]] == place.truth).astype(float)
    return right, round(float(found.unknown.mean()), 4)


def _gain(gains: Sequence[np.ndarray]) -> dict[str, Any]:
    """Of the images of each label, -1, 0 or 1: their mean with intervals over images, and over labels as they came."""
    values, of_labels = np.concatenate(gains), np.array([gain.mean() for gain in gains])
    return {
        "minus_label_alone": round(float(values.mean()), 4),
        "interval": interval(values[None]),
        "interval_over_labels": interval(of_labels[None]),
    }


def _together(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over all data sets and names, and over each kind of names: the mean over images."""

    def mean(some: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {name: _gain([gain for row in some for gain in row["gains"][name]]) for name in some[0]["gains"]}

    kinds = {names: [row for row in rows if row["names"] == names] for names in ("own", "other")}
    return {"all": mean(rows), **{names: mean(some) for names, some in kinds.items()}}


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"Accuracy of {result['foundation_model']}, points over the label alone and 95 % interval")
    for heading in ("data", "names", "label alone", *(name for name in result["all"]["all"])):
        table.add_column(heading, justify="left" if heading in ("data", "names") else "right")
    for row in result["rows"]:
        cells = [row["data"], row["names"], f"{row['scores']['label alone']['accuracy']:.3f}"]
        table.add_row(*cells, *(_cell(score) for score in row["scores"].values() if "interval" in score))
    for names, gains in result["all"].items():
        table.add_row("all", names, "", *(_cell(gain) for gain in gains.values()))
    return table


def _cell(score: dict[str, Any]) -> str:
    low, high = score["interval"]
    return f"{100 * score['minus_label_alone']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
