"""What is taken out of pretrained backbones once per machine: ONNX graphs and classifiers. Torch is loaded for that alone: it
takes seconds to load."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

from .cache import cached_arrays, cached_file
from .weights import OPSET, TAIL_STAGES, weights_path


def feature_graph(backbone: str, input_size: int) -> Path:
    """The exported backbone at one input size; exported once per machine (some 10 s), then cached."""

    def export() -> bytes:
        from .backbones import build_backbone, export_features

        return export_features(build_backbone(backbone), input_size)

    return _exported(backbone, input_size, "", export)


def trunk_graph(backbone: str, input_size: int) -> Path:
    """Its part before the tail, (batch, 3, S, S) -> (batch, C, h, w); exported once per machine, then cached."""

    def export() -> bytes:
        from .backbones import export_trunk

        return export_trunk(backbone, input_size)

    return _exported(backbone, input_size, f"-trunk{TAIL_STAGES}", export)


def classifier_rows(backbone: str) -> np.ndarray:
    """The 1,000 rows of the ImageNet classifier, (1000, F) float32; taken out of the weights once per machine, then cached."""

    def take() -> dict[str, np.ndarray]:
        from .backbones import classifier

        return {"rows": classifier(backbone)}

    return cached_arrays(f"{backbone}-classifier-{_digest(backbone)}-timm{version('timm')}.npz", take)["rows"]


def _exported(backbone: str, input_size: int, part: str, export: Callable[[], bytes]) -> Path:
    versions = f"opset{OPSET}-torch{version('torch')}-timm{version('timm')}"
    return cached_file(f"{backbone}{part}-{input_size}-{_digest(backbone)}-fp16-{versions}.onnx", export)


def _digest(backbone: str) -> str:
    return _digest_of(weights_path(backbone))


@cache
def _digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
