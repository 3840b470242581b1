"""The fused kernels of DAPE and DAPE V2 for the CPU, of dape.cpp."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch.autograd.function import once_differentiable

from ..native import load, pointer


class _Shape(ctypes.Structure):
    """`Shape` of dape.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "queries", "keys", "dim", "hidden")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("taps", "threads")),
    )


class _Network(ctypes.Structure):
    """`Network` of dape.cpp."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("bias", "units", "units_at_0", "w1", "w2"))


class _Gradients(ctypes.Structure):
    """`Gradients` of dape.cpp."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("q", "k", "v", "bias", "units", "units_at_0", "w1", "w2"))


@functools.cache
def library() -> ctypes.CDLL:
    """Raises KernelError, StoreError: see `edgefm.models.native.load`."""
    return load("attention/dape.cpp", ("dape_forward", "dape_backward"), ("vectors.h", "attention/tiles.h"))


def _shape(q: torch.Tensor, k: torch.Tensor, w1: torch.Tensor) -> _Shape:
    batch, heads, queries, dim = q.shape
    taps, hidden, _ = w1.shape
    sizes = (batch, heads, k.shape[1], queries, k.shape[2], dim, hidden)
    return _Shape(*sizes, dim**-0.5, taps, torch.get_num_threads())


class Attention(torch.autograd.Function):
    """`apply(q, k, v, bias, units, units_at_0, w1, w2)`: q, k, v of `edgefm.models.attention.attend`, the rest of `Dape.tables`.

    Extra memory is O(HK D T), in the backward pass O((HK D + H + C) T) a thread: no (H, T, T) scores.
    """

    @staticmethod
    def forward(ctx, q, k, v, *tables):  # pyright: ignore[reportIncompatibleMethodOverride]
        tensors = [x.detach().to(torch.float32).contiguous() for x in (q, k, v, *tables)]
        shape = _shape(tensors[0], tensors[1], tensors[6])
        learns = any(ctx.needs_input_grad)
        out = torch.empty_like(tensors[0])
        log_sums = tensors[0].new_empty(q.shape[:3]) if learns else None
        network = _Network(*map(torch.Tensor.data_ptr, tensors[3:]))
        library().dape_forward(
            ctypes.byref(shape),
            *map(pointer, tensors[:3]),
            ctypes.byref(network),
            *map(pointer, (out, log_sums)),
        )
        if learns:
            ctx.save_for_backward(*tensors, out, log_sums)
            ctx.dtypes = [x.dtype for x in (q, k, v, *tables)]
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        *tensors, out, log_sums = ctx.saved_tensors
        shape = _shape(tensors[0], tensors[1], tensors[6])
        grad = grad.to(torch.float32).contiguous()
        found = [torch.zeros_like(x) for x in tensors]
        library().dape_backward(
            ctypes.byref(shape),
            *map(pointer, tensors[:3]),
            ctypes.byref(_Network(*map(torch.Tensor.data_ptr, tensors[3:]))),
            *map(pointer, (out, log_sums, grad)),
            ctypes.byref(_Gradients(*map(torch.Tensor.data_ptr, found))),
        )
        return tuple(x.to(dtype) for x, dtype in zip(found, ctx.dtypes, strict=True))
