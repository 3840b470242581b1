"""The protocol of a foundation model and how one is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import numpy as np
from PIL import Image

from ..errors import ConfigError
from ..images import Preprocess
from ..pool import LabelPool, check_descriptions, check_labels, normalise

DESCRIPTION_WEIGHT = 0.5
"""Of the descriptions' mean beside the label's own embedding. Not tuned; with `synclip`, 0.25 to 1 differ by under 2 points on
ImageNet's names and by up to 5.2 on others (`edgefm bench labels`)."""


class FoundationModel(Protocol):
    """An image tower and a text tower with one joint space.

    Attributes:
        name: the URI it was loaded from, normalised; part of every pool's version.
        dim: D, the dimension of the joint space.
        input_size: side of the square the image tower sees, in pixels.
        unknown_floor: below this best similarity a sample has no label in the pool; -1 turns it off.
        temperature: softmax(similarities / temperature) is how sure the model is of each label of a pool.
        preprocess: what one image goes through before `embed`; may run in other threads than that.
    """

    name: str
    dim: int
    input_size: int
    unknown_floor: float
    temperature: float
    preprocess: Preprocess

    def embed(self, batch: np.ndarray) -> np.ndarray:
        """Preprocessed images, (B, 3, S, S) float32 -> (B, D) float32, L2-normalised."""
        ...

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Both steps: B images -> (B, D) float32, L2-normalised."""
        ...

    def embed_labels(self, labels: Sequence[str]) -> np.ndarray:
        """K labels -> (K, D) float32, L2-normalised."""
        ...

    def label_warnings(self, labels: Sequence[str]) -> list[str]:
        """One sentence for each label that is out of the model's reach."""
        ...

    def imagenet_space(self) -> np.ndarray:
        """The 1,000 ImageNet classes in the joint space, (1000, D) float32: what a student's version 0 is mapped on."""
        ...


def build_pool(
    model: FoundationModel, labels: Sequence[str], descriptions: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> LabelPool:
    """Embeds the labels, and what describes them.

    A described label's embedding is the normalised weighted mean of the label's own and its descriptions' mean.

    Args:
        descriptions: of labels, as many as are described; those of other labels are left out.

    Raises:
        LabelError: an unusable label or description.
    """
    cleaned = check_labels(labels)
    described = {label: check_descriptions(label, descriptions[label]) for label in cleaned if descriptions.get(label)}
    return LabelPool(
        labels=cleaned,
        embeddings=described_embeddings(model, cleaned, described),
        foundation_model=model.name,
        unknown_floor=model.unknown_floor,
        temperature=model.temperature,
        warnings=tuple(model.label_warnings(cleaned)),
        descriptions=described,
    )


def described_embeddings(
    model: FoundationModel,
    labels: Sequence[str],
    descriptions: Mapping[str, Sequence[str]],
    weight: float = DESCRIPTION_WEIGHT,
) -> np.ndarray:
    """The mean as `build_pool` takes it: K labels -> (K, D) float32, L2-normalised; no sequence of `descriptions` is empty."""
    embeddings = model.embed_labels(labels)
    if not descriptions:
        return embeddings
    owners = np.array([labels.index(label) for label, texts in descriptions.items() for _ in texts])  # (N,)
    texts = model.embed_labels([text for texts in descriptions.values() for text in texts])  # (N, D)
    mixed = embeddings.copy()
    for row in np.unique(owners):
        described = normalise(texts[owners == row].mean(axis=0))
        mixed[row] = normalise((1 - weight) * embeddings[row] + weight * described)
    return mixed


def load_foundation_model(uri: str) -> FoundationModel:
    """Loads `synclip[:SIZE]` or `openclip:ARCHITECTURE/WEIGHTS`.

    Raises:
        ConfigError: the URI is malformed.
        ModelError: weights are missing or do not fit.
    """
    scheme, _, rest = uri.partition(":")
    if scheme == "synclip":
        from .synclip import SynClip

        return SynClip.from_uri(rest)
    if scheme == "openclip":
        from .openclip import OpenClip

        return OpenClip.from_uri(rest)
    raise ConfigError(
        f"unknown foundation model {uri!r}; use synclip, openclip:ARCHITECTURE/TAG or openclip:ARCHITECTURE//PATH"
    )
