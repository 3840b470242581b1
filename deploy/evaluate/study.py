"""What the product learns as its surroundings change, on scoring images: the material of the experiments.

A device stands in one place whose looks and labels change, and the store goes on: at each change the pool is replaced by its
text, and the samples of before stay as what half of the tail's training is drawn from. Every number of samples that the FM
has labelled since the change is a version of its own, learned as the cloud would: closed-form head, tail, gate. Thresholds
are chosen without ground truth, from `EVIDENCE` samples that student and FM have answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...cloud.config import CustomizationConfig
from ...models.confidence import Confidence, graded_agreement
from ...models.foundation import load_foundation_model
from ...models.students import student_profile
from ..bench.learner import Images, Learner, Learnt, choose_threshold
from ..replay.recording import Recording
from .looks import Look, Seen, open_look

FULL, HEAD = "head and tail", "head only"
_NEVER = 10**9


@dataclass(frozen=True)
class StudySettings:
    """Attributes:
    counts: samples labelled by the FM since the change, ascending.
    evidence: samples beside them that the threshold is chosen from.
    """

    student: str
    counts: tuple[int, ...]
    evidence: int
    target: float


@dataclass(frozen=True)
class Version:
    """A student on the M scoring images of a look.

    Attributes:
        method: `FULL`, `HEAD`, "version 0", or the policy that chose its samples.
        samples: labelled by the FM since the last change; 0: before any.
        similarities: (M, K) of the student with the pool.
        recording: of the scoring images, for replays.
        threshold: chosen without ground truth.
    """

    look: str
    seed: int
    method: str
    samples: int
    similarities: np.ndarray
    recording: Recording
    confidence: Confidence
    threshold: float

    @property
    def on_edge(self) -> np.ndarray:
        return self.recording.margins >= self.threshold

    @property
    def system_right(self) -> np.ndarray:
        return np.where(self.on_edge, self.recording.edge_right, self.recording.cloud_right)


@dataclass(frozen=True)
class LookAtFM:
    """The FM on the scoring images of a look: (M, K) similarities; (M,) str truth."""

    similarities: np.ndarray
    truth: np.ndarray
    labels: tuple[str, ...]
    unknown_floor: float
    temperature: float


def fm_of(look: Look, folder: Path) -> LookAtFM:
    seen = open_look(look, folder)
    pool = seen.pool
    similarities = np.asarray(seen.scored.fm) @ pool.embeddings.T
    return LookAtFM(similarities, seen.truth, pool.labels, pool.unknown_floor, pool.temperature)


def study(looks: Sequence[tuple[Look, Path]], settings: StudySettings, seed: int) -> list[Version]:
    """The versions of one seed, look after look; each look changes the surroundings."""
    learners = {FULL: _learner(settings.student, tail=True), HEAD: _learner(settings.student, tail=False)}
    running: dict[str, Learnt] = {}
    before: Images | None = None
    pool_version = ""
    versions = []
    for look, folder in looks:
        seen = open_look(look, folder)
        order = np.random.default_rng(seed).permutation(len(seen.stream))
        most = max(settings.counts)
        newest, evidence = (seen.stream.at(rows) for rows in (order[:most], order[most : most + settings.evidence]))
        version0 = learners[FULL].version0(seen.pool)
        versions.append(version_of(version0, "version 0", 0, seen, evidence, settings.target, seed))
        for method, learner in learners.items():
            kept = running.get(method, version0)
            if seen.pool.version != pool_version:
                kept = replace(kept, confidence=kept.confidence.with_other_pool())
            versions.append(version_of(kept, method, 0, seen, evidence, settings.target, seed))
            for count in settings.counts:
                new = newest.at(np.arange(count))
                samples, judge_from = (new, 0) if before is None else (before.then(new), len(before))
                kept = learner.learn(samples, seen.pool, judge_from, running=kept)
                versions.append(version_of(kept, method, count, seen, evidence, settings.target, seed))
            running[method] = kept
        pool_version = seen.pool.version
        before = newest if before is None else before.then(newest)
    return versions


def _learner(student: str, tail: bool) -> Learner:
    config = CustomizationConfig(threads=1)
    return Learner(
        load_foundation_model("synclip"),
        student_profile(student),
        config if tail else replace(config, tail_from=_NEVER),
    )


def version_of(
    learnt: Learnt, method: str, samples: int, seen: Seen, evidence: Images, target: float, seed: int
) -> Version:
    """A version on the scoring images, with the threshold that the evidence asks for."""
    pool = seen.pool
    embeddings = learnt.embed(seen.scored)
    similarities, fm = embeddings @ pool.embeddings.T, np.asarray(seen.scored.fm) @ pool.embeddings.T
    found, fm_found = pool.recognise(embeddings, top_k=1), pool.recognise(np.asarray(seen.scored.fm), top_k=1)
    said, fm_said = (np.array(pool.answers(some), dtype=object) for some in (found, fm_found))
    graded = graded_agreement(
        pool.with_unknown(fm), pool.with_unknown(similarities), pool.temperature, learnt.confidence
    )
    recording = Recording(found.margins, graded, said == seen.truth, fm_said == seen.truth, seen.size_bytes)
    threshold = choose_threshold(learnt, evidence, pool, target)
    return Version(seen.look.name, seed, method, samples, similarities, recording, learnt.confidence, threshold)
