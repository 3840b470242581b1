"""The batcher's queue: whose turn it is, who is refused when it is full, and who is never computed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest
from edgefm.cloud.batcher import DynamicBatcher
from edgefm.models.errors import DeadlineError, OverloadedError

from .conftest import Batcher, Doubler


async def waiting(batcher: Batcher, live: int, bulk: int = 0) -> None:
    """Until so many wait."""
    while batcher.waiting != (live, bulk):
        await asyncio.sleep(0.001)


def test_devices_are_served_in_turn(doubling, run, occupy):
    """One device with ten samples waiting does not stand before one with a single sample."""
    process = Doubler()
    batcher = doubling(process, max_batch=2, max_delay_ms=0)

    async def work() -> None:
        first = await occupy(batcher, process)
        many = [asyncio.create_task(batcher.submit(n, "greedy")) for n in range(1, 11)]
        await waiting(batcher, 8)  # two are being prepared already
        one = asyncio.create_task(batcher.submit(100, "modest"))
        await waiting(batcher, 9)
        process.gate.set()
        await asyncio.gather(first, one, *many)

    run(batcher, work)
    assert process.batches[:3] == [[0], [1, 2], [3, 100]]
    assert [n for batch in process.batches for n in batch if n != 100] == list(range(11))  # each device in order


def test_uploads_take_the_places_that_queries_leave(doubling, run, occupy):
    process = Doubler()
    batcher = doubling(process, max_batch=4, max_delay_ms=0)

    async def work() -> None:
        first = await occupy(batcher, process)
        uploads = [asyncio.create_task(batcher.submit(n, "a", live=False)) for n in (10, 11, 12)]
        await waiting(batcher, 0, 3)
        queries = [asyncio.create_task(batcher.submit(n, "b")) for n in (1, 2)]
        await asyncio.sleep(0.02)
        process.gate.set()
        await asyncio.gather(first, *uploads, *queries)

    run(batcher, work)
    assert process.batches == [[0], [1, 2, 10, 11], [12]]


# ---- a full queue


def test_a_full_queue_refuses_whoever_occupies_most_of_it(doubling, run, occupy):
    process = Doubler()
    batcher = doubling(process, max_batch=8, max_delay_ms=0, max_queue=4)

    async def work() -> None:
        first = await occupy(batcher, process)
        greedy = [asyncio.create_task(batcher.submit(n, "greedy")) for n in (1, 2, 3, 4)]
        await waiting(batcher, 4)
        with pytest.raises(OverloadedError, match="4 samples wait") as refused:
            await batcher.submit(5, "greedy")
        assert refused.value.retry_after_ms > 0
        # A device that has nothing waiting takes the place of the greedy one's newest.
        modest = asyncio.create_task(batcher.submit(6, "modest"))
        with pytest.raises(OverloadedError):
            await greedy[3]
        also = asyncio.create_task(batcher.submit(7, "modest"))
        with pytest.raises(OverloadedError):
            await greedy[2]
        with pytest.raises(OverloadedError):  # now both have two: whoever comes is refused
            await batcher.submit(8, "modest")
        assert batcher.waiting == (4, 0)
        process.gate.set()
        assert [(await task).result for task in (first, *greedy[:2], modest, also)] == [0, 2, 4, 12, 14]

    run(batcher, work)
    assert sorted(n for batch in process.batches for n in batch) == [0, 1, 2, 6, 7]  # the refused were not computed


def test_queries_push_uploads_out_of_a_full_queue_and_never_the_other_way(doubling, run, occupy):
    process = Doubler()
    batcher = doubling(process, max_batch=8, max_delay_ms=0, max_queue=2)

    async def work() -> None:
        first = await occupy(batcher, process)
        uploads = [asyncio.create_task(batcher.submit(n, "a", live=False)) for n in (10, 11)]
        await waiting(batcher, 0, 2)
        queries = [asyncio.create_task(batcher.submit(n, "b")) for n in (1, 2)]
        await waiting(batcher, 2, 0)
        for upload in uploads:
            with pytest.raises(OverloadedError):
                await upload
        with pytest.raises(OverloadedError):
            await batcher.submit(12, "c", live=False)
        process.gate.set()
        await asyncio.gather(first, *queries)

    run(batcher, work)
    assert process.batches == [[0], [1, 2]]


def test_the_hint_grows_with_the_queue_and_the_measured_time(run):
    """Ten samples a batch, 50 ms each batch: 20 waiting and 10 being computed are worth about 150 ms."""

    def process(items: Sequence[int]) -> Sequence[int]:
        time.sleep(0.05)
        return items

    batcher: Batcher = DynamicBatcher(lambda item: item, process, max_batch=10, max_delay_ms=0, max_queue=20)
    hints: list[int] = []

    async def work() -> None:
        await asyncio.gather(*(batcher.submit(n) for n in range(10)))
        tasks = [asyncio.create_task(batcher.submit(n, str(n))) for n in range(10)]
        await asyncio.sleep(0.01)
        tasks += [asyncio.create_task(batcher.submit(n, str(n))) for n in range(10, 60)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        hints.extend(result.retry_after_ms for result in results if isinstance(result, OverloadedError))

    run(batcher, work)
    assert len(hints) >= 20 and 75 <= min(hints) <= max(hints) <= 1500


# ---- who is too late, or has gone


def test_what_is_past_its_deadline_is_not_computed(doubling, run, occupy):
    process = Doubler()
    batcher = doubling(process, max_batch=4, max_delay_ms=0)

    async def work() -> None:
        first = await occupy(batcher, process)
        late = asyncio.create_task(batcher.submit(1, deadline_ms=20))
        patient = asyncio.create_task(batcher.submit(2, deadline_ms=60_000))
        unlimited = asyncio.create_task(batcher.submit(3))
        await asyncio.sleep(0.1)
        process.gate.set()
        assert (await first).result == 0
        with pytest.raises(DeadlineError, match="in the queue"):
            await late
        assert (await patient).result == 4 and (await unlimited).result == 6

    run(batcher, work)
    assert process.batches == [[0], [2, 3]]


def test_what_expires_after_it_was_prepared_is_not_computed(doubling, run, occupy):
    process = Doubler()
    batcher = doubling(process, max_batch=2, max_delay_ms=0)

    async def work() -> None:
        first = await occupy(batcher, process)
        late = asyncio.create_task(batcher.submit(1, deadline_ms=50))
        patient = asyncio.create_task(batcher.submit(2))
        while len(process.prepared) < 3:
            await asyncio.sleep(0.001)
        with pytest.raises(DeadlineError):
            await late
        process.gate.set()
        await asyncio.gather(first, patient)

    run(batcher, work)
    assert process.batches == [[0], [2]]


def test_a_caller_that_has_gone_is_not_computed(doubling, run, occupy):
    process = Doubler()
    batcher = doubling(process, max_batch=4, max_delay_ms=0)

    async def work() -> None:
        first = await occupy(batcher, process)
        gone, alone = asyncio.create_task(batcher.submit(1)), asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0.01)
        gone.cancel()
        process.gate.set()
        await first
        assert (await alone).batch_size == 1

    run(batcher, work)
    assert process.batches == [[0], [2]]


def test_a_caller_may_leave_while_its_batch_is_computed(doubling, run, occupy):
    process = Doubler()
    batcher = doubling(process, max_batch=4, max_delay_ms=0)

    async def work() -> None:
        first = await occupy(batcher, process)
        first.cancel()
        process.gate.set()
        assert (await batcher.submit(1)).result == 2

    run(batcher, work)
    assert process.batches == [[0], [1]]


@pytest.mark.parametrize("where", ["queued", "collecting"])
@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_who_goes_frees_the_place_at_once(where: str, how: str, doubling, run, occupy):
    """While the model is still busy, or while the batch is still being collected."""
    process = Doubler()
    batcher = doubling(process, max_batch=4, max_delay_ms=60_000 if where == "collecting" else 0, max_queue=4)

    async def work() -> None:
        first = await occupy(batcher, process) if where == "queued" else None
        leaving = [asyncio.create_task(batcher.submit(n, deadline_ms=30 if how == "expired" else 0)) for n in (1, 2, 3)]
        await waiting(batcher, 3)
        if how == "cancelled":
            for task in leaving:
                task.cancel()
        await waiting(batcher, 0)  # nothing has been computed meanwhile
        for task in leaving:
            with pytest.raises(DeadlineError if how == "expired" else asyncio.CancelledError):
                await task
        staying = [asyncio.create_task(batcher.submit(n)) for n in (4, 5, 6, 7)]
        await asyncio.sleep(0.01)
        process.gate.set()
        await asyncio.gather(*staying, *([first] if first else []))

    run(batcher, work)
    assert process.batches == ([[0], [4, 5, 6, 7]] if where == "queued" else [[4, 5, 6, 7]])
    assert not {1, 2, 3} & set(process.prepared)
