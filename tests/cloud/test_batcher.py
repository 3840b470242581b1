"""Dynamic batching: who shares a batch, who gets which result, and who is never computed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest
from edgefm.cloud.batcher import Batched, DynamicBatcher
from edgefm.models.errors import DeadlineError, EdgeFMError, InputError

FAILS = 666


class Doubler:
    """Doubles numbers and remembers its batches. Negative numbers are bad items; `FAILS` breaks the whole batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.running = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, items: Sequence[int]) -> list[int | EdgeFMError]:
        self.batches.append(list(items))
        self.running.set()
        assert self.gate.wait(10)
        if FAILS in items:
            raise RuntimeError("out of memory")
        return [InputError(f"{item} is negative") if item < 0 else item * 2 for item in items]


def run(batcher: DynamicBatcher[int, int], work: Callable[[], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        batcher.start()
        try:
            await asyncio.wait_for(work(), 20)
        finally:
            await batcher.close()

    asyncio.run(all_of_it())


async def occupy(batcher: DynamicBatcher[int, int], process: Doubler) -> asyncio.Task[Batched[int]]:
    """Keeps the model busy with item 0 until `process.gate` is set; what is submitted now waits in the queue."""
    process.gate.clear()
    process.running.clear()
    first = asyncio.create_task(batcher.submit(0))
    while not process.running.is_set():
        await asyncio.sleep(0.001)
    return first


def test_concurrent_requests_share_a_batch_and_get_their_own_results():
    process = Doubler()
    batcher = DynamicBatcher(process, max_batch=8, max_delay_ms=50)

    async def work() -> None:
        results = await asyncio.gather(*(batcher.submit(n) for n in range(16)))
        assert [batched.result for batched in results] == [2 * n for n in range(16)]
        assert [len(batch) for batch in process.batches] == [8, 8]
        assert {batched.batch_size for batched in results} == {8}
        assert all(batched.queue_ms >= 0 and batched.compute_ms > 0 for batched in results)

    run(batcher, work)


def test_results_find_their_callers_whatever_the_sizes_of_the_batches():
    """300 callers in seeded bursts; some of them bring bad items, in any place of a batch."""
    rng = np.random.default_rng(7)
    numbers = rng.permutation(300) - 30  # 30 negative ones
    process = Doubler()
    batcher = DynamicBatcher(process, max_batch=7, max_delay_ms=1)

    async def work() -> None:
        callers: list[asyncio.Task[Batched[int]]] = []
        for burst in np.split(numbers, np.sort(rng.choice(300, 40, replace=False))):
            callers += [asyncio.create_task(batcher.submit(int(number))) for number in burst]
            await asyncio.sleep(float(rng.uniform(0, 0.004)))
        results = await asyncio.gather(*callers, return_exceptions=True)
        for number, result in zip(numbers, results, strict=True):
            if number < 0:
                assert isinstance(result, InputError) and str(result) == f"{number} is negative"
            else:
                assert isinstance(result, Batched) and result.result == 2 * number

    run(batcher, work)
    sizes = [len(batch) for batch in process.batches]
    assert sum(sizes) == 300 and max(sizes) == 7 and len(set(sizes)) > 1  # full and partial batches were served


def test_a_batch_waits_for_company_but_not_longer_than_its_delay():
    process = Doubler()
    batcher = DynamicBatcher(process, max_batch=8, max_delay_ms=150)

    async def work() -> None:
        started = time.perf_counter()
        first = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0.05)
        results = await asyncio.gather(first, batcher.submit(2))
        elapsed_ms = (time.perf_counter() - started) * 1e3
        assert process.batches == [[1, 2]] and {batched.batch_size for batched in results} == {2}
        assert 145 <= elapsed_ms < 1500  # not at once, and not for ever
        assert results[0].queue_ms >= 145 and results[1].queue_ms < results[0].queue_ms

    run(batcher, work)


def test_a_full_batch_does_not_wait():
    process = Doubler()
    batcher = DynamicBatcher(process, max_batch=2, max_delay_ms=60_000)

    async def work() -> None:
        await asyncio.gather(batcher.submit(1), batcher.submit(2))
        assert process.batches == [[1, 2]]

    run(batcher, work)  # within its 20 s, far below the delay


def test_an_error_reaches_only_its_caller():
    process = Doubler()
    batcher = DynamicBatcher(process, max_batch=3, max_delay_ms=5000)

    async def work() -> None:
        before, bad, after = await asyncio.gather(*(batcher.submit(n) for n in (1, -1, 3)), return_exceptions=True)
        assert isinstance(bad, InputError)
        assert isinstance(before, Batched) and isinstance(after, Batched)
        assert (before.result, after.result) == (2, 6)
        assert process.batches == [[1, -1, 3]]

    run(batcher, work)


def test_a_failing_model_reaches_every_caller_and_the_next_batch_works():
    process = Doubler()
    batcher = DynamicBatcher(process, max_batch=3, max_delay_ms=20)

    async def work() -> None:
        failed = await asyncio.gather(*(batcher.submit(n) for n in (1, FAILS, 3)), return_exceptions=True)
        assert len(process.batches) == 1
        for error in failed:
            assert type(error) is EdgeFMError and "out of memory" in str(error)
        assert (await batcher.submit(4)).result == 8

    run(batcher, work)


def test_what_is_past_its_deadline_is_not_computed():
    process = Doubler()
    batcher = DynamicBatcher(process, max_batch=4, max_delay_ms=0)

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


def test_a_caller_that_has_gone_is_not_computed():
    process = Doubler()
    batcher = DynamicBatcher(process, max_batch=4, max_delay_ms=0)

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


def test_a_caller_may_leave_while_its_batch_is_computed():
    process = Doubler()
    batcher = DynamicBatcher(process, max_batch=4, max_delay_ms=0)

    async def work() -> None:
        first = await occupy(batcher, process)
        first.cancel()
        process.gate.set()
        assert (await batcher.submit(1)).result == 2

    run(batcher, work)
    assert process.batches == [[0], [1]]


@pytest.mark.parametrize("where", ["collecting", "computing", "queued"])
def test_closing_cancels_whoever_still_waits(where: str):
    """Nobody is left waiting for ever, wherever the item stood."""
    process = Doubler()
    delay_ms = 60_000 if where == "collecting" else 0
    batcher = DynamicBatcher(process, max_batch=4, max_delay_ms=delay_ms)

    async def work() -> None:
        batcher.start()
        if where == "collecting":
            waiting = [asyncio.create_task(batcher.submit(n)) for n in (1, 2)]
            await asyncio.sleep(0.02)
            assert process.batches == []
        else:
            waiting = [await occupy(batcher, process)]
            if where == "queued":
                waiting.append(asyncio.create_task(batcher.submit(1)))
                await asyncio.sleep(0.02)
        threading.Timer(0.1, process.gate.set).start()
        await batcher.close()
        done, pending = await asyncio.wait(waiting, timeout=2)
        for task in pending:
            task.cancel()
        assert not pending
        assert all(task.cancelled() for task in done)
        assert process.batches == ([] if where == "collecting" else [[0]])

    asyncio.run(work())
