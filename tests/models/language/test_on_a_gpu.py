"""The decoder on a GPU, where there is one: what the CPU computes, and training in halves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from edgefm.models.attention.cache import StreamingBudget
from edgefm.models.attention.pattern import Pattern
from edgefm.models.errors import ConfigError
from edgefm.models.language.decoder import Decoder
from edgefm.models.language.generate import Sampling, generate_batch
from edgefm.models.language.streaming import StreamingDecoder
from edgefm.models.language.train import Training, post_train
from edgefm.models.language.weights import open_checkpoint
from edgefm.models.language.windows import window_losses

SEPARATORS = torch.arange(160) % 5 == 0
SEPLLM = Pattern(2, 12)
TOKENS = torch.randint(0, 160, (3, 60), generator=torch.Generator().manual_seed(0))

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_quantised_weights_are_for_cpus(folder: Path):
    with pytest.raises(ConfigError, match="quantised weights are for CPUs; on meta use"):
        Decoder(open_checkpoint(folder), "quantised", device="meta")


@needs_gpu
@pytest.mark.parametrize("pattern", [Pattern(), SEPLLM], ids=str)
def test_logits_and_answers_are_the_cpu_s(folder: Path, pattern: Pattern):
    there, here = (
        Decoder(open_checkpoint(folder), pattern=pattern, separators=SEPARATORS, device=device)
        for device in ("cuda", "cpu")
    )
    for tokens in TOKENS:
        found = there.prefill(there.begin(), tokens, every=True)
        assert found.device.type == "cuda"
        torch.testing.assert_close(found.cpu(), here.prefill(here.begin(), tokens, every=True), atol=1e-3, rtol=1e-3)
    prompts, most = [tokens[: 20 + 7 * i].tolist() for i, tokens in enumerate(TOKENS)], [Sampling(30)] * 3
    assert generate_batch(there, prompts, frozenset(), most) == generate_batch(here, prompts, frozenset(), most)
    kept = SEPARATORS[TOKENS]
    torch.testing.assert_close(
        window_losses(there, TOKENS, pattern, kept).cpu(),
        window_losses(here, TOKENS, pattern, kept),
        atol=1e-4,
        rtol=1e-4,
    )


@needs_gpu
def test_a_stream_is_the_cpu_s(folder: Path):
    budget = StreamingBudget(2, 6, 12, 32)
    there, here = (
        StreamingDecoder(Decoder(open_checkpoint(folder), device=device), budget, SEPARATORS)
        for device in ("cuda", "cpu")
    )
    tokens = TOKENS.flatten()
    found = there.prefill(there.begin(), tokens, every=True)
    torch.testing.assert_close(found.cpu(), here.prefill(here.begin(), tokens, every=True), atol=1e-3, rtol=1e-3)


@needs_gpu
@pytest.mark.parametrize("pattern", [Pattern(), SEPLLM], ids=str)
def test_training_on_it_goes_where_training_on_the_cpu_goes(folder: Path, pattern: Pattern):
    losses, kept = {}, SEPARATORS[TOKENS].repeat(20, 1)
    for device in ("cuda", "cpu"):
        decoder = Decoder(open_checkpoint(folder), device=device)
        losses[device] = list(post_train(decoder, TOKENS.repeat(20, 1), pattern, kept, Training(3e-3, 3)))
    assert losses["cuda"][-1] < losses["cuda"][0] - 0.5
    torch.testing.assert_close(torch.tensor(losses["cuda"]), torch.tensor(losses["cpu"]), atol=0.05, rtol=0.05)
