"""Semantic-driven customization (EdgeFM, section 4), in a process of its own: `python -m edgefm.cloud.customize JOB PARENT`.

Reads the store, never writes to it; computes the pretrained backbone's features once per sample and caches them; fits a
head; with enough samples trains the tail of the backbone too; puts the better of the two before the gate; writes
`result.json` and the new weights into the job's folder. The service publishes.

Every run starts from the pretrained backbone and learns from the store, not from the version before: what an environment
was like once is forgotten only when its samples are.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from ..models.backbone_graphs import feature_graph, trunk_graph
from ..models.confidence import Confidence
from ..models.errors import EdgeFMError, StoreError
from ..models.head import Head
from ..models.images import decode_image
from ..models.pool import LabelPool
from ..models.runtime import OnnxModel
from ..models.students import StudentProfile, student_profile
from ..models.versions import GRAPH_FILE, HEAD_FILE, TAIL_FILE, TRUNK_FILE, Calibration, StudentManifest, sha256_hex
from .ahead import ahead
from .augment import trunk_views
from .candidates import Candidate, best_candidate
from .config import CustomizationConfig
from .learning import Judgement, held_out_mask, judge, passes, sample_weights
from .store import FEATURES_FILE, SampleStore, StoredSamples, image_path

RESULT_FILE = "result.json"
_INT8_CALIBRATION = 200
"""Samples on which the ranges of the activations are measured."""
_BATCH = 32
_LOOK_FOR_PARENT_S = 0.5


@dataclass(frozen=True)
class Job:
    """All that a run depends on. `running` and `version0` are folders with a version's files and manifest.json.

    `since` (Unix seconds): only samples received then or later judge the outcome, after a drift alarm those since its
    evidence began. All samples teach.
    """

    store: Path
    environment: str
    pool: Path
    running: Path
    version0: Path
    output: Path
    config: CustomizationConfig
    since: float = 0.0

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def load(cls, path: Path) -> Job:
        return TypeAdapter(cls).validate_json(path.read_bytes())


@dataclass(frozen=True)
class Outcome:
    """What a run found. `accepted` is the gate's word.

    Attributes:
        quality, parent_quality: what the gate compared, see `Judgement.quality`.
        files: names of the files that the run wrote into the job's folder.
        pretrained: names of the files that the version shares with version 0.
    """

    accepted: bool
    samples: int
    pool_version: str
    agreement: float
    parent_agreement: float
    quality: float
    parent_quality: float
    confidence: Confidence
    method: str
    precision: Literal["float", "int8"]
    files: tuple[str, ...]
    pretrained: tuple[str, ...]
    calibration: Calibration


class FeatureCache:
    """Backbone features by content, in an SQLite file beside the store; one writing process at a time."""

    def __init__(self, store: Path, backbone: str) -> None:
        self._backbone = backbone
        self._db = sqlite3.connect(store / FEATURES_FILE)
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS features "
            "(backbone TEXT, sha256 TEXT, vector BLOB, PRIMARY KEY (backbone, sha256))"
        )

    def get(self) -> dict[str, np.ndarray]:
        rows = self._db.execute("SELECT sha256, vector FROM features WHERE backbone = ?", (self._backbone,))
        return {sha256: np.frombuffer(vector, "<f4") for sha256, vector in rows}

    def put(self, sha256: list[str], vectors: np.ndarray) -> None:
        rows = [
            (self._backbone, digest, row.astype("<f4").tobytes()) for digest, row in zip(sha256, vectors, strict=True)
        ]
        with self._db:
            self._db.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?)", rows)


@dataclass(frozen=True)
class _Data:
    """The readable samples of an environment, N of them, and the student that embeds them; see `candidates.Samples`."""

    job: Job
    manifest: StudentManifest
    stored: StoredSamples
    weights: np.ndarray
    features: np.ndarray

    @property
    def targets(self) -> np.ndarray:
        return self.stored.embeddings

    @property
    def received_at(self) -> np.ndarray:
        return self.stored.received_at

    def images(self, rows: np.ndarray) -> Iterator[list[Image.Image]]:
        """The samples at these positions, in batches."""
        store = self.job.store
        for start in range(0, len(rows), _BATCH):
            digests = [self.stored.sha256[row] for row in rows[start : start + _BATCH]]
            yield [decode_image(image_path(store, digest).read_bytes()) for digest in digests]

    def prepared(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The same as the student takes them, (b, 3, S, S) each."""
        return map(self.manifest.preprocess.batch, self.images(rows))

    def trunk_views(self, rows: np.ndarray, views: int) -> np.ndarray:
        profile = student_profile(self.manifest.profile)
        trunk = OnnxModel(trunk_graph(profile.backbone, profile.input_size), self.job.config.threads)
        parts = []
        for start, images in zip(range(0, len(rows), _BATCH), self.images(rows), strict=True):
            seeds = [int(self.stored.sha256[row][:8], 16) for row in rows[start : start + _BATCH]]
            parts.append(trunk_views(trunk, self.manifest.preprocess, images, seeds, views))
        return np.concatenate(parts)

    def embed(self, version: Path, rows: np.ndarray) -> np.ndarray:
        """(len(rows), D): what the version in this folder says."""
        student = OnnxModel(version / GRAPH_FILE, self.job.config.threads)
        return np.concatenate([student(batch) for batch in ahead(self.prepared(rows))])


