"""Weights in blocks of 32 with a scale each, as GGUF files have them, multiplied without being unpacked in memory."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import linear

from ..native import pointer
from .products import FEW, Matrix, library, product

BLOCK = 32


@dataclass(frozen=True)
class Blocks:
    """A matrix (out, in), w = scale q + least by blocks along `in`.

    Attributes:
        q: (out, in / 32, 16) uint8, byte i with weights i and i + 16 in its halves; or (out, in / 32, 32) int8.
        scale, least: (out, in / 32) float32; `least` None is 0.
    """

    q: torch.Tensor
    scale: torch.Tensor
    least: torch.Tensor | None

    @functools.cached_property
    def described(self) -> Matrix:
        return Matrix.of(self.q, self.q.shape[1] * BLOCK, self.scale, self.least)

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.q.shape[1] * BLOCK

    def rows(self, rows: torch.Tensor) -> Blocks:
        least = None if self.least is None else self.least[rows].contiguous()
        return Blocks(self.q[rows].contiguous(), self.scale[rows].contiguous(), least)

    def dense(self) -> torch.Tensor:
        """(out, in) float32"""
        found = torch.empty(self.shape)
        library().unpack(ctypes.byref(self.described), pointer(found), torch.get_num_threads())
        return found

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (rows, in) float32 times the matrix transposed: (rows, out)."""
        return product(self.described, x) if len(x) <= FEW else linear(x, self.dense())


def quantised(weight: torch.Tensor) -> Blocks:
    """8 bits: the nearest multiples of a 127th of a block's largest weight (GGUF's Q8_0, with float32 scales)."""
    blocks = weight.to(torch.float32).view(weight.shape[0], -1, BLOCK)
    scale = blocks.abs().amax(dim=-1) / 127
    q = (blocks / scale.clamp(min=1e-30)[..., None]).round().clamp(-127, 127).to(torch.int8)
    return Blocks(q, scale, None)


def from_gguf(data: np.ndarray, kind: str) -> Blocks | None:
    """Of a GGUF tensor's rows of bytes; None for a kind that is unpacked and quantised anew."""
    sizes = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
    if kind not in sizes:
        return None
    raw = np.ascontiguousarray(data).view(np.uint8).reshape(data.shape[0], -1, sizes[kind])

    def half(at: int) -> torch.Tensor:
        return torch.from_numpy(raw[..., at : at + 2].copy().view(np.float16)[..., 0].astype(np.float32))

    if kind == "Q8_0":
        return Blocks(torch.from_numpy(raw[..., 2:].copy().view(np.int8)), half(0), None)
    if kind == "Q4_1":
        return Blocks(torch.from_numpy(raw[..., 4:].copy()), half(0), half(2))
    return Blocks(torch.from_numpy(raw[..., 2:].copy()), half(0), -8 * half(0))


def joined(parts: Sequence[Blocks]) -> Blocks | None:
    """One under another; None where they are of different kinds."""
    if len({(part.q.dtype, part.least is None) for part in parts}) > 1:
        return None
    least = None if parts[0].least is None else torch.cat([part.least for part in parts if part.least is not None])
    return Blocks(torch.cat([part.q for part in parts]), torch.cat([part.scale for part in parts]), least)
