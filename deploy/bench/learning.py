"""`edgefm bench learning`: what a student learns from n samples that the FM has labelled, clean and under bad conditions.

The product's own parts, without sockets: FM, customization (head, tail, choice and gate), graded agreement, threshold table.
Ground truth is used for scoring alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ...cloud.augment import trunk_views
from ...cloud.config import CustomizationConfig
from ...cloud.learning import embed_with, fit_closed_form, held_out_mask, judge, lowest_risk, passes, train_tail
from ...edge.agreement import AgreementCurve
from ...edge.frames import readable
from ...edge.sources import open_source
from ...edge.thresholds import Costs, ThresholdTable
from ...models.backbones import Tail, feature_graph, trunk_graph
from ...models.confidence import Confidence, graded_agreement
from ...models.errors import InputError
from ...models.foundation import FoundationModel, build_pool, load_foundation_model
from ...models.images import decode_image
from ...models.pool import LabelPool
from ...models.runtime import OnnxModel
from ...models.student_graph import VERSION0_TEMPERATURE, Head, version0_head
from ...models.students import StudentProfile, student_profile
from ...models.versions import sha256_hex
from ..conditions import CONDITIONS, under
from ..demo_results import describe_environment

EVIDENCE = 1000
"""Samples of the stream beside the n, answered by student and FM, from which the threshold is chosen: a switcher's full
window. The same ones for every n of a seed."""

STREAM = 3000
"""Images of the stream; every seed draws its samples, its evidence and its window from them."""

_BATCH = 32
_TOLERANCE = 0.01
_RESAMPLES = 2000


@dataclass(frozen=True)
class _Images:
    """N images under one condition, as FM and student see them."""

    digests: list[str]
    fm: np.ndarray  # (N, D)
    features: np.ndarray  # (N, F)
    views: np.ndarray  # (N, V, C, h, w) float16

    def at(self, rows: np.ndarray) -> _Images:
        return _Images([self.digests[row] for row in rows], self.fm[rows], self.features[rows], self.views[rows])


@dataclass(frozen=True)
class _Point:
    """One version of one seed on M scoring images."""

    on_edge: np.ndarray  # (M,) bool
    system_right: np.ndarray  # (M,) bool
    student_right: np.ndarray  # (M,) bool
    method: str
    seconds: float


@dataclass(frozen=True)
class _Learnt:
    """A version. `tail`: None is the pretrained."""

    method: str
    head: Head
    tail: Tail | None
    confidence: Confidence

    def embed(self, images: _Images) -> np.ndarray:
        """(N, D)"""
        return self.head(images.features) if self.tail is None else embed_with(self.tail, self.head, images.views[:, 0])


class _Learner:
    def __init__(self, model: FoundationModel, profile: StudentProfile, config: CustomizationConfig) -> None:
        self._model, self._profile, self._config = model, profile, config
        self._features = OnnxModel(feature_graph(profile.backbone, profile.input_size))
        self._trunk = OnnxModel(trunk_graph(profile.backbone, profile.input_size))
        self._version0 = version0_head(profile, model)

    def look(self, encoded: Sequence[bytes], views: int) -> _Images:
        digests = [sha256_hex(data) for data in encoded]
        fm, features, seen = [], [], []
        for start in range(0, len(encoded), _BATCH):
            images = [decode_image(data) for data in encoded[start : start + _BATCH]]
            seeds = [int(digest[:8], 16) for digest in digests[start : start + _BATCH]]
            fm.append(self._model.embed_images(images))
            features.append(self._features(self._profile.preprocess.batch(images)))
            seen.append(trunk_views(self._trunk, self._profile.preprocess, images, seeds, views))
        return _Images(digests, np.concatenate(fm), np.concatenate(features), np.concatenate(seen))

    def learn(self, samples: _Images, pool: LabelPool) -> _Learnt:
        """What one customization run from version 0 would publish (see `edgefm.cloud.customize`)."""
        config = self._config
        version0 = _Learnt("version 0", self._version0, None, Confidence(VERSION0_TEMPERATURE * pool.temperature))
        if not samples.digests:
            return version0
        held = held_out_mask(np.arange(len(samples.digests)), config)
        train, held_out = samples.at(np.flatnonzero(~held)), samples.at(np.flatnonzero(held))
        taught, judged = np.ones(len(train.digests)), np.ones(len(held_out.digests))
        head = fit_closed_form(train.features, train.fm, taught, self._version0, config.prior_samples)
        before = judge(self._version0(held_out.features), held_out.fm, judged, pool)
        judgements = [judge(head(held_out.features), held_out.fm, judged, pool)]
        candidates = [_Learnt("head", head, None, judgements[0].confidence)]
        if len(samples.digests) >= config.tail_from:
            tail, with_tail = train_tail(
                train.views, train.fm, taught, pool, Tail(self._profile.backbone), head, config
            )
            judgements.append(judge(embed_with(tail, with_tail, held_out.views[:, 0]), held_out.fm, judged, pool))
            candidates.append(_Learnt("head+tail", with_tail, tail, judgements[1].confidence))
        best = lowest_risk(judgements)
        return candidates[best] if passes(judgements[best], before) else replace(version0, method="refused")


def _threshold(learnt: _Learnt, window: _Images, pool: LabelPool, target: float) -> float:
    """As the switcher chooses it: by the graded agreement of samples that student and FM have answered."""
    embeddings = learnt.embed(window)
    student, fm = (pool.with_unknown(vectors @ pool.embeddings.T) for vectors in (embeddings, window.fm))
    margins = pool.recognise(embeddings, top_k=1).margins.astype(np.float64)
    graded = graded_agreement(fm, student, pool.temperature, learnt.confidence)
    curve = AgreementCurve.fit(margins, graded, np.ones(len(fm)))
    table = ThresholdTable.build(margins, curve, Costs(0.0, 0.0, 0.0))
    return float(table.thresholds[table.smallest_cloud_use(target)])


def bench_learning(
    data: Sequence[Path], student: str, samples: Sequence[int], seeds: int, target: float, console: Console
) -> dict[str, Any]:
    """The edge share at an accuracy target, against n, for each data set and condition.

    Raises:
        InputError: a data set has too few images, or another layout than `train/<label>/`, `val/<label>/`.
    """
    model, config = load_foundation_model("synclip"), CustomizationConfig()
    learner = _Learner(model, student_profile(student), config)
    rows = []
    for path in data:
        stream = list(readable(open_source(path, "train/", shuffle_seed=0)))[:STREAM]
        scoring = list(readable(open_source(path, "val/")))
        needed = max(samples) + EVIDENCE
        if len(stream) < needed:
            raise InputError(f"{path} has {len(stream)} images below train/, {needed} are wanted; lower --samples")
        truth = np.array([PurePosixPath(frame.sample_id).parts[-2] for frame in scoring], dtype=object)
        pool = build_pool(model, sorted(set(truth)))
        labels = np.array(pool.labels, dtype=object)
        for condition in CONDITIONS:
            with console.status(f"{path.name}, {condition} ..."):
                seen = learner.look([under(condition, f.image, i) for i, f in enumerate(stream)], config.views)
                scored = learner.look([under(condition, f.image, STREAM + i) for i, f in enumerate(scoring)], 1)
                fm = labels[pool.recognise(scored.fm, top_k=1).indices[:, 0]]
                for count in samples:
                    points = []
                    for seed in range(seeds):
                        order = np.random.default_rng(seed).permutation(len(stream))
                        window = seen.at(order[max(samples) : max(samples) + EVIDENCE])
                        began = time.perf_counter()
                        learnt = learner.learn(seen.at(order[:count]), pool)
                        seconds = time.perf_counter() - began
                        threshold = _threshold(learnt, window, pool, target)
                        found = pool.recognise(learnt.embed(scored), top_k=1)
                        answers, on_edge = labels[found.indices[:, 0]], found.margins >= threshold
                        system = np.where(on_edge, answers, fm)
                        points.append(_Point(on_edge, system == truth, answers == truth, learnt.method, seconds))
                    rows.append(_row(path.name, condition, count, points, fm == truth))
                    console.print(_line(rows[-1]))
    result = {
        "student": student,
        "accuracy_target": target,
        "seeds": seeds,
        "evidence": EVIDENCE,
        "rows": rows,
        "environment": describe_environment(0),
    }
    console.print(_table(result))
    return result


def _row(data: str, condition: str, count: int, points: list[_Point], fm_right: np.ndarray) -> dict[str, Any]:
    on_edge = np.array([point.on_edge for point in points], float)  # (seeds, M)
    gain = np.array([point.system_right for point in points], float) - fm_right  # (seeds, M)
    methods = [point.method for point in points]
    return {
        "data": data,
        "condition": condition,
        "samples": count,
        "fm_accuracy": round(float(fm_right.mean()), 4),
        "student_accuracy": round(float(np.mean([point.student_right for point in points])), 4),
        "edge_share": round(float(on_edge.mean()), 4),
        "edge_share_interval": _interval(on_edge),
        "system_minus_fm": round(float(gain.mean()), 4),
        "system_minus_fm_interval": _interval(gain),
        "methods": {method: methods.count(method) for method in sorted(set(methods))},
        "learning_s": round(float(np.median([point.seconds for point in points])), 1),
    }


def _interval(values: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the mean of (seeds, M) values, over seeds and images."""
    rng, (seeds, images) = np.random.default_rng(0), values.shape
    means = []
    for _ in range(_RESAMPLES):
        weights = np.bincount(rng.integers(images, size=images), minlength=images)
        means.append(values[rng.integers(seeds, size=seeds)].mean(axis=0) @ weights / images)
    return [round(float(bound), 4) for bound in np.quantile(means, (0.025, 0.975))]


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['data']} {row['condition']} n={row['samples']}: edge share {row['edge_share']:.3f}, system - FM "
        f"{row['system_minus_fm']:+.3f}, student {row['student_accuracy']:.3f}, FM {row['fm_accuracy']:.3f}, "
        f"{row['methods']}, {row['learning_s']} s"
    )


def _table(result: dict[str, Any]) -> Table:
    counts = sorted({row["samples"] for row in result["rows"]})
    table = Table(title=f"Edge share (system minus FM accuracy, points), target {result['accuracy_target']}")
    table.add_column("data")
    table.add_column("condition")
    for count in counts:
        table.add_column("version 0" if count == 0 else f"{count} samples", justify="right")
    cells: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        mark = "" if row["system_minus_fm"] >= -_TOLERANCE else " !"
        cell = f"{row['edge_share']:.3f} ({100 * row['system_minus_fm']:+.1f}){mark}"
        cells.setdefault((row["data"], row["condition"]), []).append(cell)
    for key, values in cells.items():
        table.add_row(*key, *values)
    return table
