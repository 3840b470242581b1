# Triton's launchers take what the kernel takes, and a device function no types.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIncompatibleMethodOverride=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# ruff: noqa: N803, N806
"""The fused kernels of DAPE and DAPE V2 for GPUs, in Triton, forward and backward.

A program takes a block of queries with all heads of a layer over tiles of keys. Scores are made by heads, (KH, G BQ, BK), G heads
to a head of keys; the network wants them by pairs of positions, (BQ BK, KH G), and is a product of matrices for each of its
layers there. Heads are padded to powers of two. A convolution sees two keys to either side of those that a tile scores, so tiles
overlap by a halo. The backward pass computes everything again; what many queries add to it adds up atomically, in no fixed order.

float32 inside; half-precision inputs are multiplied as such, others in TF32 thrice, which keeps float32's digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from . import gpu

if TYPE_CHECKING:
    from .dape import Dape

_LEAK = tl.constexpr(0.01)
_PRECISION = tl.constexpr("tf32x3")
COPIES = 32
"""Of the network's gradients, which all programs add to: fewer wait for each other than with one."""
WARPS = 4
_SHARED = 227 * 1024
"""Bytes of shared memory that a program may have on sm_90."""


@triton.jit
def _by_pair(x, KH: tl.constexpr, G: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr):
    """(KH, G BQ, BK) -> (BQ BK, KH G)"""
    return x.reshape(KH, G, BQ, BK).permute(2, 3, 0, 1).reshape(BQ * BK, KH * G)


@triton.jit
def _by_head(x, KH: tl.constexpr, G: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr):
    """(BQ BK, KH G) -> (KH, G BQ, BK)"""
    return x.reshape(BQ, BK, KH, G).permute(2, 3, 0, 1).reshape(KH, G * BQ, BK)


@triton.jit
def _moved(x, BY: tl.constexpr):
    """(N, C) by pairs: to each what the pair BY keys on has; wrong at a tile's first and last key, which it does not score."""
    at = tl.minimum(tl.maximum(tl.arange(0, x.shape[0]) + BY, 0), x.shape[0] - 1)
    return tl.gather(x, tl.broadcast_to(at[:, None], x.shape), axis=0)


