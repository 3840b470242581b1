"""Whole windows of text at once, without a cache: what scores a pattern of attention, and what trains a model for it."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from ..attention.api import attend
from ..attention.pattern import Pattern
from .decoder import Decoder


def window_logits(
    decoder: Decoder, tokens: torch.Tensor, pattern: Pattern, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """Of windows that each begin at position 0; every layer sees what the pattern lets it see. Differentiable.

    Args:
        tokens: (B, T), on any device.
        kept: (B, T) bool, on any device: what every later token sees under a pattern with a window: separators, for SepLLM.

    Returns:
        float32 (B, T, vocabulary), under autocast its dtype, of what follows each token; equal to `Decoder.prefill` under that
        pattern.

    Raises:
        InputError: a token that is not in the vocabulary, or windows beyond the model's context.
    """
    count, length = tokens.shape
    decoder.check_context(length)
    positions = torch.arange(length, device=decoder.device).repeat(count)
    kept = None if kept is None else kept.to(decoder.device)

    def split(x: torch.Tensor) -> torch.Tensor:
        """(heads, B T, D) -> (B, heads, T, D)"""
        return x.unflatten(1, (count, length)).transpose(0, 1)

    def attention(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Under autocast projections are halves, which rotation makes float32 again.
        q, k = (decoder.rotated(x, positions).to(v.dtype) for x in (q, k))
        return attend(split(q), split(k), split(v), pattern, decoder.form, kept).transpose(0, 1).flatten(1, 2)

    return decoder.through(tokens.flatten(), attention).unflatten(0, (count, length))


def window_losses(
    decoder: Decoder, tokens: torch.Tensor, pattern: Pattern, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """(B,) mean negative log-likelihood, in nats, of the tokens of each window but its first; see `window_logits`."""
    tokens = tokens.to(decoder.device)
    logits = window_logits(decoder, tokens, pattern, kept)[:, :-1]  # (B, T - 1, vocabulary)
    each = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return each.view(len(tokens), -1).mean(dim=1)
