"""The product's learning without sockets, for benchmarks: FM, customization (head, tail, choice and gate), graded agreement,
threshold table. Ground truth is used for scoring alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import active_children
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console

from ...cloud.augment import trunk_views
from ...cloud.candidates import best_candidate
from ...cloud.config import CustomizationConfig
from ...cloud.learning import held_out_mask, judge, passes
from ...cloud.tail_training import embed_with
from ...edge.agreement import AgreementCurve
from ...edge.config import SwitcherConfig
from ...edge.frames import Frame, readable
from ...edge.sources import open_source
from ...edge.thresholds import Costs, ThresholdTable
from ...models.backbone_graphs import feature_graph, trunk_graph
from ...models.backbones import Tail
from ...models.confidence import Confidence, graded_agreement
from ...models.errors import ConfigError, InputError
from ...models.foundation import FoundationModel, build_pool
from ...models.head import Head
from ...models.images import decode_image
from ...models.pool import LabelPool
from ...models.runtime import OnnxModel
from ...models.student_graph import VERSION0_TEMPERATURE, version0_head
from ...models.students import StudentProfile
from ...models.versions import sha256_hex
from ..conditions import under
from ..demo_results import describe_environment
from ..processes import loaded
from ..signals import result_of
from .bootstrap import interval

EVIDENCE = 1000
"""Samples of the stream beside those that teach, answered by student and FM, from which the threshold is chosen: a switcher's
full window. The same ones for every version of a seed."""

STREAM = 3000
"""Images of the stream; every seed draws its samples and its evidence from them."""

_Result = TypeVar("_Result")
_BATCH = 32


@dataclass(frozen=True)
class Images:
    """N images, as FM and student see them, in order of arrival; see `edgefm.cloud.candidates.Samples`."""

    fm: np.ndarray  # (N, D)
    features: np.ndarray
    views: np.ndarray  # (N, V, C, h, w) float16

    def __len__(self) -> int:
        return len(self.fm)

    @property
    def targets(self) -> np.ndarray:
        return self.fm

    @property
    def weights(self) -> np.ndarray:
        """All of them are sent."""
        return np.ones(len(self))

    @property
    def received_at(self) -> np.ndarray:
        return np.arange(len(self))

    def trunk_views(self, rows: np.ndarray, views: int) -> np.ndarray:
        return self.views[rows, :views]

    def at(self, rows: np.ndarray) -> Images:
        return Images(self.fm[rows], self.features[rows], self.views[rows])

    def then(self, later: Images) -> Images:
        return Images(*(np.concatenate((getattr(self, name), getattr(later, name))) for name in vars(self)))


@dataclass(frozen=True)
class Learnt:
    """A version. `tail`: None is the pretrained."""

    method: str
    head: Head
    tail: Tail | None
    confidence: Confidence

    def embed(self, images: Images) -> np.ndarray:
        """(N, D)"""
        return self.head(images.features) if self.tail is None else embed_with(self.tail, self.head, images.views[:, 0])


class Learner:
    """What one customization run from version 0 would publish (see `edgefm.cloud.customize`)."""

    def __init__(self, model: FoundationModel, profile: StudentProfile, config: CustomizationConfig) -> None:
        """`config.threads`: of ONNX Runtime; torch's are the process's own."""
        self._model, self._profile, self._config = model, profile, config
        self._features = OnnxModel(feature_graph(profile.backbone, profile.input_size), config.threads)
        self._trunk = OnnxModel(trunk_graph(profile.backbone, profile.input_size), config.threads)
        self._version0 = version0_head(profile, model)

    def look(self, encoded: Sequence[bytes], views: int) -> Images:
        """`views` of each image, the image itself among them."""
        fm, features, seen = [], [], []
        for start in range(0, len(encoded), _BATCH):
            part = encoded[start : start + _BATCH]
            images, seeds = [decode_image(data) for data in part], [int(sha256_hex(data)[:8], 16) for data in part]
            fm.append(self._model.embed_images(images))
            features.append(self._features(self._profile.preprocess.batch(images)))
            seen.append(trunk_views(self._trunk, self._profile.preprocess, images, seeds, views))
        return Images(np.concatenate(fm), np.concatenate(features), np.concatenate(seen))

    def version0(self, pool: LabelPool) -> Learnt:
        return Learnt("version 0", self._version0, None, Confidence(VERSION0_TEMPERATURE * pool.temperature))

    def learn(
        self,
        samples: Images,
        pool: LabelPool,
        judge_from: int = 0,
        beside: Images | None = None,
        running: Learnt | None = None,
    ) -> Learnt:
        """Learns from samples in order of arrival; those from `judge_from` on judge, as they do after a drift alarm.

        Args:
            beside: teach the tail too, and judge nothing.
            running: what the gate sets a candidate beside, and what is left where none passes; version 0 without it.

        Raises:
            ConfigError: too few samples for any to be held out, or for a tail that `beside` is to teach.
        """
        config, running = self._config, running or self.version0(pool)
        least = config.first_at if beside is None else config.tail_from
        if len(samples) - judge_from < config.first_at or len(samples) < least:
            raise ConfigError(f"{len(samples) - judge_from} samples are too few; customization wants {least} here")
        numbers = np.arange(len(samples))
        mask = held_out_mask(numbers, config)
        held_out = numbers[mask & (numbers >= judge_from)]
        everything, extra = samples, np.empty(0, int)
        if beside is not None:
            everything, extra = samples.then(beside), len(samples) + np.arange(len(beside))
        best = best_candidate(
            everything, numbers[~mask], held_out, pool, self._profile.backbone, self._version0, config, extra
        )
        judged = samples.at(held_out)
        before = judge(running.embed(judged), judged.targets, judged.weights, pool)
        if not passes(best.judgement, before):
            return replace(running, method="refused")
        return Learnt(best.method, best.head, best.tail, best.judgement.confidence)


def choose_threshold(learnt: Learnt, evidence: Images, pool: LabelPool, target: float) -> float:
    """As the switcher chooses it: by the graded agreement of samples that student and FM have answered."""
    embeddings = learnt.embed(evidence)
    student, fm = (pool.with_unknown(vectors @ pool.embeddings.T) for vectors in (embeddings, evidence.fm))
    margins = pool.recognise(embeddings, top_k=1).margins.astype(np.float64)
    graded = graded_agreement(fm, student, pool.temperature, learnt.confidence)
    curve = AgreementCurve.fit(margins, graded, np.ones(len(fm)))
    table = ThresholdTable.build(margins, curve, Costs(0.0, 0.0, 0.0))
    return float(table.thresholds[table.smallest_cloud_use(target, SwitcherConfig.caution)])


@contextmanager
def every_core(console: Console) -> Iterator[Callable[..., Iterator[Any]]]:
    """Gives a function that calls another one with each of many arguments, in processes of their own, as many at once as there
    are cores, and yields the results in order. What a call raises is raised there, and the others are ended."""
    pool = ProcessPoolExecutor(os.cpu_count(), loaded(), initializer=torch.set_num_threads, initargs=(1,))

    def each(measure: Callable[..., _Result], arguments: Sequence[tuple[Any, ...]]) -> Iterator[_Result]:
        pending = [pool.submit(measure, *some) for some in arguments]  # now, and not when the first result is asked for
        return (result_of(future) for future in pending)

    try:
        with console.status("Learning ..."):
            yield each
        pool.shutdown()
    except BaseException:
        for process in active_children():  # a running call cannot be cancelled; the exit would wait for it for minutes
            process.terminate()
        pool.shutdown(cancel_futures=True)
        raise


# ---- scoring


@dataclass(frozen=True)
class Place:
    """A data set: a stream that nobody has labelled, images that score, and the pool of their labels."""

    name: str
    stream: list[Frame]
    scoring: list[Frame]
    truth: np.ndarray  # (M,) str
    pool: LabelPool

    @classmethod
    def open(cls, path: Path, model: FoundationModel, needed: int) -> Place:
        """Raises InputError: fewer than `needed` images below train/, or another layout than `train/<label>/`,
        `val/<label>/`."""
        stream = list(readable(open_source(path, "train/", shuffle_seed=0)))[:STREAM]
        scoring = list(readable(open_source(path, "val/")))
        if len(stream) < needed:
            raise InputError(f"{path} has {len(stream)} images below train/, {needed} are wanted; lower --samples")
        truth = np.array([PurePosixPath(frame.sample_id).parts[-2] for frame in scoring], dtype=object)
        return cls(path.name, stream, scoring, truth, build_pool(model, sorted(set(truth))))

    def stream_under(self, condition: str, first: int = STREAM) -> list[bytes]:
        return [under(condition, frame.image, i) for i, frame in enumerate(self.stream[:first])]

    def scoring_under(self, condition: str, rows: Sequence[int] | None = None) -> list[bytes]:
        """All of them, or those of some rows."""
        chosen = range(len(self.scoring)) if rows is None else rows
        return [under(condition, self.scoring[row].image, STREAM + row) for row in chosen]


@dataclass(frozen=True)
class Score:
    """One version on M scoring images."""

    on_edge: np.ndarray  # (M,) bool
    student_right: np.ndarray  # (M,) bool
    fm_right: np.ndarray  # (M,) bool

    @classmethod
    def of(cls, learnt: Learnt, threshold: float, scored: Images, place: Place) -> Score:
        found = place.pool.recognise(learnt.embed(scored), top_k=1)
        fm = place.pool.recognise(scored.fm, top_k=1)
        labels = np.array(place.pool.labels, dtype=object)
        student_right, fm_right = (labels[answers.indices[:, 0]] == place.truth for answers in (found, fm))
        return cls(found.margins >= threshold, student_right, fm_right)

    @property
    def system_minus_fm(self) -> np.ndarray:
        """(M,) -1, 0 or 1"""
        return np.where(self.on_edge, self.student_right, self.fm_right).astype(float) - self.fm_right


def learning_result(rows: Sequence[dict[str, Any]], target: float, **settings: Any) -> dict[str, Any]:
    """What a benchmark of learning writes: its settings, rows, machine and versions."""
    common = {"accuracy_target": target, "caution": SwitcherConfig.caution, "evidence": EVIDENCE}
    return {**settings, **common, "rows": list(rows), "environment": describe_environment(0)}


def summarise(scores: Sequence[Score]) -> dict[str, Any]:
    """Means over seeds and images, with 95 % intervals."""
    on_edge, gain = (np.array([getattr(s, name) for s in scores], float) for name in ("on_edge", "system_minus_fm"))
    return {
        "fm_accuracy": round(float(scores[0].fm_right.mean()), 4),
        "student_accuracy": round(float(np.mean([score.student_right for score in scores])), 4),
        "edge_share": round(float(on_edge.mean()), 4),
        "edge_share_interval": interval(on_edge),
        "system_minus_fm": round(float(gain.mean()), 4),
        "system_minus_fm_interval": interval(gain),
    }
