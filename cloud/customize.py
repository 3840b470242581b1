"""Semantic-driven customization (EdgeFM, section 4), in a process of its own: `python -m edgefm.cloud.customize JOB`.

Reads the store, never writes to it; computes the student's backbone features once per sample and caches them; fits a
head; puts it before the gate; writes `result.json` and the new head into the job's folder. The service publishes.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter

from ..models.errors import EdgeFMError, StoreError
from ..models.images import decode_image
from ..models.pool import LabelPool
from ..models.runtime import OnnxModel
from ..models.student_graph import FEATURES, HEAD_FILE, Head
from ..models.versions import GRAPH_FILE, Calibration, StudentManifest
from .config import CustomizationConfig
from .learning import Judgement, Samples, held_out_mask, judge, learn_head
from .store import SampleStore

RESULT_FILE = "result.json"
_FEATURE_BATCH = 32


@dataclass(frozen=True)
class Job:
    """All that a run depends on. `running` and `version0` are folders with a version's files and manifest.json.

    `since` (Unix seconds) leaves older samples out: after a drift alarm they are of another distribution.
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
    """What a run found. `accepted` is the gate's word."""

    accepted: bool
    samples: int
    pool_version: str
    agreement: float
    parent_agreement: float
    method: str
    calibration: Calibration


class FeatureCache:
    """Backbone features by content, in an SQLite file beside the store; one writing process at a time."""

    def __init__(self, store: Path, backbone: str) -> None:
        self._backbone = backbone
        self._db = sqlite3.connect(store / "features.db")
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


def load_samples(job: Job, manifest: StudentManifest) -> tuple[list[str], Samples]:
    """The environment's samples with their features; those whose image has gone or is damaged are left out."""
    store = SampleStore(job.store)
    stored = store.samples(job.environment, job.since)
    backbone = "-".join(ref.sha256[:16] for ref in manifest.files if ref.name != HEAD_FILE)
    cache = FeatureCache(job.store, backbone)
    features = cache.get()
    missing = [digest for digest in stored.sha256 if digest not in features]
    student = OnnxModel(job.running / GRAPH_FILE, job.config.threads)
    for start in range(0, len(missing), _FEATURE_BATCH):
        digests, images = [], []
        for digest in missing[start : start + _FEATURE_BATCH]:
            try:
                images.append(decode_image(store.image_path(digest).read_bytes()))
                digests.append(digest)
            except (OSError, EdgeFMError) as error:
                print(f"level=warning event=sample_skipped sha256={digest} reason={str(error)!r}", file=sys.stderr)
        if images:
            computed = student(manifest.preprocess.batch(images), FEATURES)  # (b, F)
            cache.put(digests, computed)
            features.update(zip(digests, computed, strict=True))
    store.close()
    there = [i for i, digest in enumerate(stored.sha256) if digest in features]
    if not there:
        raise StoreError(f"no readable sample of {job.environment} in {job.store}")
    digests = [stored.sha256[i] for i in there]
    return digests, Samples(
        np.stack([features[digest] for digest in digests]), stored.embeddings[there], stored.propensities[there]
    )


def run(job: Job) -> Outcome:
    """Trains, gates, and writes the result into `job.output`. Equal jobs give equal bytes on one machine."""
    torch.use_deterministic_algorithms(True)
    if job.config.threads:
        torch.set_num_threads(job.config.threads)
    manifest = StudentManifest.from_json((job.running / "manifest.json").read_bytes())
    pool = LabelPool.load(job.pool)
    sha256, samples = load_samples(job, manifest)
    mask = held_out_mask(sha256, job.config.held_out)
    if mask.all() or not mask.any():
        raise StoreError(f"{len(sha256)} samples are too few to train on some and hold others out")
    train, held_out = samples.where(~mask), samples.where(mask)
    dim = manifest.embedding_dim
    version0 = Head.from_bytes((job.version0 / HEAD_FILE).read_bytes(), dim)
    running = Head.from_bytes((job.running / HEAD_FILE).read_bytes(), dim)
    learned = learn_head(train, held_out, version0, pool, job.config)
    parent = judge(running, held_out, pool)
    outcome = Outcome(
        accepted=learned.judgement.agreement >= parent.agreement,
        samples=len(sha256),
        pool_version=pool.version,
        agreement=learned.judgement.agreement,
        parent_agreement=parent.agreement,
        method=learned.method,
        calibration=_calibration(learned.judgement, held_out),
    )
    (job.output / HEAD_FILE).write_bytes(learned.head.to_bytes())
    (job.output / RESULT_FILE).write_bytes(TypeAdapter(Outcome).dump_json(outcome))
    return outcome


def _calibration(judgement: Judgement, held_out: Samples) -> Calibration:
    return Calibration(
        margins=[round(float(margin), 6) for margin in judgement.margins],
        agrees=[bool(agrees) for agrees in judgement.agrees],
        propensities=[round(float(propensity), 6) for propensity in held_out.propensities],
    )


def main() -> int:
    try:
        run(Job.load(Path(sys.argv[1])))
    except EdgeFMError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
