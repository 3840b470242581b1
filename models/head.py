"""The linear map at the end of a student. Without torch."""

from __future__ import annotations

import numpy as np

from .versions import quantise_fp16


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
