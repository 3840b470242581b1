"""What the FM's thread computes: embeddings of a batch, and each sample's labels in its own environment's pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..models.errors import ImageError
from ..models.foundation import FoundationModel
from ..models.images import decode_image
from ..models.pool import UNKNOWN, LabelPool
from ..proto.limits import MAX_IMAGE_BYTES
from .batcher import DynamicBatcher


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


Decoded = tuple[Image.Image, Query]
FmBatcher = DynamicBatcher[Query, Decoded, Recognised]


def decode(query: Query) -> Decoded:
    """Raises `ImageError` for an image that is damaged or too large."""
    if len(query.image) > MAX_IMAGE_BYTES:
        raise ImageError(f"an image of {len(query.image)} bytes; at most {MAX_IMAGE_BYTES} are taken")
    return decode_image(query.image), query


def recogniser(model: FoundationModel) -> Callable[[Sequence[Decoded]], list[Recognised]]:
    """Samples of one pool are compared with it together."""

    def recognise(batch: Sequence[Decoded]) -> list[Recognised]:
        embeddings = model.embed_images([image for image, _ in batch])  # (B, D)
        found: dict[int, Recognised] = {}
        for pool in {id(query.pool): query.pool for _, query in batch}.values():
            rows = [row for row, (_, query) in enumerate(batch) if query.pool is pool]
            recognition = pool.recognise(embeddings[rows], max(batch[row][1].top_k for row in rows))
            for place, row in enumerate(rows):
                top_k = batch[row][1].top_k
                found[row] = Recognised(
                    pool,
                    embeddings[row],
                    recognition.indices[place, :top_k],
                    recognition.similarities[place, :top_k],
                    float(recognition.margins[place]),
                    bool(recognition.unknown[place]),
                )
        return [found[row] for row in range(len(batch))]

    return recognise
