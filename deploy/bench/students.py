"""Measurements that take longer than a test: `edgefm bench students`."""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from ...cloud.config import CloudConfig, CustomizationConfig
from ...cloud.environments import Environments
from ...cloud.recognition import compare
from ...cloud.store import NewSample
from ...edge.frames import Frame, readable
from ...edge.sources import open_source
from ...edge.student import Student
from ...models.errors import InputError
from ...models.foundation import FoundationModel, load_foundation_model
from ...models.images import decode_image
from ...models.students import PROFILES, StudentProfile
from ..demo_results import describe_environment
from ..demo_scoring import accuracy, score_student

_BATCH = 16
_TIMED_RUNS = 50
_POLL_S = 0.05
_TIMEOUT_S = 300.0


def bench_students(data: Path, samples: int, seed: int, console: Console, head_only: bool = False) -> dict[str, Any]:
    """Each profile: milliseconds a frame, accuracy of version 0 and after customization, seconds to publish.

    Args:
        data: folder or tar laid out `train/<label>/`, `val/<label>/`; only `val`'s labels are read, and only to score.
        samples: of `train`, labelled by the FM.
        head_only: the tail is not trained, as with few samples.

    Raises:
        InputError: `data` has fewer images than that, or another layout.
    """
    stream = list(readable(open_source(data, "train/", shuffle_seed=seed)))[:samples]
    scoring = list(readable(open_source(data, "val/")))
    if len(stream) < samples:
        raise InputError(f"{data} has {len(stream)} images below train/, {samples} are wanted; lower --samples")
    truth = np.array([PurePosixPath(frame.sample_id).parts[-2] for frame in scoring], dtype=object)
    model = load_foundation_model("synclip")
    embeddings = _embed(model, stream)
    rows = []
    for profile in PROFILES.values():
        with console.status(f"Measuring {profile.name} ..."), tempfile.TemporaryDirectory() as folder:
            config = CustomizationConfig(first_at=samples)
            config = replace(config, tail_from=samples + 1) if head_only else config
            cloud = CloudConfig(Path(folder), student=profile.name, customization=config)
            measured = asyncio.run(_customized(model, cloud, stream, embeddings, sorted(set(truth))))
            environments, seconds = measured
            images = [frame.encoded for frame in scoring]
            rows.append(_row(profile, environments, images, truth, seconds))
    result = {
        "data": data.name,
        "samples": samples,
        "head_only": head_only,
        "students": rows,
        "environment": describe_environment(seed),
    }
    console.print(_table(result))
    return result


def _embed(model: FoundationModel, frames: list[Frame]) -> np.ndarray:
    parts = [
        model.embed_images([frame.image for frame in frames[i : i + _BATCH]]) for i in range(0, len(frames), _BATCH)
    ]
    return np.concatenate(parts)  # (N, D)


async def _customized(
    model: FoundationModel, cloud: CloudConfig, stream: list[Frame], embeddings: np.ndarray, labels: list[str]
) -> tuple[Environments, float | None]:
    """Fills the store but for the last sample, which triggers the run; None if the gate refused it."""
    environments = Environments(model, cloud)
    await environments.start()
    await environments.register("bench", labels, "")
    changed = environments.watch("bench")
    found = compare(embeddings, environments.pool("bench")[0], [1] * len(stream))
    for frame, recognised in zip(stream, found, strict=True):
        await environments.keep(NewSample("bench", frame.encoded, recognised.labelled, 1.0, "bench"))
    started, changed_after = time.perf_counter(), None
    while environments.trainer.learning and time.perf_counter() - started < _TIMEOUT_S:
        await asyncio.sleep(_POLL_S)
    if changed.is_set():
        changed_after = time.perf_counter() - started
    await environments.close()
    return environments, changed_after


def _row(
    profile: StudentProfile, environments: Environments, images: list[bytes], truth: np.ndarray, seconds: float | None
) -> dict[str, Any]:
    registry = environments.registry
    current = registry.current("bench")
    with tempfile.TemporaryDirectory() as folder:
        registry.materialise(current, Path(folder))
        student = Student(current, Path(folder))
        picture = decode_image(images[0])
        milliseconds = _median_ms(student, picture)
    return {
        "student": profile.name,
        "parameters_m": profile.parameters_m,
        "macs_m": profile.macs_m,
        "frame_ms": round(milliseconds, 2),
        "version0_accuracy": accuracy(score_student(registry, "bench", 0, images).answers, truth),
        "accuracy": accuracy(score_student(registry, "bench", current.version, images).answers, truth),
        "agreement_held_out": current.agreement,
        "method": current.method,
        "precision": current.precision,
        "trigger_to_published_s": None if seconds is None else round(seconds, 1),
    }


def _median_ms(student: Student, picture: Image.Image) -> float:
    """Preprocessing and student of one decoded frame; the student has been warmed up."""
    times = []
    for _ in range(_TIMED_RUNS):
        started = time.perf_counter()
        student.embed(student.preprocess(picture))
        times.append((time.perf_counter() - started) * 1e3)
    return float(np.median(times))


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['data']}, {result['samples']} samples labelled by the FM")
    for heading in ("student", "ms a frame", "accuracy, version 0", "customized", "trigger to published, s"):
        table.add_column(heading, justify="left" if heading == "student" else "right")
    for row in result["students"]:
        seconds = row["trigger_to_published_s"]
        cells = (row["frame_ms"], f"{row['version0_accuracy']:.3f}", f"{row['accuracy']:.3f}", seconds or "refused")
        table.add_row(row["student"], *map(str, cells))
    return table
