"""Building students: torch module, version 0, and the ONNX graph with its weights beside it. Needs torch and onnx."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from .backbones import build_backbone, classifier_rows, feature_graph
from .foundation.base import FoundationModel
from .foundation.synclip import shipped_means
from .students import StudentProfile
from .versions import GRAPH_FILE, quantise_fp16

BACKBONE_FILE = "backbone.fp16.bin"
HEAD_FILE = "head.fp16.bin"
FEATURES = "features"
EMBEDDINGS = "embeddings"

VERSION0_RIDGE = 3.0
_EXTERNAL_FROM = 256  # smaller tensors (shapes, scalars) stay inside the graph


class Head:
    """The linear map from backbone features into the FM's space, already rounded to fp16.

    Attributes:
        weight: (F, D) float32.
        bias: (D,) float32.
    """

    def __init__(self, weight: np.ndarray, bias: np.ndarray) -> None:
        self.weight = quantise_fp16(weight)
        self.bias = quantise_fp16(bias)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(B, F) features -> (B, D) L2-normalised embeddings."""
        embeddings = features @ self.weight + self.bias
        return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)

    def to_bytes(self) -> bytes:
        return self.weight.astype("<f2").tobytes() + self.bias.astype("<f2").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, dim: int) -> Head:
        flat = np.frombuffer(data, "<f2").astype(np.float32)
        return cls(flat[:-dim].reshape(-1, dim), flat[-dim:])


def version0_head(profile: StudentProfile, model: FoundationModel) -> Head:
    """The head that has seen no sample: ridge regression from the student's ImageNet classifier rows to the FM's.

    Both sides are mean-removed: a direction common to all classes ranks no label. The feature mean is the shipped one.
    Embeddings are normalised, so the map's scale is free; a spectral norm of 1 keeps it well inside fp16.
    """
    mean = shipped_means()[f"{profile.backbone}-{profile.input_size}"].astype(np.float64)  # (F,)
    source = classifier_rows(profile.backbone).astype(np.float64)  # (1000, F)
    source -= source.mean(axis=0)
    target = model.imagenet_space().astype(np.float64)  # (1000, D)
    target -= target.mean(axis=0)
    gram = source.T @ source + VERSION0_RIDGE * np.eye(source.shape[1])
    weight = np.linalg.solve(gram, source.T @ target)  # (F, D)
    weight /= np.linalg.norm(weight, 2)
    return Head(weight, -mean @ weight)


class Student(torch.nn.Module):
    """Backbone and head as one torch module: (B, 3, S, S) -> (B, D) L2-normalised. The reference for the export."""

    def __init__(self, profile: StudentProfile, head: Head) -> None:
        super().__init__()
        self.backbone = build_backbone(profile.backbone)
        self.head = torch.nn.Linear(*head.weight.shape)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(head.weight.T))
            self.head.bias.copy_(torch.from_numpy(head.bias))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.head(self.backbone(images)), dim=1)


@cache
def _backbone_parts(profile: StudentProfile) -> tuple[onnx.ModelProto, bytes]:
    """The feature graph with every large weight moved to `BACKBONE_FILE` as fp16, and that file's bytes."""
    model = onnx.load(feature_graph(profile.backbone, profile.input_size))
    blob, casts, kept = bytearray(), [], []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < _EXTERNAL_FROM:
            kept.append(tensor)
            continue
        data = numpy_helper.to_array(tensor).astype("<f2").tobytes()
        kept.append(_external(f"{tensor.name}.fp16", list(tensor.dims), BACKBONE_FILE, len(blob), len(data)))
        casts.append(helper.make_node("Cast", [f"{tensor.name}.fp16"], [tensor.name], to=TensorProto.FLOAT))
        blob += data
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model, bytes(blob)


def _external(name: str, dims: list[int], file: str, offset: int, length: int) -> TensorProto:
    tensor = TensorProto(name=name, dims=dims, data_type=TensorProto.FLOAT16, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", file), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def student_files(profile: StudentProfile, head: Head) -> dict[str, bytes]:
    """The files of a student: graph, backbone weights, head weights.

    The graph maps `images` (batch, 3, S, S) to `embeddings` (batch, D), L2-normalised, and to `features` (batch, F),
    which the cloud caches for training. Only the head's file differs between versions with the same backbone.
    """
    backbone, backbone_blob = _backbone_parts(profile)
    model = onnx.ModelProto()
    model.CopyFrom(backbone)
    graph = model.graph
    feature_dim, dim = head.weight.shape
    weight_bytes = feature_dim * dim * 2
    graph.initializer.extend(
        [
            _external("head.weight.fp16", [feature_dim, dim], HEAD_FILE, 0, weight_bytes),
            _external("head.bias.fp16", [dim], HEAD_FILE, weight_bytes, dim * 2),
            numpy_helper.from_array(np.array([1], np.int64), "head.axes"),
            numpy_helper.from_array(np.array(1e-12, np.float32), "head.eps"),
        ]
    )
    node = helper.make_node
    graph.node.extend(
        [
            node("Cast", ["head.weight.fp16"], ["head.weight"], to=TensorProto.FLOAT),
            node("Cast", ["head.bias.fp16"], ["head.bias"], to=TensorProto.FLOAT),
            node("Gemm", [FEATURES, "head.weight", "head.bias"], ["head.raw"]),
            node("ReduceL2", ["head.raw", "head.axes"], ["head.norm"], keepdims=1),
            node("Max", ["head.norm", "head.eps"], ["head.length"]),
            node("Div", ["head.raw", "head.length"], [EMBEDDINGS]),
        ]
    )
    graph.output.insert(0, helper.make_tensor_value_info(EMBEDDINGS, TensorProto.FLOAT, ["batch", dim]))
    return {
        GRAPH_FILE: model.SerializeToString(deterministic=True),
        BACKBONE_FILE: backbone_blob,
        HEAD_FILE: head.to_bytes(),
    }
