"""The fused step against the same step by operators, a batch against each sequence alone, and life without a compiler."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from edgefm.models import native
from edgefm.models.attention.cache import BLOCK
from edgefm.models.attention.pattern import Pattern
from edgefm.models.language import decoder as decoders
from edgefm.models.language import products, step
from edgefm.models.language.decoder import Decoder, Precision, SequenceState
from edgefm.models.language.weights import Checkpoint, open_checkpoint

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "quantised")
LENGTHS = (1, 300, BLOCK - 1, 700)
"""The kernel divides the work of a sequence every 256 entries."""


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    """The small model with a longer context."""
    found = open_checkpoint(folder)
    return replace(found, config=replace(found.config, context=1024))


def begun(decoder: Decoder, lengths: tuple[int, ...]) -> list[SequenceState]:
    states = [decoder.begin() for _ in lengths]
    for i, (state, length) in enumerate(zip(states, lengths, strict=True)):
        prompt = torch.randint(0, 160, (length,), generator=torch.Generator().manual_seed(i))
        decoder.prefill(state, prompt)
    return states


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(2, 12), Pattern(0, 1)], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_fused_step_is_the_step_of_operators(checkpoint: Checkpoint, pattern: Pattern, precision: Precision):
    separators = torch.arange(160) % 6 == 0
    decoder = Decoder(checkpoint, precision, pattern, [1], separators)
    assert decoder._fused
    fused, plain = begun(decoder, LENGTHS), begun(decoder, LENGTHS)
    for number in range(BLOCK + 2):  # beyond a block of memory
        tokens = [(7 * number + i) % 160 for i in range(len(LENGTHS))]
        found = decoder.step(fused, tokens)
        kept, decoder._fused = decoder._fused, None
        expected = decoder.step(plain, tokens)
        decoder._fused = kept
        close = 2e-2 if precision == "bfloat16" else 1e-4  # where a key rounds the other way, it is a bit of eight
        assert float((found - expected).abs().max() / expected.abs().max()) < close
    for some, others in zip(fused, plain, strict=True):
        assert some.held == others.held
        assert [cache.blocks for cache in some.caches] == [cache.blocks for cache in others.caches]
        torch.testing.assert_close(some.caches[0].k, others.caches[0].k, atol=2e-2, rtol=2e-2)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bits_of_a_sequence_do_not_depend_on_what_runs_beside_it(checkpoint: Checkpoint, precision: Precision):
    decoder = Decoder(checkpoint, precision)
    lengths = tuple(range(1, 20)) + LENGTHS  # of rows in groups of four, two and one
    states = begun(decoder, lengths)
    alone = torch.stack([decoder.step([state.fork()], [i])[0] for i, state in enumerate(states)])
    for some in (slice(0, 2), slice(3, 10), slice(0, len(lengths))):
        tokens = list(range(len(lengths)))[some]
        together = decoder.step([state.fork() for state in states[some]], tokens)
        assert torch.equal(together, alone[some])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(decoder.step(states, list(range(len(lengths)))), alone)
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler_operators_step_and_it_is_said_once(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    expected = Decoder(checkpoint, "bfloat16")
    logits = expected.step(begun(expected, LENGTHS), [1, 2, 3, 4])
    monkeypatch.setenv("EDGEFM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    caches = (products.library, native.missing, step.library, decoders._tell)
    for function in caches:
        function.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "edgefm.models.language"):
            decoder, again = (Decoder(checkpoint, "bfloat16") for _ in range(2))
        assert [record.getMessage() for record in caplog.records if "the C++ compiler failed" in record.getMessage()]
        assert len(caplog.records) == 1 and not decoder._fused and not again._fused
        found = decoder.step(begun(decoder, LENGTHS), [1, 2, 3, 4])
        assert float((found - logits).abs().max() / logits.abs().max()) < 2e-2
    finally:
        for function in caches:
            function.cache_clear()
