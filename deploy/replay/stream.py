"""Images to replay, and what the product's student and FM say of them."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path, PurePosixPath
from queue import SimpleQueue

import numpy as np

from ...cloud.registry import Registry
from ...cloud.version0 import publish_version0
from ...edge.cloud_client import CloudClient
from ...edge.frames import Frame, readable
from ...edge.queries import CloudAnswer
from ...edge.sources import open_source
from ...edge.student import Student
from ...models.confidence import graded_agreement
from ...models.errors import CloudError, InputError
from ...models.foundation import FoundationModel, build_pool
from ...models.images import decode_image
from ...models.pool import LabelPool
from ..bench.clouds import cloud_without_learning, register
from .recording import Recording
from .timing import BatchCost, CloudProfile, Cost, Timing

_BATCHES = (1, 2, 4, 8, 16)
_WARM_UP, _REPEATS, _CALLS, _FRAMES, _PATIENCE_S = 3, 15, 40, 60, 20.0
_PAUSE_S = 0.05
"""Between measurements: frames and queries of few devices find a model whose caches others have used since."""
_LEAST_MS = 1e-3


@dataclass(frozen=True)
class Stream:
    """Images in an order given by their content, and their labels where the source tells them."""

    name: str
    encoded: tuple[bytes, ...]
    labels: tuple[str, ...]
    truth: tuple[str, ...] | None

    @classmethod
    def open(cls, source: Path, samples: int, labels: Sequence[str] = ()) -> Stream:
        """From a folder or tar laid out `val/<label>/` (what is beside `val/` is left out), or of plain files.

        Args:
            samples: at most so many images.
            labels: needed for plain files, which carry none.

        Raises:
            InputError: no image, or plain files without labels.
        """
        everything = sorted(readable(open_source(source)), key=lambda frame: hashlib.sha256(frame.encoded).digest())
        scored = [frame for frame in everything if PurePosixPath(frame.sample_id).parts[-3:-2] == ("val",)]
        frames = (scored or everything)[:samples]
        truth = tuple(_label_of(frame) for frame in frames) if scored else None
        if truth is None and not labels:
            raise InputError(f"{source} has no val/<label>/; plain files need labels ('edgefm replay --labels')")
        found = tuple(labels) or tuple(sorted({_label_of(frame) for frame in scored}))
        return cls(source.name, tuple(frame.encoded for frame in frames), found, truth)


def _label_of(frame: Frame) -> str:
    return PurePosixPath(frame.sample_id).parts[-2]


def record(stream: Stream, model: FoundationModel, student: str) -> tuple[Recording, Timing]:
    """What version 0 of a student and the FM say of each image, and how long the student took for one on this machine:
    decoding, preprocessing, student and recognition."""
    pool = build_pool(model, list(stream.labels))
    with tempfile.TemporaryDirectory(prefix="edgefm-replay-") as folder:
        registry = Registry(Path(folder) / "registry")
        manifest = publish_version0(registry, model, "replay", student, pool.version)
        files = Path(folder) / "student"
        registry.materialise(manifest, files)
        running = Student(manifest, files)
        student_embeddings = np.stack([_seen(running, data, pool)[0] for data in stream.encoded])
        frames = itertools.cycle(stream.encoded)
        device_ms = _timed(lambda: _seen(running, next(frames), pool), _FRAMES)
    fm_embeddings = np.concatenate(
        [
            model.embed_images([decode_image(data) for data in stream.encoded[start : start + _BATCHES[-1]]])
            for start in range(0, len(stream.encoded), _BATCHES[-1])
        ]
    )
    found, fm = (pool.recognise(vectors, top_k=1) for vectors in (student_embeddings, fm_embeddings))
    said, fm_said = (np.array(pool.answers(some), dtype=object) for some in (found, fm))
    truth = fm_said if stream.truth is None else np.array(stream.truth, dtype=object)
    fm_similarities, similarities = (
        pool.with_unknown(vectors @ pool.embeddings.T) for vectors in (fm_embeddings, student_embeddings)
    )
    recording = Recording(
        margins=found.margins,
        agreements=graded_agreement(fm_similarities, similarities, pool.temperature, manifest.confidence),
        edge_right=said == truth,
        cloud_right=fm_said == truth,
        size_bytes=np.array([len(data) for data in stream.encoded]),
    )
    return recording, Timing(*_percentiles(device_ms))


def _seen(student: Student, encoded: bytes, pool: LabelPool) -> tuple[np.ndarray, str, float, float]:
    return student.recognise(student.preprocess(decode_image(encoded)), pool)


def measure_cloud(stream: Stream, model: FoundationModel, student: str) -> CloudProfile:
    """What decoding and the FM cost on this machine, for batches of several sizes, and what a call of a cloud costs beside."""
    batches = []
    for size in _BATCHES:
        images = [stream.encoded[i % len(stream.encoded)] for i in range(size)]
        taken_ms = _timed(lambda images=images: model.embed_images([decode_image(data) for data in images]), _REPEATS)
        p50, p95 = _percentiles(taken_ms)
        batches.append(BatchCost(size=size, p50_ms=p50, p95_ms=p95))
    p50, p95 = _percentiles(_measure_calls(stream, student))
    return CloudProfile(
        source=f"edgefm replay, {date.today().isoformat()}",
        foundation_model=model.name,
        batches=tuple(batches),
        call=Cost(p50_ms=p50, p95_ms=p95),
    )


def _measure_calls(stream: Stream, student: str) -> list[float]:
    """Of queries to a cloud process on this machine: round trip less queue and computation, in ms."""
    with tempfile.TemporaryDirectory(prefix="edgefm-replay-") as folder, cloud_without_learning(Path(folder)) as cloud:
        register(cloud, "replay", stream.labels, student)
        client = CloudClient(cloud.target, "replay", "replay", deadline_ms=60_000)
        server_ms: list[float] = []

        def ask() -> None:
            answered: SimpleQueue[CloudAnswer | CloudError] = SimpleQueue()
            client.query(stream.encoded[0], 1.0, answered.put, keep=False)
            answer = answered.get()
            if isinstance(answer, CloudError):
                raise answer
            server_ms.append(answer.queue_ms + answer.compute_ms)

        try:
            taken_ms = _timed(ask, _CALLS)
        finally:
            client.close()
    return [max(taken - served, _LEAST_MS) for taken, served in zip(taken_ms, server_ms[-len(taken_ms) :], strict=True)]


def _timed(work: Callable[[], object], repeats: int) -> list[float]:
    """Of some work at intervals, in ms, without its first ones; fewer repeats where they take long."""
    taken_ms, began = [], time.perf_counter()
    while len(taken_ms) < repeats + _WARM_UP and time.perf_counter() - began < _PATIENCE_S:
        started = time.perf_counter()
        work()
        taken_ms.append((time.perf_counter() - started) * 1e3)
        time.sleep(_PAUSE_S)
    return taken_ms[_WARM_UP:] or taken_ms


def _percentiles(taken_ms: Sequence[float]) -> tuple[float, float]:
    p50, p95 = (round(float(np.percentile(taken_ms, q)), 3) for q in (50, 95))
    return p50, p95
