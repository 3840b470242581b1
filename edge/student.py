"""A student version, loaded and ready."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from ..models.errors import ModelError
from ..models.images import Preprocess
from ..models.pool import LabelPool
from ..models.runtime import OnnxModel
from ..models.versions import GRAPH_FILE, StudentManifest

WARM_UP_RUNS = 3
_LARGEST_INPUT = 1024
"""Pixels a side; no student sees more, and a manifest that asks for more would take the device's memory."""


class Student:
    """Loads, checks and warms up; raises `ModelError` for a graph that cannot run or gives no usable embedding."""

    def __init__(self, manifest: StudentManifest, folder: Path, threads: int = 0) -> None:
        self.manifest = manifest
        _check_preprocess(manifest.preprocess)
        self._model = OnnxModel(folder / GRAPH_FILE, threads)
        size = manifest.preprocess.size
        grey = self.preprocess(Image.new("RGB", (size, size), (128, 128, 128)))
        embedding = self.embed(grey)
        for _ in range(WARM_UP_RUNS - 1):
            self.embed(grey)
        if embedding.shape != (1, manifest.embedding_dim):
            raise ModelError(
                f"student version {manifest.version} gives {embedding.shape} embeddings, "
                f"expected (1, {manifest.embedding_dim})"
            )

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """Returns (1, 3, S, S) float32."""
        return self.manifest.preprocess(image)[None]

    def embed(self, batch: np.ndarray) -> np.ndarray:
        """(1, 3, S, S) -> (1, D) float32, L2-normalised. Raises `ModelError` where that fails."""
        embedding = self._model(batch)
        if embedding.dtype.kind != "f" or not np.isfinite(embedding).all():
            raise self._not_finite()
        return embedding

    def recognise(self, batch: np.ndarray, pool: LabelPool) -> tuple[np.ndarray, str, float, float]:
        """One frame (1, 3, S, S): its (D,) embedding, and label, similarity and margin by `LabelPool.best`. Raises `ModelError`
        where that fails."""
        embedding = self._model(batch)[0]
        label, similarity, margin = pool.best(embedding)
        # The margin is not finite where any number of the embedding is not; a look at each would cost a frame 15 us.
        if not math.isfinite(margin):
            raise self._not_finite()
        return embedding, label, similarity, margin

    def _not_finite(self) -> ModelError:
        return ModelError(f"student version {self.manifest.version} gives numbers that are not finite")


def _check_preprocess(preprocess: Preprocess) -> None:
    values = np.array([*preprocess.mean, *preprocess.std])
    if not 1 <= preprocess.size <= _LARGEST_INPUT or not np.isfinite(values).all() or min(preprocess.std) <= 0:
        raise ModelError(f"images cannot be prepared in this way: {preprocess}")
