"""Weights in float32 or bfloat16, multiplied with activations in float32."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from .products import FEW, Matrix, missing, product


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
        if x.device.type == "cpu" and len(x) <= FEW and not self.weight.shape[1] % 32 and not missing():
            return product(self.described, x)
        if multiplies_halves(x.device):
            return linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        return linear(x, self.dense())


@functools.cache
def multiplies_halves(device: torch.device) -> bool:
    """Whether PyTorch has a bfloat16 product for this processor; its stand-in takes four times float32's time."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
