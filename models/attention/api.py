"""Which implementation serves a call. Chosen by device, shape and dtype, and told once for each choice."""

from __future__ import annotations

import functools
import importlib
import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..errors import ConfigError
from ..native import missing
from . import cpu, reference
from .pattern import Form, Pattern

_LOG = logging.getLogger(__name__)
_ALL = Pattern()
_EVERYTHING = 2**30
"""A window that no sequence outgrows."""


@dataclass(frozen=True)
class Choice:
    """`name`: `sdpa`, `row` (one query, and no more than a row of scores), `c++`, `triton`, `blocks` (DAPE's, of queries) or
    `reference`; `why` in words."""

    name: str
    why: str


ROW = Choice("row", "one query has one row of scores: nothing is saved by blocks")


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern = _ALL,
    form: Form = "softmax",
    separators: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of the newest queries of a sequence over its keys; differentiable.

    Args:
        q: (B, H, TQ, D); the last query stands at the last key.
        k, v: (B, HK, TK, D); H is a multiple of HK, TK >= TQ.
        separators: (B, TK) bool, keys that every later query sees under a pattern with a window; on any device.
        visible: (B, TK) bool, False hides a key from everybody (padding); on any device.
        scale: of the scores; 1/sqrt(D) unless given.

    Returns:
        (B, H, TQ, D), of the queries' dtype; 0 for a query that sees nothing.

    Raises:
        ConfigError: shapes that do not fit each other.
    """
    check(q, k, v)
    for name, given in (("separators", separators), ("visible", visible)):
        if given is not None and (given.shape != (k.shape[0], k.shape[2]) or given.dtype != torch.bool):
            raise ConfigError(f"{name} must be bool (B, TK), got {given.dtype} {_told(given)} for keys {_told(k)}")
    separators, visible = (None if mask is None else mask.to(q.device) for mask in (separators, visible))
    choice = choose(q, pattern, form, k.shape[2], separators, visible)
    tell(choice, form, q.device.type)
    if choice.name == "sdpa":
        return scaled_dot_product_attention(
            q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if choice.name == "row":
        return _row(q, k, v, pattern, form, separators, visible, scale)
    if choice.name in ("c++", "triton"):
        return fused(choice.name, q, k, v, pattern, form, separators, visible, scale)
    return reference.attend(q, k, v, pattern, form, separators, visible, scale)


def fused(
    name: Literal["c++", "triton"],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    form: Form,
    separators: torch.Tensor | None,
    visible: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """`attend` by a kernel of that name, which must serve such tensors; float32 inside."""
    if name == "c++":
        kernels = cpu
    else:
        from . import gpu as kernels  # Triton comes with PyTorch's builds for GPUs alone
    kept = pattern.kept(k.shape[2], separators)
    window = _EVERYTHING if pattern.neighbours is None else pattern.neighbours
    return kernels.Attention.apply(q, k, v, kept, window, form, visible, scale)  # pyright: ignore[reportReturnType]


def _row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    form: Form,
    separators: torch.Tensor | None,
    visible: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Of one query: the heads of a group are rows of queries of their head of keys, and no key is repeated."""
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # (B, HK, H / HK, D)
    if form == "softmax" and visible is None and _sees_all(pattern, k.shape[2]):
        return scaled_dot_product_attention(rows, k, v, scale=scale).reshape(q.shape)
    with q.device:
        seen = pattern.mask(1, k.shape[2], separators)[:, None]  # (B or 1, 1, 1, TK)
    if visible is not None:
        seen = seen & visible[:, None, None, :]
    wide = torch.promote_types(q.dtype, torch.float32)  # half precision has neither the range nor the digits
    x = rows.to(wide) @ k.to(wide).mT * scale
    found = reference.weights(x, seen.expand(x.shape), form) @ v.to(wide)
    return found.to(q.dtype).reshape(q.shape)


def _sees_all(pattern: Pattern, keys: int) -> bool:
    return pattern.neighbours is None or pattern.neighbours >= keys


def choose(
    q: torch.Tensor,
    pattern: Pattern,
    form: Form,
    keys: int,
    separators: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
) -> Choice:
    """What `attend` would run."""
    queries = q.shape[2]
    if queries == 1:
        return ROW
    if form == "softmax" and _sees_all(pattern, keys) and visible is None and queries == keys:
        return Choice("sdpa", "PyTorch's kernel does causal softmax")
    if q.device.type == "cpu":
        why = cpu.fits(q) or missing(cpu.library)
        return Choice("reference", why) if why else Choice("c++", "fused, in float32")
    if q.device.type == "cuda":
        why = triton_unfit("gpu", q)
        return Choice("reference", why) if why else Choice("triton", "fused")
    return Choice("reference", f"no fused kernel for {q.device.type}")


def triton_unfit(module: Literal["gpu", "dape_gpu"], *call: Any) -> str | None:
    """Why the Triton kernels of a module cannot serve what its `fits` takes; None where they can."""
    try:  # Triton comes with PyTorch's builds for GPUs alone
        kernels = importlib.import_module(f".{module}", __package__)
    except ImportError as error:
        return f"Triton cannot be loaded: {error}"
    return kernels.fits(*call)


@functools.cache
def tell(choice: Choice, form: str, device: str) -> None:
    """Logs which implementation runs: once for each choice, as a warning where it is not fused."""
    slow = choice.name in ("reference", "blocks")
    _LOG.log(
        logging.WARNING if slow else logging.INFO,
        "event=attention implementation=%s form=%s device=%s why=%r",
        *(choice.name, form, device, choice.why),
    )


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raises ConfigError: shapes that do not fit each other; see `attend`."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ConfigError(
            f"attention wants q (B, H, TQ, D), k and v (B, HK, TK, D); got {_told(q)}, {_told(k)}, {_told(v)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1] or q.shape[2] > k.shape[2]:
        raise ConfigError(
            f"queries {_told(q)} do not fit keys {_told(k)}: the same batch and head size, heads a multiple of the keys', and no "
            "more queries than keys"
        )
    if not q.device == k.device == v.device:
        raise ConfigError(f"q, k and v lie on different devices: {q.device}, {k.device}, {v.device}")


def _told(x: torch.Tensor) -> str:
    return str(tuple(x.shape))
