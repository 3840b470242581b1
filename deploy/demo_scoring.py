"""Scores what the demo's systems would answer on the scoring images, with the product's own student and pool code.

Everything is paired over the same images: the FM's answers come from the running cloud (with `keep` off, so that nothing
is stored), the student's from each published version, and the system's are the student's where its margin reaches the
threshold that the agent had in force, else the FM's.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..cloud.registry import Registry
from ..edge.cloud_client import CloudClient
from ..edge.queries import CloudAnswer
from ..edge.student import Student
from ..models.errors import CloudError
from ..models.images import decode_image
from ..models.pool import LabelPool

_DEADLINE_MS = 60_000.0
_IN_FLIGHT = 32


@dataclass(frozen=True)
class StudentScores:
    """One version on N scoring images."""

    answers: np.ndarray  # (N,) str
    margins: np.ndarray  # (N,)

    def edge_share(self, threshold: float) -> float:
        return float((self.margins >= threshold).mean())

    def system_answers(self, threshold: float, fm_answers: np.ndarray) -> np.ndarray:
        return np.where(self.margins >= threshold, self.answers, fm_answers)


def ask_fm(target: str, environment: str, images: Sequence[bytes]) -> np.ndarray:
    """(N,) the FM's answers, asked of the running cloud without leaving a trace.

    Raises:
        CloudError: one of them failed.
    """
    answers: list[CloudAnswer | CloudError | None] = [None] * len(images)
    room, left = threading.Semaphore(_IN_FLIGHT), threading.Semaphore(0)
    client = CloudClient(target, "scorer", environment, _DEADLINE_MS)

    def ask(position: int) -> None:
        def done(result: CloudAnswer | CloudError) -> None:
            answers[position] = result
            room.release()
            left.release()

        room.acquire()
        client.query(images[position], 1.0, done, keep=False)

    try:
        for position in range(len(images)):
            ask(position)
        for _ in images:
            left.acquire()
    finally:
        client.close()
    labels = []
    for answer in answers:
        if not isinstance(answer, CloudAnswer):
            raise CloudError(f"scoring: the FM did not answer: {answer}")
        labels.append(answer.label)
    return np.array(labels, dtype=object)


def score_student(registry: Registry, environment: str, version: int, images: Sequence[bytes]) -> StudentScores:
    """A published version on the scoring images, with the environment's present pool."""
    manifest = registry.manifest(environment, version)
    pool: LabelPool = registry.pool(environment)[0]
    answers, margins = [], []
    with tempfile.TemporaryDirectory(prefix="edgefm-score-") as folder:
        registry.materialise(manifest, Path(folder))
        student = Student(manifest, Path(folder))
        for image in images:
            _, label, _, margin = student.recognise(student.preprocess(decode_image(image)), pool)
            answers.append(label)
            margins.append(margin)
    return StudentScores(np.array(answers, dtype=object), np.array(margins))


def accuracy(answers: np.ndarray, truth: np.ndarray) -> float:
    return float((answers == truth).mean())
