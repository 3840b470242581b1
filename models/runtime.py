"""ONNX Runtime sessions, configured in one place; its errors become `ModelError`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from .errors import ModelError


class OnnxModel:
    """A loaded ONNX graph with one input.

    Args:
        path: the graph; external weights lie beside it.
        threads: intra-op threads; 0 takes all cores.
        providers: ONNX Runtime execution providers in order of preference; those not built in are refused.

    Raises:
        ModelError: missing, corrupt or unsupported file, or an unavailable provider.
    """

    def __init__(self, path: Path, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        missing = [name for name in providers if name not in ort.get_available_providers()]
        if missing:
            raise ModelError(
                f"execution provider {missing[0]} is not in this onnxruntime; "
                f"there are {', '.join(ort.get_available_providers())}"
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are raised; fatal ones only
        # Spinning threads would take the cores from the other processes of a small device between two frames.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not path.is_file():
            raise ModelError(f"there is no model file {path}")
        try:
            self._session = ort.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # onnxruntime raises a family of its own without a public base
            raise ModelError(f"cannot load {path}: {_reason(error)}") from error
        self._input = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, batch: np.ndarray, output: str | None = None) -> np.ndarray:
        """Runs a batch, such as images (B, 3, S, S) float32; returns the named output, the first by default."""
        try:
            return np.asarray(self._session.run([output or self._outputs[0]], {self._input: batch})[0])
        except Exception as error:
            raise ModelError(f"the model failed: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The end of the first line: onnxruntime puts the C++ signature that failed before what was wrong."""
    line = str(error).partition("\n")[0]
    return line if len(line) <= 300 else f"...{line[-300:]}"
