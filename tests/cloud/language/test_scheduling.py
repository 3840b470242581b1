"""Who runs when: policies over a machine that knows how long every answer is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from edgefm.cloud.language.generation import Generation, blocks
from edgefm.cloud.language.scheduling import (
    STALL,
    ContinuousBatching,
    Policy,
    Scheduler,
    SequenceScheduling,
    StaticBatches,
    policy_named,
)
from edgefm.models.attention.cache import BLOCK
from edgefm.models.errors import ConfigError, InputError
from edgefm.models.language.generate import Sampling

LENGTHS = [3, 40, 7, 1, 90, 12, 25, 60, 2, 33, 5, 71]
MOST = 120


class Counting:
    """Says 0, 1, 2, ...; the prompt's first token is how many, and it must be told again after every loss."""

    def __init__(self) -> None:
        self.said: dict[Generation, int] = {}
        self.batches: list[int] = []
        self.starts: list[int] = []
        self.read_since = 0  # the latest step, tokens
        self.stalls: list[int] = []  # the same before every step
        self.left: dict[Generation, int] = {}

    def start(self, generation: Generation) -> int:
        assert generation not in self.said
        self.starts.append(len(generation.tokens))
        self.said[generation] = len(generation.tokens)
        self.left[generation] = len(generation.prompt) + len(generation.tokens)
        return self.left[generation]

    def read(self, generation: Generation, count: int) -> int | None:
        self.read_since += count
        self.left[generation] -= count
        return None if self.left[generation] else self._next(generation)

    def step(self, generations: Sequence[Generation]) -> list[int | None]:
        self.batches.append(len(generations))
        self.stalls.append(self.read_since)
        self.read_since = 0
        assert not any(self.left[one] for one in generations)
        return [self._next(one) for one in generations]

    def stop(self, generation: Generation) -> None:
        del self.said[generation]

    def _next(self, generation: Generation) -> int | None:
        number = self.said[generation]
        assert number == len(generation.tokens)
        self.said[generation] += 1
        return number if number < generation.prompt[0] else None


class Failing(Counting):
    """Cannot start an answer of 7."""

    def read(self, generation: Generation, count: int) -> int | None:
        if generation.prompt[0] == 7:
            raise RuntimeError("out of memory")
        return super().read(generation, count)

    def stop(self, generation: Generation) -> None:
        self.said.pop(generation, None)


def run(policy: Policy, lengths=LENGTHS, predicted=None, cache_blocks=1000, prompt=1):
    machine = Counting()
    scheduler = Scheduler(machine, policy, cache_blocks)
    generations = [
        Generation([length] * prompt, Sampling(most=MOST), guess)
        for length, guess in zip(lengths, predicted or lengths, strict=True)
    ]
    for generation in generations:
        scheduler.submit(generation)
    ends, used = [], []
    for _ in range(5000):
        if scheduler.idle:
            break
        ends += [generations.index(one) for one in scheduler.advance() if one.ended]
        used.append(scheduler.blocks_used)
    assert scheduler.idle and not machine.said
    return generations, machine, scheduler, ends, used


@pytest.mark.parametrize("name", ["static", "sequence", "continuous"])
@pytest.mark.parametrize("guess", [1, 50, MOST, None])
def test_every_answer_is_whole_whatever_was_predicted(name, guess):
    predicted = None if guess is None else [guess] * len(LENGTHS)
    generations, *_ = run(policy_named(name, 4), predicted=predicted)
    assert [one.tokens for one in generations] == [list(range(length)) for length in LENGTHS]


