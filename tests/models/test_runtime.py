"""ONNX Runtime behind one door: what it runs, and how it says no."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from edgefm.models.errors import ModelError
from edgefm.models.runtime import OnnxModel
from onnx import TensorProto, helper


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """`images` (batch, 3, 4, 4) -> `doubled`, `means` (batch, 3)."""
    node, value = helper.make_node, helper.make_tensor_value_info
    shape = ["batch", 3, 4, 4]
    made = helper.make_graph(
        [node("Add", ["images", "images"], ["doubled"]), node("ReduceMean", ["images", "axes"], ["means"], keepdims=0)],
        "tiny",
        [value("images", TensorProto.FLOAT, shape)],
        [value("doubled", TensorProto.FLOAT, shape), value("means", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])],
    )
    path = tmp_path / "tiny.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.mark.parametrize("threads", [0, 1])
def test_runs_any_batch_and_any_output(graph, threads):
    model = OnnxModel(graph, threads)
    for count in (1, 5, 2):
        images = np.random.default_rng(count).random((count, 3, 4, 4), np.float32)
        assert np.allclose(model(images), images * 2)
        assert np.allclose(model(images, "means"), images.mean(axis=(2, 3)), atol=1e-6)


def test_a_missing_model_is_named(tmp_path):
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(ModelError, match=f"there is no model file {path}"):
            OnnxModel(path)


def test_a_corrupt_model_is_refused_quietly(graph, capfd):
    data = graph.read_bytes()
    for damaged in (b"", b"not a model", data[: len(data) // 2], data.replace(b"ReduceMean", b"ReduceMoan")):
        graph.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"cannot load .*tiny\.onnx: .+"):
            OnnxModel(graph)
    assert capfd.readouterr().err == ""


def test_a_provider_that_is_not_built_in_is_refused(graph):
    assert "SNPEExecutionProvider" not in onnxruntime.get_available_providers()
    with pytest.raises(ModelError, match=r"SNPEExecutionProvider is not in this onnxruntime; there are .*CPU"):
        OnnxModel(graph, providers=["CPUExecutionProvider", "SNPEExecutionProvider"])


@pytest.mark.parametrize(
    ("images", "output"),
    [
        (np.zeros((1, 3, 5, 5), np.float32), None),
        (np.zeros((3, 4, 4), np.float32), None),
        (np.zeros((1, 3, 4, 4), np.float64), None),
        (np.zeros((1, 3, 4, 4), np.float32), "none"),
    ],
    ids=["size", "rank", "type", "output"],
)
def test_what_the_model_does_not_take_is_an_error_of_the_model(graph, images, output):
    with pytest.raises(ModelError, match=r"the model failed: .+"):
        OnnxModel(graph)(images, output)
