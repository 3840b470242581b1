"""What the FM's thread computes: embeddings of a batch, and each sample's labels in its own environment's pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..models.errors import ImageError
from ..models.foundation import FoundationModel
from ..models.images import decode_image
from ..models.pool import UNKNOWN, LabelPool
from ..proto.limits import MAX_IMAGE_BYTES
from .batcher import DynamicBatcher
from .store import Labelled


@dataclass(frozen=True)
class Query:
    image: bytes  # encoded
    pool: LabelPool
    top_k: int


@dataclass(frozen=True)
class Recognised:
    """What the FM says of one sample."""

    pool: LabelPool
    embedding: np.ndarray  # (D,) float32
    indices: np.ndarray  # (k,) of the pool's labels, best first
    similarities: np.ndarray  # (k,)
    margin: float
    unknown: bool

    @property
    def label(self) -> str:
        return UNKNOWN if self.unknown else self.pool.labels[self.indices[0]]

    @property
    def labelled(self) -> Labelled:
        """What the store keeps of it."""
        return Labelled(self.embedding, self.label, self.margin, self.pool.version)


Prepared = tuple[np.ndarray, Query]
"""The model's input, (3, S, S) float32, and what it was made of."""
FmBatcher = DynamicBatcher[Query, Prepared, Recognised]


def preparer(model: FoundationModel) -> Callable[[Query], Prepared]:
    """Decodes and preprocesses: all that can be done beside the model, so that its thread only computes."""

    def prepare(query: Query) -> Prepared:
        """Raises `ImageError` for an image that is damaged or too large."""
        if len(query.image) > MAX_IMAGE_BYTES:
            raise ImageError(f"an image of {len(query.image)} bytes; at most {MAX_IMAGE_BYTES} are taken")
        return model.preprocess(decode_image(query.image)), query

    return prepare


def compare(embeddings: np.ndarray, pool: LabelPool, top_ks: Sequence[int]) -> list[Recognised]:
    """Sets (B, D) FM embeddings against one pool; as many labels of each as `top_ks` says."""
    recognition = pool.recognise(embeddings, max(top_ks))
    return [
        Recognised(
            pool,
            embedding,
            recognition.indices[row, :top_k],
            recognition.similarities[row, :top_k],
            float(recognition.margins[row]),
            bool(recognition.unknown[row]),
        )
        for row, (embedding, top_k) in enumerate(zip(embeddings, top_ks, strict=True))
    ]


def recogniser(model: FoundationModel) -> Callable[[Sequence[Prepared]], list[Recognised]]:
    """Samples of one pool are compared with it together."""

    def recognise(batch: Sequence[Prepared]) -> list[Recognised]:
        embeddings = model.embed(np.stack([image for image, _ in batch]))  # (B, D)
        found: dict[int, Recognised] = {}
        for pool in {id(query.pool): query.pool for _, query in batch}.values():
            rows = [row for row, (_, query) in enumerate(batch) if query.pool is pool]
            top_ks = [batch[row][1].top_k for row in rows]
            found.update(zip(rows, compare(embeddings[rows], pool, top_ks), strict=True))
        return [found[row] for row in range(len(batch))]

    return recognise