@triton.jit
def _matrix(P, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.load(P + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _place(heads, key_heads, queries, keys, KH: tl.constexpr, G: tl.constexpr, BQ: tl.constexpr):
    """Of a program: the first query's position, and of (KH, G BQ) heads' queries the rows of memory and which of them exist."""
    batch = tl.program_id(1).to(tl.int64)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    group = heads // key_heads
    key_head, member, query = tl.arange(0, KH), tl.arange(0, G * BQ) // BQ, block * BQ + tl.arange(0, G * BQ) % BQ
    rows = (batch * heads + key_head[:, None] * group + member[None, :]) * queries + query[None, :]
    real = (key_head < key_heads)[:, None] & ((member < group) & (query < queries))[None, :]
    key_rows = (batch * key_heads + key_head) * keys
    return keys - queries + block * BQ, rows, real, key_rows, key_head < key_heads


@triton.jit
def _tile(
    q, K, BIAS, key_rows, real_keys, first, start, keys, scale,
    KH: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Keys from `start` on, where they lie and which exist, (KH, BK, D); by pairs, scores and biases, 0 where `cut` is false."""
    there = start + tl.arange(0, BK)
    bound = real_keys[:, None, None] & ((there >= 0) & (there < keys))[None, :, None]
    at = (key_rows[:, None, None] + there[None, :, None]) * D + tl.arange(0, D)[None, None, :]
    k = tl.load(K + at, mask=bound, other=0.0)
    x = tl.dot(q, tl.permute(k, 0, 2, 1), input_precision=_PRECISION) * scale
    pair = tl.arange(0, BQ * BK)
    there_of_pair = start + pair % BK
    far = first + pair // BK - there_of_pair
    cut = ((far >= 0) & (there_of_pair >= 0))[:, None]
    x = tl.where(cut, _by_pair(x, KH, G, BQ, BK), 0.0)
    bias = tl.load(BIAS + far[:, None] * KH * G + tl.arange(0, KH * G)[None, :], mask=cut, other=0.0)
    return k, at, bound, x, bias, cut, far, (there_of_pair >= 0)[:, None]


@triton.jit
def _seen(first, start, BQ: tl.constexpr, BK: tl.constexpr, G: tl.constexpr, HALO: tl.constexpr):
    """(1, G BQ, BK): pairs that a tile scores."""
    here, column = first + tl.arange(0, G * BQ) % BQ, tl.arange(0, BK)
    scored = (column >= HALO) & (column < BK - HALO)
    return (scored[None, :] & (start + column[None, :] <= here[:, None]))[None, :, :]


@triton.jit
def _hidden(x, bias, is_key, W1, UNITS, TAPS: tl.constexpr, H: tl.constexpr, C: tl.constexpr):
    """(N, C) hidden units of scores and biases (N, H); of no key 0, as the second convolution is padded."""
    units = tl.zeros((x.shape[0], C), tl.float32) + tl.load(UNITS + tl.arange(0, C))[None, :]
    for tap in tl.static_range(TAPS):
        part = tl.dot(x, _matrix(W1 + tap * 2 * H * C, H, C), input_precision=_PRECISION)
        part = tl.dot(bias, _matrix(W1 + (tap * 2 + 1) * H * C, H, C), part, input_precision=_PRECISION)
        units += part if tap == TAPS // 2 else _moved(part, tap - TAPS // 2)
    return tl.where(is_key, tl.where(units > 0, units, units * _LEAK), 0.0)


@triton.jit
def _added(hidden, W2, TAPS: tl.constexpr, H: tl.constexpr, C: tl.constexpr):
    """(N, H) that the network adds to the scores."""
    out = tl.zeros((hidden.shape[0], H), tl.float32)
    for tap in tl.static_range(TAPS):
        part = tl.dot(hidden, _matrix(W2 + tap * C * H, C, H), input_precision=_PRECISION)
        out += part if tap == TAPS // 2 else _moved(part, tap - TAPS // 2)
    return out


@triton.jit(do_not_specialize=gpu.SIZES)
def _forward(
    Q, K, V, BIAS, W1, UNITS, W2, OUT, LOG_SUMS, scale, heads, key_heads, queries, keys,
    TAPS: tl.constexpr, KH: tl.constexpr, G: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    HALO: tl.constexpr = 2 * (TAPS // 2)
    first, rows, real, key_rows, real_keys = _place(heads, key_heads, queries, keys, KH, G, BQ)
    at_row = rows[:, :, None] * D + tl.arange(0, D)[None, None, :]
    q = tl.load(Q + at_row, mask=real[:, :, None], other=0.0)
    top, total = tl.full((KH, G * BQ), float("-inf"), tl.float32), tl.zeros((KH, G * BQ), tl.float32)
    summed = tl.zeros((KH, G * BQ, D), tl.float32)
    for start in range(-HALO, tl.minimum(first + BQ, keys) - HALO, BK - 2 * HALO):
        _, at, bound, x, bias, _, _, is_key = _tile(
            q, K, BIAS, key_rows, real_keys, first, start, keys, scale, KH, G, D, BQ, BK
        )
        y = x + bias
        if TAPS > 0:
            hidden = _hidden(x.to(q.dtype), bias.to(q.dtype), is_key, W1, UNITS, TAPS, KH * G, C)
            y += _added(hidden.to(q.dtype), W2, TAPS, KH * G, C)
        y = tl.where(_seen(first, start, BQ, BK, G, HALO), _by_head(y, KH, G, BQ, BK), float("-inf"))
        new_top = tl.maximum(top, tl.max(y, axis=2))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights, factor = tl.exp(y - base[:, :, None]), tl.exp(top - base)
        total = total * factor + tl.sum(weights, axis=2)
        v = tl.load(V + at, mask=bound, other=0.0)
        summed = tl.dot(weights.to(v.dtype), v, summed * factor[:, :, None], input_precision=_PRECISION)
        top = new_top
    tl.store(OUT + at_row, (summed / total[:, :, None]).to(OUT.dtype.element_ty), mask=real[:, :, None])
    tl.store(LOG_SUMS + rows, top + tl.log(total), mask=real)


@triton.jit
def _add(INTO, found):
    """Adds (ROWS, COLUMNS) to what all programs find."""
    at = tl.arange(0, found.shape[0])[:, None] * found.shape[1] + tl.arange(0, found.shape[1])[None, :]
    tl.atomic_add(INTO + at, found, sem="relaxed")


@triton.jit(do_not_specialize=gpu.SIZES)
def _backward(
    Q, K, V, BIAS, A, W1, UNITS, W2, LOG_SUMS, DELTA, GRAD, DQ, DK, DV, DP, DA, DW1, DUNITS, DW2,
    scale, heads, key_heads, queries, keys,
    KERPLE: tl.constexpr, COPIES: tl.constexpr, TAPS: tl.constexpr, KH: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    HALO: tl.constexpr = 2 * (TAPS // 2)
    H: tl.constexpr = KH * G
    first, rows, real, key_rows, real_keys = _place(heads, key_heads, queries, keys, KH, G, BQ)
    at_row = rows[:, :, None] * D + tl.arange(0, D)[None, None, :]
    q, grad = (
        tl.load(Q + at_row, mask=real[:, :, None], other=0.0),
        tl.load(GRAD + at_row, mask=real[:, :, None], other=0.0),
    )
    log_sums, delta = tl.load(LOG_SUMS + rows, mask=real, other=0.0), tl.load(DELTA + rows, mask=real, other=0.0)
    dq = tl.zeros((KH, G * BQ, D), tl.float32)
    dp, da, dunits = tl.zeros((H,), tl.float32), tl.zeros((H,), tl.float32), tl.zeros((C,), tl.float32)
    copy = tl.program_id(0) % COPIES
    for start in range(-HALO, tl.minimum(first + BQ, keys) - HALO, BK - 2 * HALO):
        k, at, bound, x, bias, cut, far, is_key = _tile(
            q, K, BIAS, key_rows, real_keys, first, start, keys, scale, KH, G, D, BQ, BK
        )
        y = x + bias
        if TAPS > 0:
            sees, sees_bias = x.to(q.dtype), bias.to(q.dtype)
            hidden = _hidden(sees, sees_bias, is_key, W1, UNITS, TAPS, H, C)
            y += _added(hidden.to(q.dtype), W2, TAPS, H, C)
        seen = _seen(first, start, BQ, BK, G, HALO) & real[:, :, None]
        weights = tl.where(seen, tl.exp(_by_head(y, KH, G, BQ, BK) - log_sums[:, :, None]), 0.0)
        v = tl.load(V + at, mask=bound, other=0.0)
        dv = tl.dot(tl.permute(weights.to(grad.dtype), 0, 2, 1), grad, input_precision=_PRECISION)
        tl.atomic_add(DV + at, dv, mask=bound, sem="relaxed")
        dy = weights * (tl.dot(grad, tl.permute(v, 0, 2, 1), input_precision=_PRECISION) - delta[:, :, None])
        dx = _by_pair(dy, KH, G, BQ, BK)
        dbias = dx
        if TAPS > 0:
            dy, dhidden = dx, tl.zeros((BQ * BK, C), tl.float32)
            for tap in tl.static_range(TAPS):
                part = (dy if tap == TAPS // 2 else _moved(dy, TAPS // 2 - tap)).to(q.dtype)
                weight = _matrix(W2 + tap * C * H, C, H)
                dhidden = tl.dot(part, tl.trans(weight), dhidden, input_precision=_PRECISION)
                found = tl.dot(tl.trans(hidden.to(q.dtype)), part, input_precision=_PRECISION)
                _add(DW2 + (copy * TAPS + tap) * C * H, found)
            dhidden = tl.where(is_key, tl.where(hidden > 0, dhidden, dhidden * _LEAK), 0.0)
            dunits += tl.sum(dhidden, axis=0)
            for tap in tl.static_range(TAPS):
                part = (dhidden if tap == TAPS // 2 else _moved(dhidden, TAPS // 2 - tap)).to(q.dtype)
                of_scores, of_bias = tap * 2 * H * C, (tap * 2 + 1) * H * C
                dx = tl.dot(part, tl.trans(_matrix(W1 + of_scores, H, C)), dx, input_precision=_PRECISION)
                dbias = tl.dot(part, tl.trans(_matrix(W1 + of_bias, H, C)), dbias, input_precision=_PRECISION)
                into = DW1 + copy * TAPS * 2 * H * C
                _add(into + of_scores, tl.dot(tl.trans(sees), part, input_precision=_PRECISION))
                _add(into + of_bias, tl.dot(tl.trans(sees_bias), part, input_precision=_PRECISION))
        if KERPLE:
            dbias = tl.where(cut, dbias, 0.0)
            a, distance = tl.load(A + tl.arange(0, H))[None, :], tl.maximum(far, 0).to(tl.float32)[:, None]
            dp += tl.sum(dbias * bias, axis=0)
            da += tl.sum(dbias * (distance / (1 + a * distance)), axis=0)
        dx = (_by_head(tl.where(cut, dx, 0.0), KH, G, BQ, BK) * scale).to(q.dtype)
        dq = tl.dot(dx, k, dq, input_precision=_PRECISION)
        dk = tl.dot(tl.permute(dx, 0, 2, 1), q, input_precision=_PRECISION)
        tl.atomic_add(DK + at, dk, mask=bound, sem="relaxed")
    tl.store(DQ + at_row, dq.to(DQ.dtype.element_ty), mask=real[:, :, None])
    if KERPLE:
        tl.atomic_add(DP + copy * H + tl.arange(0, H), dp, sem="relaxed")
        tl.atomic_add(DA + copy * H + tl.arange(0, H), da, sem="relaxed")
    if TAPS > 0:
        tl.atomic_add(DUNITS + copy * C + tl.arange(0, C), dunits, sem="relaxed")


@dataclass(frozen=True)
class Tile:
    """Heads of keys and of each one's queries, padded; queries and keys at once. All powers of two."""

    key_heads: int
    group: int
    queries: int
    keys: int

    @property
    def constants(self) -> dict[str, int]:
        return {"KH": self.key_heads, "G": self.group, "BQ": self.queries, "BK": self.keys}


def tile(q: torch.Tensor, key_heads: int) -> Tile:
    """Tensor cores take 16 numbers at once; 4,096 scores of halves, 2,048 of float32, leave a program its registers."""
    scores = 4096 if q.element_size() == 2 else 2048
    padded = triton.next_power_of_2(key_heads)
    group = max(triton.next_power_of_2(q.shape[1] // key_heads), 16 // padded)
    queries = max(scores // 32 // (padded * group), 16 // group, 1)
    return Tile(padded, group, queries, min(32, scores // (padded * group * queries)))


def fits(q: torch.Tensor, key_heads: int) -> str | None:
    """Why the kernels cannot serve such queries; None where they can."""
    if why := gpu.fits(q):
        return why
    if not hasattr(tl, "gather"):
        return f"Triton {triton.__version__} is too old; 3.2 is the first with what they need"
    if torch.is_grad_enabled() and torch.are_deterministic_algorithms_enabled():
        return "gradients add up in no fixed order, and deterministic algorithms are asked for"
    chosen = tile(q, key_heads)
    asked = f"{q.shape[1]} heads of {q.shape[-1]} in {q.dtype}, {key_heads} of keys,"
    if chosen.key_heads * chosen.group > 32 or chosen.keys < 16:
        return f"{asked} are too many for a program"
    if shared_memory(q, chosen) > _room(q.device):
        return f"{asked} want more shared memory than there is"
    return None


def shared_memory(q: torch.Tensor, chosen: Tile) -> int:
    """Bytes of shared memory that a program takes, from above: fitted to what Triton 3.8 makes of the backward pass for sm_90."""
    rows = chosen.key_heads * chosen.group * chosen.queries * q.shape[-1]
    if q.element_size() == 2:
        return 66 * 1024 + 4 * rows + 2 * chosen.key_heads * chosen.keys * q.shape[-1]
    return 72 * 1024 + 32 * rows


def _room(device: torch.device) -> int:
    if device.type != "cuda":  # under Triton's interpreter
        return _SHARED
    # PyTorch tells of it from 2.7 on; every GPU has 48 KiB.
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 48 * 1024)


def tables(dape: Dape, chosen: Tile, key_heads: int, keys: int) -> tuple[torch.Tensor, ...]:
    """A layer's bias and network, heads in their padded places.

    Returns:
        `bias` (distances, H), which has no gradient; `p` and `a` (H,), of which a learned bias is made; `w1` (taps, 2, H, C) of
        scores and of biases, `units` (C,), `w2` (taps, C, H), `constant` (heads,). Without a network there are no taps.
    """
    group, padded = dape.heads // key_heads, chosen.key_heads * chosen.group
    p, a = dape.bias.rates()
    head = torch.arange(dape.heads, device=p.device)
    places = head // group * chosen.group + head % group

    def spread(x: torch.Tensor) -> torch.Tensor:
        """(..., heads) -> (..., H)"""
        return x.new_zeros(*x.shape[:-1], padded).index_copy(-1, places, x)

    with torch.no_grad():  # its gradients go to p and a
        bias = spread(dape.bias.at(torch.arange(keys + chosen.queries, device=p.device)).T.float())
    p, a = spread(p.float()), spread(a.float())
    if dape.network is None:
        return bias, p, a, bias.new_zeros(0, 2, padded, 1), bias.new_zeros(1), bias.new_zeros(0, 1, padded), p
    first, units, last, constant = dape.network.parameters()
    w1 = spread(first[:, :, 0].unflatten(1, (2, dape.heads)).permute(3, 1, 0, 2)).transpose(2, 3)
    return bias, p, a, w1, units.float(), spread(last[:, :, 0].permute(2, 1, 0)), constant


class Attention(torch.autograd.Function):
    """`apply(q, k, v, chosen, *tables)`: q, k, v of `edgefm.models.attention.attend`.

    Extra memory is O(T): of each row the sum of its exponentials, in the backward pass gradients in float32.
    """

    @staticmethod
    def forward(ctx, q, k, v, chosen, bias, p, a, w1, units, w2, constant):
        ctx.chosen, ctx.dtypes = chosen, [x.dtype for x in (q, k, v, p, a, w1, units, w2)]
        q, k, v, w1, w2 = (x.detach().to(q.dtype).contiguous() for x in (q, k, v, w1, w2))
        out, log_sums = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        bias, units = bias.contiguous(), units.detach().contiguous()
        grid, sizes, constants = _launch(q, k, w1, chosen)
        with torch.cuda.device_of(q):  # else Triton starts it on the current GPU, whichever holds the tensors
            _forward[grid](q, k, v, bias, w1, units, w2, out, log_sums, *sizes, **constants)
        ctx.save_for_backward(q, k, v, bias, p, a, w1, units, w2, constant, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, bias, p, a, w1, units, w2, constant, out, log_sums = ctx.saved_tensors
        grad = grad.to(q.dtype).contiguous()
        delta = (grad.float() * out.float()).sum(dim=-1)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        dp, da, dw1, dunits, dw2 = (p.new_zeros(COPIES, *x.shape) for x in (p, a, w1, units, w2))
        grid, sizes, constants = _launch(q, k, w1, ctx.chosen)
        _backward[grid](
            *(q, k, v, bias, a, w1, units, w2, log_sums, delta, grad, dq, dk, dv, dp, da, dw1, dunits, dw2, *sizes),
            KERPLE=any(ctx.needs_input_grad[5:7]),
            COPIES=COPIES,
            **constants,
        )
        dp, da, dw1, dunits, dw2 = (x.sum(dim=0) for x in (dp, da, dw1, dunits, dw2))
        # The bias is -p log(1 + a distance), so that d bias / dp = bias / p; a padded head has no p.
        found = (dq, dk, dv, dp / p.where(p > 0, 1), -p * da, dw1, dunits, dw2)
        dq, dk, dv, *rest = (x.to(dtype) for x, dtype in zip(found, ctx.dtypes, strict=True))
        # The constant adds the same to all scores of a row.
        return dq, dk, dv, None, None, *rest, torch.zeros_like(constant)


def _launch(q: torch.Tensor, k: torch.Tensor, w1: torch.Tensor, chosen: Tile) -> tuple[Any, ...]:
    """Grid, sizes and constants that both kernels take."""
    batch, heads, queries, dim = q.shape
    grid = (triton.cdiv(queries, chosen.queries), batch)
    constants = {"TAPS": len(w1), **chosen.constants, "C": w1.shape[-1], "D": dim, "num_warps": WARPS, "num_stages": 1}
    return grid, (dim**-0.5, heads, k.shape[1], queries, k.shape[2]), constants