def test_static_batches_last_as_long_as_their_longest():
    *_, ends, _ = run(StaticBatches(4))
    batches = [ends[i : i + 4] for i in (0, 4, 8)]
    assert [sorted(batch) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_continuous_batching_fills_places_at_once():
    _, machine, _, _, _ = run(ContinuousBatching(4))
    _, static, _, _, _ = run(StaticBatches(4))
    assert len(machine.batches) < len(static.batches)
    full = machine.batches[: -max(LENGTHS)]  # as long as anyone waited
    assert full and min(full) >= 3  # one that has just started is not stepped in the same round


def test_sequence_scheduling_batches_answers_of_like_length():
    lengths = [10, 300, 20, 310, 30, 320]
    machine = Counting()
    scheduler = Scheduler(machine, SequenceScheduling(batch=2, sizes=((50, 3),)), 1000)
    for length in lengths:
        scheduler.submit(Generation([length], Sampling(most=400), length))
    together = []
    while not scheduler.idle:
        before = set(machine.said)
        scheduler.advance()
        new = {one.prompt[0] for one in machine.said if one not in before}
        together += [new] if new else []
    assert together == [{10, 20, 30}, {300, 310}, {320}]


def test_an_answer_longer_than_its_batch_was_predicted_is_finished_at_the_end_of_its_group():
    lengths, predicted = [20, 120, 20, 20], [20, 20, 20, 100]
    generations, machine, _, ends, _ = run(SequenceScheduling(batch=3, sizes=()), lengths, predicted)
    assert generations[1].restarts == 1 and ends[-1] == 1
    assert machine.starts[-1] == 51  # what it had said is read, not said again
    assert all(one.restarts == 0 for one in generations if one is not generations[1])


def test_a_group_is_as_many_as_have_come():
    generations, _, _, ends, _ = run(SequenceScheduling(group=4, batch=1, sizes=()))
    assert [sorted(ends[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [len(generations[i].tokens) for i in ends[:4]] == sorted(LENGTHS[:4])


@pytest.mark.parametrize("name", ["static", "sequence", "continuous"])
def test_the_cache_is_never_larger_than_allowed(name):
    lengths = [3 * BLOCK // 2] * 6
    generations, *_, used = run(
        policy_named(name, 6), [min(length, MOST) for length in lengths], cache_blocks=5, prompt=BLOCK - 2
    )
    assert max(used) <= 5
    assert all(one.ended for one in generations)


def test_expected_lengths_admit_and_outgrown_ones_give_way():
    lengths, prompt = [MOST - 1] * 4, BLOCK
    _, _, careful, _, _ = run(ContinuousBatching(4), lengths, lengths, cache_blocks=8, prompt=prompt)
    assert careful.preempted == 0
    generations, machine, hopeful, _, used = run(ContinuousBatching(4), lengths, [1] * 4, cache_blocks=8, prompt=prompt)
    assert hopeful.preempted > 0 and max(used) <= 8
    assert max(machine.starts) > 0  # they went on where they were
    assert generations[0].restarts == 0  # the one that started first never gives way


def test_what_can_never_fit_is_refused():
    scheduler = Scheduler(Counting(), ContinuousBatching(4), 2)
    with pytest.raises(InputError, match=r"need \d+ cache blocks; there are 2"):
        scheduler.submit(Generation([1] * 3 * BLOCK, Sampling(most=5), 5))
    assert scheduler.idle


@pytest.mark.parametrize("name", ["static", "sequence", "continuous"])
def test_cancelled_ones_leave_no_trace(name):
    machine = Counting()
    scheduler = Scheduler(machine, policy_named(name, 2), 1000)
    generations = [Generation([length], Sampling(most=MOST), length) for length in LENGTHS]
    for generation in generations:
        scheduler.submit(generation)
    for _ in range(3):
        scheduler.advance()
    for generation in generations[::2]:
        scheduler.cancel(generation)
        scheduler.cancel(generation)
    while not scheduler.idle:
        scheduler.advance()
    assert [one.tokens for one in generations[1::2]] == [list(range(length)) for length in LENGTHS[1::2]]
    assert not machine.said and scheduler.waiting == scheduler.running == 0


def test_owners_are_served_in_turn():
    scheduler = Scheduler(Counting(), ContinuousBatching(1), 1000)
    many = [Generation([5], Sampling(most=9), 5, owner="many") for _ in range(5)]
    one = Generation([5], Sampling(most=9), 5, owner="one")
    for generation in [*many, one]:
        scheduler.submit(generation)
    ended: list[Generation] = []
    while not scheduler.idle:
        ended += [moved for moved in scheduler.advance() if moved.ended]
    assert ended.index(one) <= 1


def test_a_machine_that_fails_leaves_nothing_running():
    scheduler = Scheduler(Failing(), ContinuousBatching(3), 1000)
    generations = [Generation([length], Sampling(most=MOST), length) for length in (50, 7, 50, 9)]
    for generation in generations:
        scheduler.submit(generation)
    with pytest.raises(RuntimeError):
        scheduler.advance()
    assert set(scheduler.abandon()) == set(generations[:3])
    while not scheduler.idle:
        scheduler.advance()
    assert generations[3].tokens == list(range(9))


def test_policies_by_name():
    with pytest.raises(ConfigError, match="one of continuous, static, sequence, got 'lottery'"):
        policy_named("lottery", 4)


def test_blocks():
    assert [blocks(n) for n in (0, 1, BLOCK, BLOCK + 1)] == [0, 1, 1, 2]


def test_who_ended_before_an_error_is_known():
    scheduler = Scheduler(Failing(), ContinuousBatching(3), 1000)
    done, bad = (Generation([length], Sampling(most=MOST), length) for length in (0, 7))
    scheduler.submit(done)
    scheduler.submit(bad)
    with pytest.raises(RuntimeError):
        scheduler.advance()
    assert scheduler.abandon() == [bad]
    assert done in scheduler.moved and done.ended


def test_long_prompts_do_not_hold_up_those_who_run():
    machine = Counting()
    scheduler = Scheduler(machine, ContinuousBatching(8), 10_000)
    first = Generation([50], Sampling(most=MOST), 50)
    scheduler.submit(first)
    scheduler.advance()
    lengths = (STALL + 100, STALL // 2, 20, 4 * STALL)
    long = [Generation([50] * length, Sampling(most=MOST), 50) for length in lengths]
    for generation in long:
        scheduler.submit(generation)
    for said in range(2, 9):
        scheduler.advance()
        assert len(first.tokens) == said
    whole, rest = divmod(sum(lengths), STALL)
    assert machine.stalls == [1 + STALL, *[STALL] * (whole - 1), rest, 0] and not any(one.left for one in long)
    while not scheduler.idle:
        scheduler.advance()
    assert all(one.tokens == list(range(50)) for one in (first, *long))


@pytest.mark.parametrize(
    "policy", [StaticBatches(3), SequenceScheduling(batch=3, sizes=())], ids=["static", "sequence"]
)
def test_a_batch_steps_once_all_have_read_their_prompts(policy: Policy):
    machine = Counting()
    scheduler = Scheduler(machine, policy, 10_000)
    for length in (STALL, 3 * STALL, 10):
        scheduler.submit(Generation([50] * length, Sampling(most=MOST), 50))
    for _ in range(5):
        scheduler.advance()
        assert not machine.batches  # but their requests can be cancelled in between
    scheduler.advance()
    assert machine.batches == [3]