def load_data(job: Job, manifest: StudentManifest) -> _Data:
    """The environment's samples; those whose image has gone or is damaged are left out."""
    store = SampleStore(job.store)
    stored = store.samples(job.environment)
    profile = student_profile(manifest.profile)
    backbone = feature_graph(profile.backbone, profile.input_size)
    cache = FeatureCache(job.store, backbone.stem)
    features, model = cache.get(), OnnxModel(backbone, job.config.threads)
    intact = [i for i, digest in enumerate(stored.sha256) if _is_intact(store.image_path(digest), digest)]
    store.close()
    if not intact:
        raise StoreError(f"no readable sample of {job.environment} in {job.store}")
    stored = stored.at(intact)
    weights = sample_weights(stored.propensities, job.config.weight_cap)
    data = _Data(job, manifest, stored, weights, np.empty(0))
    missing = [row for row, digest in enumerate(stored.sha256) if digest not in features]
    batches = ahead(data.prepared(np.array(missing, int)))
    for start, batch in zip(range(0, len(missing), _BATCH), batches, strict=True):
        digests = [stored.sha256[row] for row in missing[start : start + _BATCH]]
        computed = model(batch)  # (b, F)
        cache.put(digests, computed)
        features.update(zip(digests, computed, strict=True))
    return replace(data, features=np.stack([features[digest] for digest in stored.sha256]))


def _is_intact(path: Path, digest: str) -> bool:
    try:
        found = sha256_hex(path.read_bytes())
    except OSError as error:
        found = str(error)
    if found != digest:
        print(f"level=warning event=sample_skipped sha256={digest} reason={found!r}", file=sys.stderr)
    return found == digest


# ---- the run


@dataclass(frozen=True)
class _Weights:
    """A candidate as files.

    Attributes:
        pretrained: names of the files that it shares with version 0.
    """

    files: dict[str, bytes]
    pretrained: tuple[str, ...]
    precision: Literal["float", "int8"] = "float"


def run(job: Job) -> Outcome:
    """Trains, gates, and writes the result into `job.output`. Equal jobs give equal bytes on one machine."""
    manifest = StudentManifest.from_json((job.running / "manifest.json").read_bytes())
    pool = LabelPool.load(job.pool)
    data = load_data(job, manifest)
    mask = held_out_mask(data.stored.numbers, job.config)
    # After a drift alarm the old samples still teach, so that a look that returns is not forgotten; the new ones judge.
    train, held_out = np.flatnonzero(~mask), np.flatnonzero(mask & (data.stored.received_at >= job.since))
    if not len(train) or not len(held_out):
        raise StoreError(f"{len(mask)} samples are too few to train on some and hold others out")

    profile = student_profile(manifest.profile)
    version0 = Head.from_bytes((job.version0 / HEAD_FILE).read_bytes(), manifest.embedding_dim)
    best = best_candidate(data, train, held_out, pool, profile.backbone, version0, job.config)
    written = _written(profile, best)
    parent = judge(data.embed(job.running, held_out), data.targets[held_out], data.weights[held_out], pool)
    if profile.int8:
        best, written = _quantised(data, best, written, train, held_out, pool)
    outcome = Outcome(
        accepted=passes(best.judgement, parent),
        samples=len(mask),
        pool_version=pool.version,
        agreement=best.judgement.agreement,
        parent_agreement=parent.agreement,
        quality=best.judgement.quality,
        parent_quality=parent.quality,
        confidence=best.judgement.confidence,
        method=best.method,
        precision=written.precision,
        files=tuple(written.files),
        pretrained=written.pretrained,
        calibration=_calibration(best.judgement, data.stored.propensities[held_out]),
    )
    for name, content in written.files.items():
        (job.output / name).write_bytes(content)
    (job.output / RESULT_FILE).write_bytes(TypeAdapter(Outcome).dump_json(outcome))
    return outcome


def _written(profile: StudentProfile, candidate: Candidate) -> _Weights:
    head = {HEAD_FILE: candidate.head.to_bytes()}
    if candidate.tail is None:
        return _Weights(head, (GRAPH_FILE, TRUNK_FILE, TAIL_FILE))
    from ..models.student_graph import tail_to_bytes

    return _Weights({TAIL_FILE: tail_to_bytes(profile, candidate.tail), **head}, (GRAPH_FILE, TRUNK_FILE))


def _quantised(
    data: _Data, candidate: Candidate, written: _Weights, train: np.ndarray, held_out: np.ndarray, pool: LabelPool
) -> tuple[Candidate, _Weights]:
    """The candidate in INT8, or as it is where that costs too much agreement."""
    from ..models.student_graph import int8_files

    some = np.random.default_rng(data.job.config.seed).permutation(train)[:_INT8_CALIBRATION]
    profile = student_profile(data.manifest.profile)
    files = int8_files(profile, candidate.head, candidate.tail, data.prepared(some))
    folder = data.job.output / "int8"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    judgement = judge(data.embed(folder, held_out), data.targets[held_out], data.weights[held_out], pool)
    if judgement.agreement < candidate.judgement.agreement - data.job.config.int8_may_cost:
        print(
            f"level=info event=int8_left float={candidate.judgement.agreement:.4f} int8={judgement.agreement:.4f}",
            file=sys.stderr,
        )
        return candidate, written
    return replace(candidate, judgement=judgement), _Weights(files, (), "int8")


def _calibration(judgement: Judgement, propensities: np.ndarray) -> Calibration:
    return Calibration(
        margins=[round(float(margin), 6) for margin in judgement.margins],
        agreements=[round(float(graded), 6) for graded in judgement.graded],
        propensities=[round(float(propensity), 6) for propensity in propensities],
    )


def _end_with(parent: int) -> None:
    """Ends this process once its parent is gone: a cloud that is killed cannot end it, and the next one starts its own."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_FOR_PARENT_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def main() -> int:
    _end_with(parent=int(sys.argv[2]))
    try:
        run(Job.load(Path(sys.argv[1])))
    except EdgeFMError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
