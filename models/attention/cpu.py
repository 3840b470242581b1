"""The fused kernels for the CPU, of kernels.cpp. Without a compiler the reference runs, and `attend` says so once."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch.autograd.function import once_differentiable

from ..native import load, pointer
from .pattern import EPSILON, Form

_FORMS: dict[Form, int] = {"softmax": 0, "sa": 1, "sa_normalised": 2}
_WIDTH = 16
"""Head sizes are multiples of this: of every vector width that the kernels are built for."""


class _Shape(ctypes.Structure):
    """`Shape` of kernels.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "key_heads", "queries", "keys", "dim", "window", "kept_stride")
        ),
        *((name, ctypes.c_void_p) for name in ("kept", "kept_count", "visible")),
        *((name, ctypes.c_float) for name in ("scale", "epsilon")),
        *((name, ctypes.c_int32) for name in ("form", "threads")),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """Raises KernelError, StoreError: see `edgefm.models.native.load`."""
    return load(
        "attention/kernels.cpp", ("attention_forward", "attention_backward"), ("vectors.h", "attention/tiles.h")
    )


def fits(q: torch.Tensor) -> str | None:
    """Why the kernels cannot serve such queries; None where they can."""
    if q.device.type != "cpu":
        return f"the tensors are on {q.device.type}"
    if q.dtype == torch.float64:
        return "they compute in float32 and the tensors are float64"
    if q.shape[-1] % _WIDTH:
        return f"the head size {q.shape[-1]} is no multiple of {_WIDTH}"
    return None


class _Call:
    """The arguments of a call, and what must live as long as it."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, kept: torch.Tensor | None, visible: torch.Tensor | None
    ) -> None:
        self._batch, self._keys = q.shape[0], k.shape[2]
        if kept is None:
            self.positions, self.counts = (
                torch.zeros(self._batch, 1, dtype=torch.int32),
                torch.zeros(self._batch, dtype=torch.int32),
            )
        else:
            rows = kept.expand(self._batch, -1)
            self.counts = rows.sum(dim=1, dtype=torch.int32)
            self.positions = torch.zeros(self._batch, max(int(self.counts.max()), 1), dtype=torch.int32)
            for row, into in zip(rows, self.positions, strict=True):
                found = row.nonzero()[:, 0]
                into[: len(found)] = found
        self.visible = None if visible is None else visible.to(torch.uint8).contiguous()

    def shape(self, q: torch.Tensor, k: torch.Tensor, window: int, form: Form, scale: float) -> _Shape:
        batch, heads, queries, dim = q.shape
        return _Shape(
            *(batch, heads, k.shape[1], queries, k.shape[2], dim, window, self.positions.shape[1]),
            *(
                self.positions.data_ptr(),
                self.counts.data_ptr(),
                None if self.visible is None else self.visible.data_ptr(),
            ),
            *(scale, EPSILON, _FORMS[form], torch.get_num_threads()),
        )


class Attention(torch.autograd.Function):
    """`apply(q, k, v, kept, window, form, visible, scale)`, see `edgefm.models.attention.api.fused`. Extra memory is O(T D)."""

    @staticmethod
    def forward(ctx, q, k, v, kept, window, form, visible, scale):
        q32, k32, v32 = (x.detach().to(torch.float32).contiguous() for x in (q, k, v))
        call = _Call(q32, k32, kept, visible)
        shape = call.shape(q32, k32, window, form, scale)
        learns = any(x.requires_grad for x in (q, k, v))
        out = torch.empty_like(q32)
        stats = q32.new_empty(*q32.shape[:3], 5) if learns else None
        plain = torch.empty_like(q32) if learns and form == "sa_normalised" else None
        library().attention_forward(ctypes.byref(shape), *map(pointer, (q32, k32, v32, out, stats, plain)))
        if learns:
            ctx.save_for_backward(q32, k32, v32, out, stats, plain)
            ctx.call, ctx.rest, ctx.dtypes = call, (window, form, scale), (q.dtype, k.dtype, v.dtype)
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, stats, plain = ctx.saved_tensors
        shape = ctx.call.shape(q, k, *ctx.rest)
        grad = grad.to(torch.float32).contiguous()
        batch, heads, keys, dim = q.shape[0], q.shape[1], k.shape[2], q.shape[3]
        dq, dk, dv = torch.zeros_like(q), q.new_zeros(batch, heads, keys, dim), q.new_zeros(batch, heads, keys, dim)
        tensors = (q, k, v, out, stats, plain, grad, dq, dk, dv)
        library().attention_backward(ctypes.byref(shape), *map(pointer, tensors))
        dk, dv = (x.view(batch, k.shape[1], -1, keys, dim).sum(dim=2) for x in (dk, dv))
        found = (x.to(dtype) for x, dtype in zip((dq, dk, dv), ctx.dtypes, strict=True))
        return (*found, None, None, None, None, None)
