"""What is done to rows of activations between products: a kernel each, or PyTorch's operators without a compiler and where
gradients are wanted."""

from __future__ import annotations

import ctypes

import torch
from torch.nn.functional import silu

from ..native import missing, pointer
from .products import library


def normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root-mean-square norm of x (T, dim) float32."""
    if _by_operators(x) or x.shape[-1] % 16:
        return weight * (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + epsilon))
    x = x.contiguous()
    found = torch.empty_like(x)
    sizes = map(ctypes.c_int64, x.shape)
    threads = torch.get_num_threads()
    library().norm_rows(pointer(x), pointer(weight), *sizes, ctypes.c_float(epsilon), pointer(found), threads)
    return found


def split_rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, key_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of projections x (T, (heads + 2 key heads) D) queries, keys and values, (heads or key heads, T, D).

    Element c and element c + D / 2 of a query or key turn by the angle of `cos` and `sin` (T, D / 2).
    """
    dim = 2 * cos.shape[-1]
    if _by_operators(x):
        q, k, v = split(x, heads, key_heads, dim)
        return turned(q, cos, sin), turned(k, cos, sin), v
    parts = heads + 2 * key_heads
    found = torch.empty(parts, len(x), dim)
    sizes = map(ctypes.c_int64, (len(x), heads + key_heads, parts, dim))
    tensors = map(pointer, (x.contiguous(), cos, sin))
    library().rotate_rows(*tensors, *sizes, pointer(found), torch.get_num_threads())
    q, k, v = found.split((heads, key_heads, key_heads))
    return q, k, v


def split(x: torch.Tensor, heads: int, key_heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projections x (T, (heads + 2 key heads) D) as queries, keys and values, (heads or key heads, T, D)."""
    q, k, v = x.view(len(x), -1, dim).transpose(0, 1).split((heads, key_heads, key_heads))
    return q, k, v


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (heads, T, D) by the angles of `cos` and `sin` (T, D / 2), as `split_rotated` turns them; differentiable."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def gated(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) up of x = [gate, up], (T, 2 hidden) -> (T, hidden)."""
    rows, hidden = x.shape[0], x.shape[1] // 2
    if _by_operators(x) or hidden % 16:
        gate, up = x.chunk(2, dim=-1)
        return silu(gate) * up
    x = x.contiguous()
    found = torch.empty(rows, hidden)
    sizes = map(ctypes.c_int64, (rows, hidden))
    library().gate_rows(pointer(x), *sizes, pointer(found), torch.get_num_threads())
    return found


def _by_operators(x: torch.Tensor) -> bool:
    return x.device.type != "cpu" or (x.requires_grad and torch.is_grad_enabled()) or missing(library) is not None
