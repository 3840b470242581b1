# Triton's launchers take what the kernel takes, and a device function no types.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIncompatibleMethodOverride=false, reportIndexIssue=false
# ruff: noqa: N803
"""The kernels for GPUs, in Triton: what kernels.cpp does for the CPU, forward and backward.

A program takes a block of queries of one head over the kept keys, gathered once, and then over the window; the backward pass is
one kernel by blocks of queries for their gradients, and one by blocks of keys for those of keys and values. Scores of more than
a block never exist. float32 inside; products of half-precision inputs run on tensor cores.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .pattern import EPSILON, Form

_FORMS: dict[Form, int] = {"softmax": 0, "sa": 1, "sa_normalised": 2}
BLOCK_Q, BLOCK_K = 64, 64
SIZES = ["heads", "key_heads", "queries", "keys", "kept", "held", "window"]
"""Triton would compile a kernel again for every size that is 1 or a multiple of 16, seconds each; these change with the text."""


@triton.jit
def _block(K, V, rows, bound, D: tl.constexpr):
    """(BK, D) keys and values, 0 where out of bounds."""
    at = rows[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(K + at, mask=bound[:, None], other=0.0), tl.load(V + at, mask=bound[:, None], other=0.0)


@triton.jit
def _block_scores(
    q, k, there, here, bound, visible_ptr, keys, scale, KEPT: tl.constexpr, WINDOW, VISIBLE: tl.constexpr
):
    """(BQ, BK) scaled scores and which of them are seen: of kept keys those before a row's window, of others its window."""
    x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    start = here[:, None] - WINDOW + 1
    if KEPT:
        seen = there[None, :] < start
    else:
        seen = (there[None, :] <= here[:, None]) & (there[None, :] >= start)
    seen = seen & bound[None, :]
    if VISIBLE:
        shown = tl.load(visible_ptr + there, mask=bound & (there < keys), other=0)
        seen = seen & (shown[None, :] != 0)
    return x, seen


