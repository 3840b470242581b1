"""Building students: version 0, and the ONNX graph with its weights beside it. Needs onnx."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .backbone_graphs import classifier_rows, feature_graph
from .foundation.base import FoundationModel
from .foundation.synclip import shipped_means
from .head import Head
from .students import StudentProfile
from .versions import GRAPH_FILE, HEAD_FILE, TAIL_FILE, TRUNK_FILE
from .weights import TAIL_STAGES

if TYPE_CHECKING:
    from .backbones import Tail

FEATURES = "features"
EMBEDDINGS = "embeddings"

VERSION0_RIDGE = 3.0
VERSION0_TEMPERATURE = 1.4
"""Of the FM's own: what fits version 0 best on other images (docs: customization)."""
_EXTERNAL_FROM = 256  # smaller tensors (shapes, scalars) stay inside the graph


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
    weight /= np.sqrt(np.linalg.eigvalsh(weight.T @ weight)[-1])
    return Head(weight, -mean @ weight)


@dataclass(frozen=True)
class _Backbone:
    """A feature graph whose large weights lie in two files, as fp16."""

    graph: onnx.ModelProto
    trunk: bytes
    tail: bytes
    tail_layout: tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes, in the order of the file


@cache
def _backbone(name: str, input_size: int) -> _Backbone:
    model = onnx.load(feature_graph(name, input_size))
    of_tail, layout = _tail_names(model), []
    blobs, casts, kept = {TRUNK_FILE: bytearray(), TAIL_FILE: bytearray()}, [], []
    for tensor in model.graph.initializer:
        in_tail = tensor.name in of_tail
        if not in_tail and (tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < _EXTERNAL_FROM):
            kept.append(tensor)
            continue
        file = TAIL_FILE if in_tail else TRUNK_FILE
        data, blob = numpy_helper.to_array(tensor).astype("<f2").tobytes(), blobs[file]
        kept.append(_external(f"{tensor.name}.fp16", list(tensor.dims), file, len(blob), len(data)))
        casts.append(helper.make_node("Cast", [f"{tensor.name}.fp16"], [tensor.name], to=TensorProto.FLOAT))
        blob += data
        if in_tail:
            layout.append((tensor.name, tuple(tensor.dims)))
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return _Backbone(model, bytes(blobs[TRUNK_FILE]), bytes(blobs[TAIL_FILE]), tuple(layout))


def _tail_names(backbone: onnx.ModelProto) -> set[str]:
    """The parameters of the last stages and of the convolution behind them, as `Tail` names them."""
    names = [tensor.name.split(".") for tensor in backbone.graph.initializer]
    first = max(int(name[1]) for name in names if name[0] == "blocks") + 1 - TAIL_STAGES
    return {
        ".".join(name) for name in names if name[0] == "conv_head" or (name[0] == "blocks" and int(name[1]) >= first)
    }


def tail_to_bytes(profile: StudentProfile, tail: Tail) -> bytes:
    """A trained tail as the file that a student's graph reads."""
    weights = dict(tail.named_parameters())
    layout = _backbone(profile.backbone, profile.input_size).tail_layout
    return b"".join(weights[name].detach().numpy().astype("<f2").tobytes() for name, _ in layout)


def _external(name: str, dims: list[int], file: str, offset: int, length: int) -> TensorProto:
    tensor = TensorProto(name=name, dims=dims, data_type=TensorProto.FLOAT16, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", file), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def student_files(profile: StudentProfile, head: Head) -> dict[str, bytes]:
    """The files of version 0: graph, trunk, tail and head weights.

    The graph maps `images` (batch, 3, S, S) to `embeddings` (batch, D), L2-normalised, and to `features` (batch, F), those
    of the backbone. Later versions replace the head's file, or the head's and the tail's.
    """
    backbone = _backbone(profile.backbone, profile.input_size)
    return {
        GRAPH_FILE: _with_head(backbone.graph, head),
        TRUNK_FILE: backbone.trunk,
        TAIL_FILE: backbone.tail,
        HEAD_FILE: head.to_bytes(),
    }


def int8_files(
    profile: StudentProfile, head: Head, tail: Tail | None, batches: Iterable[np.ndarray]
) -> dict[str, bytes]:
    """The files of a quantised version: the graph with its INT8 backbone inside, and the head, which stays fp16.

    Args:
        tail: a trained one; None is the pretrained.
        batches: (B, 3, S, S) float32 each, samples on which the ranges of the activations are measured.
    """
    from .quantise import quantise_int8

    model = onnx.load(feature_graph(profile.backbone, profile.input_size))
    trained = {} if tail is None else dict(tail.named_parameters())
    for tensor in model.graph.initializer:
        if tensor.name in trained:
            tensor.CopyFrom(numpy_helper.from_array(trained[tensor.name].detach().numpy(), tensor.name))
    return {GRAPH_FILE: _with_head(quantise_int8(model, batches), head), HEAD_FILE: head.to_bytes()}


def _with_head(backbone: onnx.ModelProto, head: Head) -> bytes:
    """The graph of a student; the head's weights lie beside it."""
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
    return model.SerializeToString(deterministic=True)
