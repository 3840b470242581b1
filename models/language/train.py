"""Post-training: all weights of a decoder learn to predict text under a pattern of attention.

As SepLLM's (arXiv 2412.12094, section 4.3): a model that was trained with full attention goes on under the mask that it is to
serve with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..attention.pattern import Pattern
from ..errors import ConfigError
from .decoder import Decoder
from .windows import window_losses


@dataclass(frozen=True)
class Training:
    """AdamW (betas 0.9 and 0.95, no weight decay), the gradient's norm cut at 1.

    Attributes:
        learning_rate: at its highest: it rises over the first tenth of the steps and falls in a line to nothing.
        batch: windows a step.
    """

    learning_rate: float = 1e-4
    batch: int = 2

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.batch < 1:
            raise ConfigError(
                f"training needs learning_rate > 0 and batch >= 1, got {self.learning_rate} and {self.batch}"
            )


def post_train(
    decoder: Decoder, windows: torch.Tensor, pattern: Pattern, kept: torch.Tensor | None, training: Training
) -> Iterator[float]:
    """Trains a float32 decoder in place, one step for each value: the batch's loss, in nats a token, before that step.

    On a GPU a batch is computed at once, products and attention in bfloat16; on a CPU window by window, all in float32.

    Args:
        windows: (W, T) tokens; each is seen once, in order.
        kept: (W, T) bool, see `window_losses`.

    Raises:
        ConfigError: the decoder is quantised.
    """
    on_cpu = decoder.device.type == "cpu"
    at_once = 1 if on_cpu else training.batch  # of a CPU's memory, the activations of a window are enough
    weights = list(decoder.parameters())
    for weight in weights:
        weight.requires_grad_(True)
    steps = -(-len(windows) // training.batch)
    warm = max(steps // 10, 1)
    optimizer = torch.optim.AdamW(weights, training.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(steps - warm, 1))
    )
    try:
        for begin in range(0, len(windows), training.batch):
            end, total = min(begin + training.batch, len(windows)), 0.0
            for row in range(begin, end, at_once):
                some = slice(row, min(row + at_once, end))
                with torch.autocast(decoder.device.type, torch.bfloat16, enabled=not on_cpu):
                    losses = window_losses(decoder, windows[some], pattern, None if kept is None else kept[some])
                loss = losses.sum() / (end - begin)
                loss.backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            yield total
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
