"""Dynamic batching: who shares a batch, who gets which result, and who is never computed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest
from edgefm.cloud.batcher import Batched, DynamicBatcher
from edgefm.models.errors import DeadlineError, EdgeFMError, InputError, OverloadedError

FAILS = 666
Batcher = DynamicBatcher[int, int, int]


class Doubler:
    """Doubles numbers and remembers its batches. Negative numbers cannot be prepared; `FAILS` breaks its whole batch."""

    def __init__(self) -> None:
        self.prepared: list[int] = []
        self.batches: list[list[int]] = []
        self.running = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def prepare(self, item: int) -> int:
        self.prepared.append(item)
        if item < 0:
            raise InputError(f"{item} is negative")
        return item

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.running.set()
        assert self.gate.wait(10)
        if FAILS in items:
            raise RuntimeError("out of memory")
        return [item * 2 for item in items]


def doubling(process: Doubler, **settings: float) -> Batcher:
    return DynamicBatcher(process.prepare, process, **settings)  # pyright: ignore[reportArgumentType]


def run(batcher: Batcher, work: Callable[[], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        batcher.start()
        try:
            await asyncio.wait_for(work(), 20)
        finally:
            await batcher.close()

    asyncio.run(all_of_it())


async def occupy(batcher: Batcher, process: Doubler) -> asyncio.Task[Batched[int]]:
    """Keeps the model busy with item 0 until `process.gate` is set; what is submitted now waits in the queue."""
    process.gate.clear()
    process.running.clear()
    first = asyncio.create_task(batcher.submit(0))
    while not process.running.is_set():
        await asyncio.sleep(0.001)
    return first


def test_concurrent_requests_share_a_batch_and_get_their_own_results():
    process = Doubler()
    batcher = doubling(process, max_batch=8, max_delay_ms=50)

    async def work() -> None:
        results = await asyncio.gather(*(batcher.submit(n) for n in range(16)))
        assert [batched.result for batched in results] == [2 * n for n in range(16)]
        assert [len(batch) for batch in process.batches] == [8, 8]
        assert {batched.batch_size for batched in results} == {8}
        assert all(batched.queue_ms >= 0 and batched.compute_ms > 0 for batched in results)

    run(batcher, work)


def test_whoever_was_alone_does_not_wait_for_company_until_there_was_some():
    process, delay_ms = Doubler(), 400
    batcher = doubling(process, max_batch=8, max_delay_ms=delay_ms)

    async def work() -> None:
        assert (await batcher.submit(1)).queue_ms >= 0.9 * delay_ms  # the first cannot know
        assert (await batcher.submit(2)).queue_ms < 0.5 * delay_ms
        both = await asyncio.gather(batcher.submit(3), batcher.submit(4))
        assert max(batched.queue_ms for batched in both) < 0.5 * delay_ms
        assert (await batcher.submit(5)).queue_ms >= 0.9 * delay_ms
        assert process.batches == [[1], [2], [3, 4], [5]]

    run(batcher, work)


def test_results_find_their_callers_whatever_the_sizes_of_the_batches():
    """300 callers in seeded bursts; some of them bring bad items, in any place of a batch."""
    rng = np.random.default_rng(7)
    numbers = rng.permutation(300) - 30  # 30 negative ones
    process = Doubler()
    batcher = doubling(process, max_batch=7, max_delay_ms=1)

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
    assert sum(sizes) == 270 and max(sizes) == 7 and len(set(sizes)) > 1  # full and partial batches were served


def test_a_batch_waits_for_company_but_not_longer_than_its_delay():
    process = Doubler()
    batcher = doubling(process, max_batch=8, max_delay_ms=150)

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
    batcher = doubling(process, max_batch=2, max_delay_ms=60_000)

    async def work() -> None:
        await asyncio.gather(batcher.submit(1), batcher.submit(2))
        assert process.batches == [[1, 2]]

    run(batcher, work)  # within its 20 s, far below the delay


def test_an_error_reaches_only_its_caller():
    process = Doubler()
    batcher = doubling(process, max_batch=3, max_delay_ms=5000)

    async def work() -> None:
        before, bad, after = await asyncio.gather(*(batcher.submit(n) for n in (1, -1, 3)), return_exceptions=True)
        assert isinstance(bad, InputError)
        assert isinstance(before, Batched) and isinstance(after, Batched)
        assert (before.result, after.result) == (2, 6)
        assert process.batches == [[1, 3]]

    run(batcher, work)


def test_a_failing_model_reaches_every_caller_and_the_next_batch_works():
    process = Doubler()
    batcher = doubling(process, max_batch=3, max_delay_ms=20)

    async def work() -> None:
        failed = await asyncio.gather(*(batcher.submit(n) for n in (1, FAILS, 3)), return_exceptions=True)
        assert len(process.batches) == 1
        for error in failed:
            assert type(error) is EdgeFMError and "out of memory" in str(error)
        assert (await batcher.submit(4)).result == 8

    run(batcher, work)


def test_what_is_past_its_deadline_is_not_computed():
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


def test_a_caller_that_has_gone_is_not_computed():
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


def test_a_caller_may_leave_while_its_batch_is_computed():
    process = Doubler()
    batcher = doubling(process, max_batch=4, max_delay_ms=0)

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
    batcher = doubling(process, max_batch=4, max_delay_ms=delay_ms)

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


def test_who_waits_for_a_model_that_hangs_is_told():
    process = Doubler()
    batcher = doubling(process, max_batch=4, max_delay_ms=0, patience_s=0.1)

    async def work() -> None:
        hanging = await occupy(batcher, process)
        queued = asyncio.create_task(batcher.submit(1))
        with pytest.raises(EdgeFMError, match="has been at this batch"):
            await hanging
        assert not process.gate.is_set() and batcher.computing_s > 0.1
        process.gate.set()
        assert (await queued).result == 2  # it goes on where it left off

    run(batcher, work)


def test_a_process_ends_although_its_model_hangs():
    """Neither closing nor the interpreter's end waits for the thread."""
    script = """
import asyncio, threading
from edgefm.cloud.batcher import DynamicBatcher

async def work():
    began = threading.Event()
    def hang(items):
        began.set()
        threading.Event().wait()
    batcher = DynamicBatcher(lambda item: item, hang, 1, 0)
    batcher.start()
    waiting = [asyncio.create_task(batcher.submit(n)) for n in range(3)]
    await asyncio.to_thread(began.wait)
    await batcher.close()
    await asyncio.wait(waiting)
    print(all(task.cancelled() for task in waiting))

asyncio.run(work())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "event=model_left_behind" in done.stderr


# ---- a full queue


async def waiting(batcher: Batcher, live: int, bulk: int = 0) -> None:
    """Until so many wait."""
    while batcher.waiting != (live, bulk):
        await asyncio.sleep(0.001)


def test_devices_are_served_in_turn():
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


def test_uploads_take_the_places_that_queries_leave():
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


def test_a_full_queue_refuses_whoever_occupies_most_of_it():
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


def test_queries_push_uploads_out_of_a_full_queue_and_never_the_other_way():
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


def test_the_hint_grows_with_the_queue_and_the_measured_time():
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


@pytest.mark.parametrize("where", ["queued", "collecting"])
@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_who_goes_frees_the_place_at_once(where: str, how: str):
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


def test_a_full_batch_is_prepared_while_the_model_computes_and_a_smaller_one_waits_for_company():
    process = Doubler()
    batcher = doubling(process, max_batch=2, max_delay_ms=0)

    async def work() -> None:
        first = await occupy(batcher, process)
        one = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0.02)
        assert process.prepared == [0]
        two = asyncio.create_task(batcher.submit(2))
        while len(process.prepared) < 3:
            await asyncio.sleep(0.001)
        assert process.batches == [[0]]  # the model is still at the first
        process.gate.set()
        await asyncio.gather(first, one, two)

    run(batcher, work)
    assert process.batches == [[0], [1, 2]]


def test_what_expires_after_it_was_prepared_is_not_computed():
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


def test_a_model_with_too_few_results_is_a_failing_model():
    batcher: Batcher = DynamicBatcher(lambda item: item, lambda items: items[1:], max_batch=4, max_delay_ms=1)

    async def work() -> None:
        for result in await asyncio.gather(*(batcher.submit(n) for n in range(3)), return_exceptions=True):
            assert type(result) is EdgeFMError and "2 results for 3 samples" in str(result)

    run(batcher, work)
