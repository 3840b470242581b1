"""Streams on a cache of fixed size: in chunks as one by one, and both as the paper's lists would have it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from edgefm.models.attention.cache import StreamingBudget
from edgefm.models.errors import ConfigError, InputError
from edgefm.models.language.decoder import Decoder
from edgefm.models.language.streaming import StreamingDecoder
from edgefm.models.language.weights import open_checkpoint

BUDGETS = [StreamingBudget(2, 3, 6, 20), StreamingBudget(2, 0, 6, 20), StreamingBudget(0, 4, 5, 12)]
SEPARATORS = torch.arange(160) % 5 == 0


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return Decoder(open_checkpoint(folder))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(
        0, 160, (300,), generator=torch.Generator().manual_seed(3)
    )  # beyond the model's context of 256


def by_lists(decoder: Decoder, tokens: torch.Tensor, budget: StreamingBudget) -> torch.Tensor:
    """Token by token with one list of entries a layer: compression as the paper describes it, softmax as it is written."""
    entries: list[list[tuple[torch.Tensor, torch.Tensor, bool]]] = [[] for _ in range(decoder.config.layers)]

    def attention(number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cache = entries[number]
        if len(cache) == budget.capacity:
            first, rest = cache[: budget.initial], cache[budget.initial :]
            window, past = rest[-budget.window :], rest[: -budget.window]
            kept = [entry for entry in past if entry[2]]
            cache[:] = first + kept[max(len(kept) - budget.separators, 0) :] + window
        cache.append((k, v, is_separator))
        keys, values = (torch.cat([entry[part] for entry in cache], dim=1) for part in (0, 1))
        places = torch.arange(len(cache))
        q, keys = decoder.rotated(q, places[-1:]), decoder.rotated(keys, places)
        keys, values = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (keys, values))
        return torch.softmax(q @ keys.mT / q.shape[-1] ** 0.5, dim=-1) @ values

    found = []
    for token in tokens:
        is_separator = bool(SEPARATORS[token])
        with torch.inference_mode():
            found.append(decoder.through(token[None], attention))
    return torch.cat(found)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_chunks_equal_one_by_one_and_the_paper_s_lists(decoder: Decoder, tokens: torch.Tensor, budget: StreamingBudget):
    tokens, streaming = tokens[:70], StreamingDecoder(decoder, budget, SEPARATORS)
    whole = streaming.prefill(streaming.begin(), tokens, every=True)
    state = streaming.begin()
    alone = torch.stack([streaming.prefill(state, [int(token)]) for token in tokens])
    torch.testing.assert_close(whole, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole, by_lists(decoder, tokens, budget), atol=1e-4, rtol=1e-4)
    assert state.length == 70 and state.held == 3 * len(state.caches[0]) <= 3 * budget.capacity


def test_parts_of_any_size_end_in_the_same_state(decoder: Decoder, tokens: torch.Tensor):
    streaming = StreamingDecoder(decoder, BUDGETS[0], SEPARATORS)
    whole, parts = streaming.begin(), streaming.begin()
    last = streaming.prefill(whole, tokens)
    for part in tokens.split(37):
        found = streaming.prefill(parts, part)
    assert parts.length == 300 > decoder.config.context
    torch.testing.assert_close(found, last, atol=1e-4, rtol=1e-4)
    for cache, other in zip(whole.caches, parts.caches, strict=True):
        torch.testing.assert_close(cache.k, other.k, atol=1e-4, rtol=1e-4)


def test_a_stream_that_fits_is_the_sequence_itself(decoder: Decoder, tokens: torch.Tensor):
    streaming = StreamingDecoder(decoder, StreamingBudget(4, 8, 60, 200), SEPARATORS)
    found = streaming.prefill(streaming.begin(), tokens[:200], every=True)
    torch.testing.assert_close(found, decoder.prefill(decoder.begin(), tokens[:200], every=True), atol=1e-4, rtol=1e-4)


def test_a_sequence_beyond_the_context_is_refused_and_a_stream_is_not(decoder: Decoder, tokens: torch.Tensor):
    state = decoder.begin()
    decoder.prefill(state, tokens[:256])
    for more in (lambda: decoder.prefill(state, [1]), lambda: decoder.step([decoder.begin(), state], [1, 1])):
        with pytest.raises(InputError, match=r"257 tokens and the model's context has 256.*streaming cache"):
            more()
    assert state.length == 256
    with pytest.raises(ConfigError, match="257 entries has positions beyond"):
        StreamingDecoder(decoder, StreamingBudget(4, 8, 60, 257))


def test_a_token_that_is_none_leaves_the_stream_as_it_was(decoder: Decoder, tokens: torch.Tensor):
    streaming = StreamingDecoder(decoder, BUDGETS[0], SEPARATORS)
    state = streaming.begin()
    streaming.prefill(state, tokens[:18])
    with pytest.raises(InputError, match="below 160"):
        streaming.prefill(state, [1] * 30 + [160])
    assert state.length == 18 == len(state.caches[0])
