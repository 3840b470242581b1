"""Whole windows are what prefill computes, and weights learn through every pattern."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from edgefm.models.attention.pattern import Pattern
from edgefm.models.errors import ConfigError, InputError
from edgefm.models.language.decoder import Decoder
from edgefm.models.language.train import Training, post_train
from edgefm.models.language.weights import open_checkpoint
from edgefm.models.language.windows import window_logits, window_losses

SEPARATORS = torch.arange(160) % 5 == 0
SEPLLM = Pattern(2, 12)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """(3, 60)"""
    return torch.randint(0, 160, (3, 60), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pattern", [Pattern(), SEPLLM], ids=str)
def test_windows_are_what_prefill_computes(folder: Path, windows: torch.Tensor, pattern: Pattern):
    decoder = Decoder(open_checkpoint(folder), pattern=pattern, separators=SEPARATORS)
    found = window_logits(decoder, windows, pattern, SEPARATORS[windows])
    for row, window in zip(found, windows, strict=True):
        torch.testing.assert_close(row, decoder.prefill(decoder.begin(), window, every=True), atol=1e-4, rtol=1e-4)
    logp = torch.log_softmax(found[:, :-1], dim=-1)
    expected = -logp.gather(2, windows[:, 1:, None])[..., 0].mean(dim=1)
    torch.testing.assert_close(window_losses(decoder, windows, pattern, SEPARATORS[windows]), expected)


def test_gradients_are_those_of_transformers(theirs, folder: Path, windows: torch.Tensor):
    decoder = Decoder(open_checkpoint(folder))
    weights = [weight.requires_grad_(True) for weight in decoder.parameters()]
    window_losses(decoder, windows, Pattern()).mean().backward()
    theirs.zero_grad()
    theirs(windows, labels=windows).loss.backward()
    expected = {name: weight.grad for name, weight in theirs.named_parameters()}
    torch.testing.assert_close(weights[0].grad, expected["model.embed_tokens.weight"], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(weights[-1].grad, expected["model.norm.weight"], atol=1e-5, rtol=1e-3)
    assert sum(weight.numel() for weight in weights) == sum(weight.numel() for weight in theirs.parameters())


def test_gradients_through_sepllm_s_pattern_are_differences(folder: Path, windows: torch.Tensor):
    decoder = Decoder(open_checkpoint(folder))
    kept, weights = SEPARATORS[windows], list(decoder.parameters())
    for weight in weights:
        weight.requires_grad_(True)
    loss = window_losses(decoder, windows, SEPLLM, kept).mean()
    loss.backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in weights)
    step = 1e-2
    with torch.no_grad():
        slopes = [float((weight.grad**2).sum()) for weight in weights]
        size = sum(slopes) ** 0.5
        losses = []
        for sign in (1, -1):
            for weight in weights:
                weight += sign * step * weight.grad / size
            losses.append(float(window_losses(decoder, windows, SEPLLM, kept).mean()))
            for weight in weights:
                weight -= sign * step * weight.grad / size
    assert abs((losses[0] - losses[1]) / (2 * step) / size - 1) < 0.05


def test_the_loss_falls_and_the_decoder_has_learnt(folder: Path, windows: torch.Tensor):
    decoder = Decoder(open_checkpoint(folder))
    losses = list(
        post_train(decoder, windows.repeat(20, 1), SEPLLM, SEPARATORS[windows].repeat(20, 1), Training(1e-2, 3))
    )
    assert len(losses) == 20 and losses[-1] < losses[0] - 1
    after = float(window_losses(decoder, windows, SEPLLM, SEPARATORS[windows]).mean())
    assert after < losses[0] - 1
    assert not any(weight.requires_grad or weight.grad is not None for weight in decoder.parameters())
    decoder.prefill(decoder.begin(), windows[0])


def test_what_cannot_be_trained_is_refused(folder: Path, windows: torch.Tensor):
    with pytest.raises(InputError, match="257 tokens and the model's context has 256"):
        window_logits(Decoder(open_checkpoint(folder)), torch.zeros(1, 257, dtype=torch.long), SEPLLM)
    with pytest.raises(ConfigError, match="quantised weights cannot be trained"):
        next(post_train(Decoder(open_checkpoint(folder), "quantised"), windows, SEPLLM, None, Training()))
    with pytest.raises(ConfigError, match="learning_rate > 0"):
        Training(0.0)
