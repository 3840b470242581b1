"""Static quantization of an ONNX graph to INT8, calibrated on real samples. Needs onnx."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static


class _Batches(CalibrationDataReader):
    def __init__(self, name: str, batches: Iterable[np.ndarray]) -> None:
        self._name = name
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


def quantise_int8(model: onnx.ModelProto, batches: Iterable[np.ndarray]) -> onnx.ModelProto:
    """Weights to int8, one scale a channel; activations to uint8, over the range that they take on the batches.

    Weights take 7 of the 8 bits: x86 processors without VNNI add two products in 16 bits, which overflow with 8, and a
    student would answer otherwise there than where it was judged.

    Args:
        model: with its weights inside and batch norms folded into the convolutions; it is not changed.
        batches: (B, 3, S, S) float32 each, samples of what the graph will see; one batch at least.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "int8.onnx"
        quantize_static(
            copy,
            str(path),
            _Batches(model.graph.input[0].name, batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
        )
        return onnx.load(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """It asks, on the root logger, for a preparation (folding) that the exported graphs have had."""
    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
