"""SynCLIP, the embedded foundation model: an image tower and a text tower joined by synthesised classifiers.

The image tower is EfficientNet-Lite2, the text tower MiniLM; both come as PyPI packages. A label's embedding is the
softmax-weighted sum of the 1,000 mean-removed ImageNet classifier rows, weighted by the text similarity of the label
to each class's best synonym (temperature `TAU`); an image's is its pooled feature minus a fixed mean (after Changpinyo
et al. 2016, "Synthesized Classifiers for Zero-Shot Learning").

What it is not: both towers saw ImageNet's classes in pretraining, so a label near one of them is new to the pool but
not to the model. Far from ImageNet's names it is weak, and says so.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib import resources
from importlib.metadata import version

import numpy as np
from PIL import Image

from ..backbone_graphs import classifier_rows, feature_graph
from ..cache import cached_arrays
from ..errors import ConfigError
from ..images import Preprocess
from ..pool import normalise
from ..runtime import OnnxModel
from .minilm import TextTower

BACKBONE = "tf_efficientnet_lite2"
INPUT_SIZES = (160, 260)
TAU = 0.05
"""0.03 to 0.07 differ by under half a point on Tiny-ImageNet's validation images."""
REACH = 0.65
"""Text similarity below which no ImageNet class counts as near a label."""
UNKNOWN_FLOOR = 0.07
"""Loses about 1 % of the samples of known labels and catches about 60 % of the others (Tiny-ImageNet)."""
TEMPERATURE = 0.033
"""Least cross entropy on labelled images of 160 classes (Tiny-ImageNet), in pools of 20 of them; 0.030 to 0.037 in pools of
5 to 160."""


@cache
def shipped_means() -> dict[str, np.ndarray]:
    """Mean pooled feature of each backbone and input size, (F,), fitted once by `edgefm.models.fit_means`."""
    with resources.files("edgefm.models.foundation").joinpath("feature_means.npz").open("rb") as file:
        archive = np.load(io.BytesIO(file.read()), allow_pickle=False)
        return {key: archive[key].astype(np.float32) for key in archive.files}


class SynClip:
    """See the module. Satisfies `FoundationModel`."""

    def __init__(self, input_size: int = 160) -> None:
        self.name = "synclip" if input_size == INPUT_SIZES[0] else f"synclip:{input_size}"
        self.input_size = input_size
        self.unknown_floor = UNKNOWN_FLOOR
        self.temperature = TEMPERATURE
        self.preprocess = Preprocess(input_size)
        self._tower = OnnxModel(feature_graph(BACKBONE, input_size))
        self._mean = shipped_means()[f"{BACKBONE}-{input_size}"]
        rows = classifier_rows(BACKBONE)  # (1000, D)
        self._rows = rows - rows.mean(axis=0)
        self.dim = rows.shape[1]
        self._text = TextTower()
        known = cached_arrays(f"imagenet-synonyms-{self._text.name}-timm{version('timm')}.npz", self._embed_names)
        self._names: list[str] = known["names"].tolist()
        self._class_of, self._name_embeddings = known["classes"], known["embeddings"]  # (N,), (N, 384)
        # Embedding labels and warning of them follow each other and need the same comparison.
        self._name_similarity = lru_cache(maxsize=2)(self._compare_names)

    @classmethod
    def from_uri(cls, rest: str) -> SynClip:
        sizes = {"": INPUT_SIZES[0], **{str(size): size for size in INPUT_SIZES}}
        if rest not in sizes:
            raise ConfigError(f"synclip has input sizes {INPUT_SIZES}, not {rest!r}")
        return cls(sizes[rest])

    def embed(self, batch: np.ndarray) -> np.ndarray:
        features = self._tower(batch)  # (B, D)
        return normalise(features - self._mean)

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        return self.embed(self.preprocess.batch(images))

    def embed_labels(self, labels: Sequence[str]) -> np.ndarray:
        similarity = np.full((len(labels), len(self._rows)), -1.0, np.float32)  # (K, 1000), best synonym of each class
        np.maximum.at(similarity.T, self._class_of, self._name_similarity(tuple(labels)).T)
        weights = np.exp((similarity - similarity.max(axis=1, keepdims=True)) / TAU)
        weights /= weights.sum(axis=1, keepdims=True)
        return normalise(weights @ self._rows)

    def label_warnings(self, labels: Sequence[str]) -> list[str]:
        return [
            f"{label!r} is out of {self.name}'s reach: the nearest class it knows is {self._names[row.argmax()]!r} "
            f"(text similarity {row.max():.2f}, near from {REACH}); expect poor answers"
            for label, row in zip(labels, self._name_similarity(tuple(labels)), strict=True)
            if row.max() < REACH
        ]

    def imagenet_space(self) -> np.ndarray:
        return self._rows

    def _compare_names(self, labels: tuple[str, ...]) -> np.ndarray:
        """(K, N): text similarity of each label to each class name."""
        return self._text.embed(labels) @ self._name_embeddings.T

    def _embed_names(self) -> dict[str, np.ndarray]:
        names, classes = _class_names()
        return {"names": np.array(names), "classes": classes, "embeddings": self._text.embed(names)}


def _class_names() -> tuple[list[str], np.ndarray]:
    """Every synonym of the ImageNet classes (N), and the class of each (N,)."""
    from timm.data.imagenet_info import ImageNetInfo  # loads PyTorch

    info = ImageNetInfo()
    names, classes = [], []
    for index in range(1000):
        for name in re.split(r",\s*", info.index_to_description(index)):
            names.append(name)
            classes.append(index)
    return names, np.array(classes)