@triton.jit
def _accumulate(x, seen, v, there, top, total, summed, weighted, least, at_top, at_least, FORM: tl.constexpr):
    """Takes a block of scores into what a row has summed over the keys so far, relative to its greatest score."""
    shown = tl.where(seen, x, float("-inf"))
    block_top = tl.max(shown, axis=1)
    new_top = tl.maximum(top, block_top)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    factor = tl.where(top == float("-inf"), 0.0, tl.exp(top - base))
    p = tl.where(seen, tl.exp(shown - base[:, None]), 0.0)
    total = total * factor + tl.sum(p, axis=1)
    if FORM != 1:
        summed = summed * factor[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    if FORM != 0:
        xp = tl.where(seen, x * p, 0.0)
        weighted = weighted * factor[:, None] + tl.dot(xp.to(v.dtype), v, input_precision="ieee")
    if FORM == 2:
        low = tl.where(seen, x, float("inf"))
        block_least = tl.min(low, axis=1)
        first_top = tl.min(tl.where(shown == block_top[:, None], there[None, :], 2147483647), axis=1)
        first_low = tl.min(tl.where(low == block_least[:, None], there[None, :], 2147483647), axis=1)
        at_top = tl.where(block_top > top, first_top, at_top)
        at_least = tl.where(block_least < least, first_low, at_least)
        least = tl.minimum(least, block_least)
    return new_top, total, summed, weighted, least, at_top, at_least


@triton.jit(do_not_specialize=SIZES)
def _forward(
    Q, K, V, KEPT_K, KEPT_V, POSITION, COUNT, SEEN, OUT, STATS, AT, PLAIN,
    scale, epsilon, heads, key_heads, queries, keys, kept, window,
    FORM: tl.constexpr, VISIBLE: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    batch = head // heads
    key_head = batch * key_heads + (head % heads) // (heads // key_heads)
    rows = tl.program_id(0) * BQ + tl.arange(0, BQ)
    real = rows < queries
    here = keys - queries + rows
    columns = tl.arange(0, D)
    q = tl.load(Q + (head * queries + rows[:, None]) * D + columns[None, :], mask=real[:, None], other=0.0)
    top, total = tl.full((BQ,), float("-inf"), tl.float32), tl.zeros((BQ,), tl.float32)
    summed, weighted = tl.zeros((BQ, D), tl.float32), tl.zeros((BQ, D), tl.float32)
    least, at_top, at_least = (
        tl.full((BQ,), float("inf"), tl.float32),
        tl.zeros((BQ,), tl.int32),
        tl.zeros((BQ,), tl.int32),
    )
    count = tl.load(COUNT + batch)
    for start in range(0, count, BK):
        index = start + tl.arange(0, BK)
        bound = index < count
        there = tl.load(POSITION + batch * kept + index, mask=bound, other=2147483647)
        k, v = _block(KEPT_K, KEPT_V, key_head * kept + index, bound, D)
        x, seen = _block_scores(q, k, there, here, bound, SEEN + batch * keys, keys, scale, True, window, VISIBLE)
        top, total, summed, weighted, least, at_top, at_least = _accumulate(
            x, seen, v, there, top, total, summed, weighted, least, at_top, at_least, FORM
        )
    first = keys - queries + tl.program_id(0) * BQ
    begin = tl.maximum(first - window + 1, 0) // BK * BK
    for start in range(begin, tl.minimum(first + BQ, keys), BK):
        there = start + tl.arange(0, BK)
        bound = there < keys
        k, v = _block(K, V, key_head * keys + there, bound, D)
        x, seen = _block_scores(q, k, there, here, bound, SEEN + batch * keys, keys, scale, False, window, VISIBLE)
        top, total, summed, weighted, least, at_top, at_least = _accumulate(
            x, seen, v, there, top, total, summed, weighted, least, at_top, at_least, FORM
        )
    per_sum = tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)
    summed, weighted = summed * per_sum[:, None], weighted * per_sum[:, None]
    if FORM == 0:
        out = summed
    elif FORM == 1:
        out = weighted
    else:
        low, high = tl.minimum(least, 0.0), tl.maximum(top, 0.0)
        out = (weighted - low[:, None] * summed) / (high - low + epsilon)[:, None]
        out = tl.where((total > 0)[:, None], out, 0.0)
    row = head * queries + rows
    at = row[:, None] * D + columns[None, :]
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=real[:, None])
    tl.store(STATS + row * 3, top, mask=real)
    tl.store(STATS + row * 3 + 1, per_sum, mask=real)
    tl.store(STATS + row * 3 + 2, least, mask=real)
    if FORM == 2:
        tl.store(AT + row * 2, at_top, mask=real)
        tl.store(AT + row * 2 + 1, at_least, mask=real)
        tl.store(PLAIN + at, summed, mask=real[:, None])


@triton.jit
def _slopes(top, least, epsilon, FORM: tl.constexpr):
    """A key's weight is p (slope x + offset), the gradient of its score p (dy (slope x + gain) - delta)."""
    if FORM == 0:
        slope, offset, gain = top * 0, top * 0 + 1, top * 0 + 1
    elif FORM == 1:
        slope, offset, gain = top * 0 + 1, top * 0, top * 0 + 1
    else:
        low, high = tl.minimum(least, 0.0), tl.maximum(top, 0.0)
        spread = high - low + epsilon
        slope, offset, gain = 1 / spread, -low / spread, (1 - low) / spread
    return slope, offset, gain


@triton.jit
def _gradients(x, seen, dy, top, per_sum, least, delta, epsilon, FORM: tl.constexpr):
    """(BQ, BK) weights, and gradients of the scores but for what goes through a row's extremes."""
    slope, offset, gain = _slopes(top, least, epsilon, FORM)
    base = tl.where(top == float("-inf"), 0.0, top)
    p = tl.where(seen, tl.exp(tl.where(seen, x - base[:, None], 0.0)) * per_sum[:, None], 0.0)
    y = p * (slope[:, None] * x + offset[:, None])
    dx = p * (dy * (slope[:, None] * x + gain[:, None]) - delta[:, None])
    return tl.where(seen, y, 0.0), tl.where(seen, dx, 0.0)


