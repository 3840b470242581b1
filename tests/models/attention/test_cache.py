"""What a cache keeps: the paper's worked example, its mean usage, and decoding equal to the masked prefill."""

from __future__ import annotations

import pytest
import torch
from edgefm.models.attention.api import attend
from edgefm.models.attention.cache import BLOCK, GrowingCache, StreamingBudget, StreamingCache
from edgefm.models.attention.pattern import Pattern
from edgefm.models.errors import ConfigError


def entry(number: int) -> torch.Tensor:
    return torch.full((1, 1, 2), float(number))


def filled(budget: StreamingBudget, separators: list[bool]) -> tuple[StreamingCache, list[int]]:
    cache, usage = StreamingCache(budget), []
    for number, is_separator in enumerate(separators):
        cache.append(entry(number), entry(-number), torch.tensor([is_separator]))
        usage.append(len(cache))
    return cache, usage


def held(cache: StreamingCache) -> list[int]:
    assert torch.equal(cache.k, -cache.v)
    return [int(x) for x in cache.k[0, :, 0]]


def test_the_paper_s_worked_example():
    """Figure 4: a = 2, s = 2, w = 5, c = 11; usage 11, 10, 11, 10 around two compressions."""
    separators = [number in (2, 4, 6, 12) for number in range(14)]
    cache, usage = filled(StreamingBudget(2, 2, 5, 11), separators)
    assert usage == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 10, 11, 10]
    assert held(cache) == [0, 1, 4, 6, *range(8, 14)]


def test_what_is_kept_is_the_first_the_newest_separators_and_the_window():
    budget = StreamingBudget(3, 4, 8, 24)
    separators = [number % 3 == 0 for number in range(200)]
    for length in range(1, 200):
        cache, usage = filled(budget, separators[:length])
        kept = held(cache)
        assert usage[-1] == len(kept) <= budget.capacity and kept == sorted(kept)
        assert (
            kept[:3] == list(range(min(length, 3)))
            and kept[-8:] == list(range(max(length - 8, 0), length))[-len(kept) :]
        )
        if length > budget.capacity:
            middle = kept[3:7]
            assert all(number % 3 == 0 for number in middle)


@pytest.mark.parametrize(
    "budget", [StreamingBudget(4, 64, 256, 800), StreamingBudget(2, 2, 5, 11), StreamingBudget(3, 8, 20, 60)]
)
def test_mean_usage_is_the_paper_s(budget: StreamingBudget):
    random = torch.Generator().manual_seed(0)
    _, usage = filled(budget, (torch.rand(6000, generator=random) < 0.3).tolist())
    period = budget.capacity - budget.initial - budget.separators - budget.window  # from one compression to the next
    steady = usage[-4 * period :]
    assert abs(sum(steady) / len(steady) - budget.mean_usage) <= 1


@pytest.mark.parametrize("budget", [StreamingBudget(2, 2, 5, 11), StreamingBudget(3, 0, 20, 60)], ids=str)
def test_entries_in_parts_are_kept_as_one_by_one(budget: StreamingBudget):
    separators = [number % 3 == 0 for number in range(150)]
    alone, _ = filled(budget, separators)
    cache, begin = StreamingCache(budget), 0
    while begin < 150:
        numbers = range(begin, min(begin + cache.make_room(), 150))
        entries = torch.cat([entry(number) for number in numbers], dim=1)
        cache.append(entries, -entries, torch.tensor([separators[number] for number in numbers]))
        begin = numbers.stop
    assert held(cache) == held(alone)


def test_more_entries_than_there_is_room_for_are_refused():
    cache, _ = filled(StreamingBudget(2, 2, 5, 11), [True] * 8)
    before = held(cache)
    with pytest.raises(ConfigError, match="room for 3 entries now, got 4"):
        cache.append(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2))
    assert held(cache) == before


@pytest.mark.parametrize("sizes", [(1, 1, 0, 9), (-1, 1, 3, 9), (3, 3, 3, 9)])
def test_sizes_that_cannot_be_are_refused(sizes: tuple[int, int, int, int]):
    with pytest.raises(ConfigError, match="streaming cache needs"):
        StreamingBudget(*sizes)


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(3, 10), Pattern(0, 1), Pattern(4, 100)], ids=str)
@pytest.mark.parametrize("form", ["softmax", "sa", "sa_normalised"])
def test_decoding_from_the_cache_equals_masked_prefill(pattern: Pattern, form):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 60, 16, generator=random) for h in (4, 2, 2))
    separators = torch.rand(1, 60, generator=random) < 0.2
    whole = attend(q, k, v, pattern, form, separators)
    cache, decoded = GrowingCache(pattern), []
    cache.append(k[0, :, :20], v[0, :, :20], separators[0, :20])
    for i in range(20, 60):
        cache.append(k[0, :, i : i + 1], v[0, :, i : i + 1], separators[0, i : i + 1])
        decoded.append(attend(q[:, :, i : i + 1], cache.k[None], cache.v[None], form=form))
    torch.testing.assert_close(torch.cat(decoded, dim=2), whole[:, :, 20:], atol=1e-5, rtol=1e-4)
    if pattern.neighbours is not None:
        kept = int(separators[0, : 60 - pattern.neighbours].sum()) if pattern.neighbours < 60 else 0
        assert len(cache) <= min(60, kept + pattern.initial + pattern.neighbours)


def test_memory_is_whole_blocks_of_what_is_held():
    whole, window = GrowingCache(Pattern()), GrowingCache(Pattern(2, 10))
    for number in range(3 * BLOCK + 1):
        for cache in (whole, window):
            cache.append(entry(number), entry(-number), torch.tensor([number == 20]))
        assert whole.blocks == number // BLOCK + 1 and whole._k.shape[1] == whole.blocks * BLOCK
        assert window.blocks <= 2  # what is held, and a block in which the window moves on
    assert [int(x) for x in window.k[0, :, 0]] == [0, 1, 20, *range(3 * BLOCK - 9, 3 * BLOCK + 1)]
    window.append(torch.zeros(1, 9 * BLOCK, 2), torch.zeros(1, 9 * BLOCK, 2))
    assert len(window) == 13 and window.blocks == 2


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(2, 5)], ids=str)
def test_a_fork_and_what_it_came_from_go_their_own_ways(pattern: Pattern):
    cache = GrowingCache(pattern)
    cache.append(torch.ones(1, 8, 2), torch.ones(1, 8, 2))
    fork = cache.fork()
    cache.append(entry(2), entry(2))
    fork.append(entry(3), entry(3))
    assert len(cache) == len(fork) and int(cache.k[0, -1, 0]) == 2 and int(fork.k[0, -1, 0]) == 3
    fork.k.zero_()
    assert cache.k.all()
