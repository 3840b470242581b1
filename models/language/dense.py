"""Weights in float32 or bfloat16, multiplied with activations in float32."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from ..native import missing
from .products import FEW, Matrix, library, product


@dataclass(frozen=True)
class Dense:
    """A matrix.

    Attributes:
        weight: (out, in) float32 or bfloat16.
    """

    weight: torch.Tensor

    @functools.cached_property
    def described(self) -> Matrix:
        return Matrix.of(self.weight, self.weight.shape[1])

    def rows(self, rows: torch.Tensor) -> Dense:
        return Dense(self.weight[rows])

    def dense(self) -> torch.Tensor:
        """(out, in) float32"""
        return self.weight.to(torch.float32)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (rows, in) float32 times the matrix transposed: (rows, out)."""
        if self.weight.dtype == torch.float32:
            return linear(x, self.weight)
        if x.device.type == "cpu" and len(x) <= FEW and not self.weight.shape[1] % 32 and not missing(library):
            return product(self.described, x)
        if multiplies_halves(x.device):
            return linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        return linear(x, self.dense())


@functools.cache
def multiplies_halves(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself: PyTorch's stand-ins take up to four times float32's time."""
    if device.type != "cpu":
        return True
    emulates = platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not emulates