@triton.jit(do_not_specialize=SIZES)
def _queries_backward(
    Q, K, V, KEPT_K, KEPT_V, POSITION, COUNT, SEEN, STATS, DELTA, GRAD, DQ,
    scale, epsilon, heads, key_heads, queries, keys, kept, window,
    FORM: tl.constexpr, VISIBLE: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    batch = head // heads
    key_head = batch * key_heads + (head % heads) // (heads // key_heads)
    rows = tl.program_id(0) * BQ + tl.arange(0, BQ)
    real = rows < queries
    here = keys - queries + rows
    columns = tl.arange(0, D)
    row = head * queries + rows
    at_row = row[:, None] * D + columns[None, :]
    q, grad = tl.load(Q + at_row, mask=real[:, None], other=0.0), tl.load(GRAD + at_row, mask=real[:, None], other=0.0)
    top, per_sum = tl.load(STATS + row * 3, mask=real, other=0.0), tl.load(STATS + row * 3 + 1, mask=real, other=0.0)
    least, delta = tl.load(STATS + row * 3 + 2, mask=real, other=0.0), tl.load(DELTA + row, mask=real, other=0.0)
    dq = tl.zeros((BQ, D), tl.float32)
    count = tl.load(COUNT + batch)
    for start in range(0, count, BK):
        index = start + tl.arange(0, BK)
        bound = index < count
        there = tl.load(POSITION + batch * kept + index, mask=bound, other=2147483647)
        k, v = _block(KEPT_K, KEPT_V, key_head * kept + index, bound, D)
        x, seen = _block_scores(q, k, there, here, bound, SEEN + batch * keys, keys, scale, True, window, VISIBLE)
        dy = tl.dot(grad, tl.trans(v), input_precision="ieee")
        _, dx = _gradients(x, seen, dy, top, per_sum, least, delta, epsilon, FORM)
        dq += tl.dot(dx.to(k.dtype), k, input_precision="ieee")
    first = keys - queries + tl.program_id(0) * BQ
    begin = tl.maximum(first - window + 1, 0) // BK * BK
    for start in range(begin, tl.minimum(first + BQ, keys), BK):
        there = start + tl.arange(0, BK)
        bound = there < keys
        k, v = _block(K, V, key_head * keys + there, bound, D)
        x, seen = _block_scores(q, k, there, here, bound, SEEN + batch * keys, keys, scale, False, window, VISIBLE)
        dy = tl.dot(grad, tl.trans(v), input_precision="ieee")
        _, dx = _gradients(x, seen, dy, top, per_sum, least, delta, epsilon, FORM)
        dq += tl.dot(dx.to(k.dtype), k, input_precision="ieee")
    tl.store(DQ + at_row, dq * scale, mask=real[:, None])


@triton.jit(do_not_specialize=SIZES)
def _keys_backward(
    Q, K, V, POSITION, COUNT, SEEN, STATS, DELTA, GRAD, DK, DV,
    scale, epsilon, heads, key_heads, queries, keys, held, window,
    KEPT: tl.constexpr, FORM: tl.constexpr, VISIBLE: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Of K and V (B, HK, held, D): all keys and their windows, or the kept keys (`KEPT`) and the queries behind them."""
    head = tl.program_id(1).to(tl.int64)
    batch = head // heads
    key_head = batch * key_heads + (head % heads) // (heads // key_heads)
    index = tl.program_id(0) * BK + tl.arange(0, BK)
    columns = tl.arange(0, D)
    if KEPT:
        bound = index < tl.load(COUNT + batch)
        there = tl.load(POSITION + batch * held + index, mask=bound, other=2147483647)
    else:
        bound = index < held
        there = index
    at_key = (key_head * held + index[:, None]) * D + columns[None, :]
    k, v = tl.load(K + at_key, mask=bound[:, None], other=0.0), tl.load(V + at_key, mask=bound[:, None], other=0.0)
    dk, dv = tl.zeros((BK, D), tl.float32), tl.zeros((BK, D), tl.float32)
    first, last = tl.min(there), tl.max(tl.where(bound, there, -1))
    begin = tl.maximum(tl.minimum(first, keys) - (keys - queries), 0)
    end = queries
    if KEPT:
        begin = tl.maximum(tl.minimum(first, keys) + window - (keys - queries), 0)
    else:
        end = tl.minimum(last + window - (keys - queries), queries)
    for start in range(begin // BQ * BQ, end, BQ):
        rows = start + tl.arange(0, BQ)
        real = rows < queries
        here = keys - queries + rows
        row = head * queries + rows
        at_row = row[:, None] * D + columns[None, :]
        q, grad = (
            tl.load(Q + at_row, mask=real[:, None], other=0.0),
            tl.load(GRAD + at_row, mask=real[:, None], other=0.0),
        )
        top, per_sum = (
            tl.load(STATS + row * 3, mask=real, other=0.0),
            tl.load(STATS + row * 3 + 1, mask=real, other=0.0),
        )
        least, delta = tl.load(STATS + row * 3 + 2, mask=real, other=0.0), tl.load(DELTA + row, mask=real, other=0.0)
        x, seen = _block_scores(q, k, there, here, bound, SEEN + batch * keys, keys, scale, KEPT, window, VISIBLE)
        seen = seen & real[:, None]
        dy = tl.dot(grad, tl.trans(v), input_precision="ieee")
        y, dx = _gradients(x, seen, dy, top, per_sum, least, delta, epsilon, FORM)
        dk += tl.dot(tl.trans(dx).to(q.dtype), q, input_precision="ieee")
        dv += tl.dot(tl.trans(y).to(grad.dtype), grad, input_precision="ieee")
    at = (head * held + index[:, None]) * D + columns[None, :]
    tl.store(DK + at, dk * scale, mask=bound[:, None])
    tl.store(DV + at, dv, mask=bound[:, None])


def fits(q: torch.Tensor) -> str | None:
    """Why the kernels cannot serve such queries; None where they can."""
    if q.dtype == torch.float64:
        return "they compute in float32 and the tensors are float64"
    dim = q.shape[-1]
    if dim < 16 or dim > 256 or dim & (dim - 1):
        return f"the head size {dim} is no power of two from 16 to 256"
    return None


class _Call:
    """The arguments that all kernels of a call share."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor | None, visible: torch.Tensor | None,
        window: int, form: Form, scale: float,
    ) -> None:  # fmt: skip
        batch, self.heads, self.queries, self.dim = q.shape
        self.key_heads, self.keys, device = k.shape[1], k.shape[2], q.device
        if kept is None:
            self.count, self.kept = torch.zeros(batch, dtype=torch.int32, device=device), 1
            self.position = torch.zeros(batch, 1, dtype=torch.int32, device=device)
        else:
            rows = kept.to(device).expand(batch, -1)
            self.count = rows.sum(dim=1, dtype=torch.int32)
            self.kept = max(int(self.count.max()), 1)
            # Kept positions first, in order: a stable sort of "not kept".
            self.position = (
                (~rows).to(torch.int8).sort(dim=1, stable=True).indices[:, : self.kept].to(torch.int32).contiguous()
            )
        at = self.position.long()[:, None, :, None].expand(-1, self.key_heads, -1, self.dim)
        self.q, self.k, self.v = q, k, v
        self.kept_k, self.kept_v = k.gather(2, at), v.gather(2, at)
        self.seen = (
            torch.ones(1, dtype=torch.uint8, device=device) if visible is None else visible.to(torch.uint8).contiguous()
        )
        self.sizes = (scale, EPSILON, self.heads, self.key_heads, self.queries, self.keys)
        self.window = window
        self.constants: dict[str, Any] = {
            **{"FORM": _FORMS[form], "VISIBLE": visible is not None, "D": self.dim, "BQ": BLOCK_Q, "BK": BLOCK_K}
        }
        self.grid = (triton.cdiv(self.queries, BLOCK_Q), batch * self.heads)

    @property
    def patterned(self) -> tuple[torch.Tensor, ...]:
        return (self.q, self.k, self.v, self.kept_k, self.kept_v, self.position, self.count, self.seen)


class Attention(torch.autograd.Function):
    """As that of the CPU."""

    @staticmethod
    def forward(ctx, q, k, v, kept, window, form, visible, scale):
        call = _Call(*(x.detach().contiguous() for x in (q, k, v)), kept, visible, window, form, scale)
        out, single = torch.empty_like(call.q), torch.float32
        plain = q.new_empty(q.shape if form == "sa_normalised" else (1,), dtype=single)
        stats, at = q.new_empty(*q.shape[:3], 3, dtype=single), q.new_zeros(*q.shape[:3], 2, dtype=torch.int32)
        with torch.cuda.device_of(q):  # else Triton starts it on the current GPU, whichever holds the tensors
            _forward[call.grid](
                *call.patterned, out, stats, at, plain, *call.sizes, call.kept, window, **call.constants
            )
        if any(x.requires_grad for x in (q, k, v)):
            ctx.call, ctx.form, ctx.scale = call, form, scale
            ctx.save_for_backward(out, stats, at, plain)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        call, (out, stats, at, plain) = ctx.call, ctx.saved_tensors
        grad = grad.contiguous()
        delta = (grad.float() * out.float()).sum(dim=-1)
        batch, rest = grad.shape[0], (stats, delta, grad)
        dq = delta.new_empty(grad.shape)
        _queries_backward[call.grid](*call.patterned, *rest, dq, *call.sizes, call.kept, call.window, **call.constants)
        parts = []
        for kept, k, v in ((False, call.k, call.v), (True, call.kept_k, call.kept_v)):
            held = k.shape[2]
            dk, dv = (delta.new_zeros(batch, call.heads, held, call.dim) for _ in range(2))
            grid = (triton.cdiv(held, BLOCK_K), batch * call.heads)
            _keys_backward[grid](
                call.q, k, v, call.position, call.count, call.seen, *rest, dk, dv,
                *call.sizes, held, call.window, KEPT=kept, **call.constants,
            )  # fmt: skip
            parts.append((dk, dv))
        (dk, dv), (kept_dk, kept_dv) = parts
        where = call.position.long()[:, None, :, None].expand_as(kept_dk)
        dk, dv = dk.scatter_add(2, where, kept_dk), dv.scatter_add(2, where, kept_dv)
        if ctx.form == "sa_normalised":
            dq, dk = _through_extremes(call, ctx.scale, stats, at, delta, (grad.float() * plain).sum(dim=-1), dq, dk)
        dk, dv = (x.view(batch, call.key_heads, -1, *x.shape[2:]).sum(dim=2) for x in (dk, dv))
        found = (x.to(call.q.dtype) for x in (dq, dk, dv))
        return (*found, None, None, None, None, None)


def _through_extremes(
    call: _Call, scale: float, stats: torch.Tensor, at: torch.Tensor, delta: torch.Tensor, plain_delta: torch.Tensor,
    dq: torch.Tensor, dk: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Adds what the normalised form's gradients owe to a row's least and greatest score: one key each."""
    top, some, least = stats[..., 0], stats[..., 1] > 0, stats[..., 2]
    low, high = least.clamp(max=0), top.clamp(min=0)
    spread = torch.where(some, high - low, 0) + EPSILON
    from_top = torch.where(some & (top > 0), -delta / spread, 0) * scale
    from_least = torch.where(some & (least < 0), (delta - plain_delta) / spread, 0) * scale
    keys = call.k.repeat_interleave(call.heads // call.key_heads, dim=1).float()
    for which, amount in ((0, from_top), (1, from_least)):
        where = at[..., which].long()[..., None].expand(-1, -1, -1, call.dim)
        dq = dq + amount[..., None] * keys.gather(2, where)
        dk = dk.scatter_add(2, where, amount[..., None] * call.q.float())
    return dq, dk
