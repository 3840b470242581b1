"""Attention as the papers write it: every score at once, any dtype. What the fused implementations are held against."""

from __future__ import annotations

import math

import torch

from .pattern import EPSILON, Form, Pattern


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    form: Form = "softmax",
    separators: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """See `edgefm.models.attention.attend`."""
    x = scores(q, k, scale)
    with x.device:  # a mask that is made elsewhere takes longer to copy than all the rest
        seen = pattern.mask(q.shape[2], k.shape[2], separators)[:, None]  # (B or 1, 1, TQ, TK)
    if visible is not None:
        seen = seen & visible[:, None, None, :]
    return weights(x, seen.expand(x.shape), form) @ repeated(v, q.shape[1])


def scores(q: torch.Tensor, k: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """(B, H, TQ, TK), scaled by 1/sqrt(D) unless told otherwise."""
    return (q @ repeated(k, q.shape[1]).mT) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)


def repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, HK, T, D) -> (B, heads, T, D): query heads in groups share a head of keys."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def weights(x: torch.Tensor, seen: torch.Tensor, form: Form) -> torch.Tensor:
    """(..., TK) weights of scores, 0 where not seen; a row that sees nothing has no weights at all.

    Equations of arXiv 2502.18277, section 3: `softmax` p; `sa` x p; `sa_normalised`
    (x - min(x_min, 0)) / (max(0, x_max) - min(x_min, 0) + epsilon) p, x_min and x_max over what the row sees, gradients through
    them.
    """
    some = seen.any(dim=-1, keepdim=True)
    p = torch.softmax(torch.where(seen, x, torch.where(some, -torch.inf, 0.0).to(x.dtype)), dim=-1)
    p = torch.where(seen, p, 0)
    if form == "softmax":
        return p
    x = torch.where(seen, x, 0)
    if form == "sa":
        return x * p
    low = torch.where(seen, x, torch.inf).amin(dim=-1, keepdim=True).clamp(max=0)
    high = torch.where(seen, x, -torch.inf).amax(dim=-1, keepdim=True).clamp(min=0)
    return (x - low) / (high - low + EPSILON) * p
