"""Dynamic batching: who shares a batch, who gets which result, and what a model that fails or hangs does to them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from edgefm.cloud.batcher import Batched, DynamicBatcher
from edgefm.models.errors import EdgeFMError, InputError

from .conftest import FAILS, Batcher, Doubler


def test_concurrent_requests_share_a_batch_and_get_their_own_results(doubling, run):
    process = Doubler()
    batcher = doubling(process, max_batch=8, max_delay_ms=50)

    async def work() -> None:
        results = await asyncio.gather(*(batcher.submit(n) for n in range(16)))
        assert [batched.result for batched in results] == [2 * n for n in range(16)]
        assert [len(batch) for batch in process.batches] == [8, 8]
        assert {batched.batch_size for batched in results} == {8}
        assert all(batched.queue_ms >= 0 and batched.compute_ms > 0 for batched in results)

    run(batcher, work)


def test_whoever_was_alone_does_not_wait_for_company_until_there_was_some(doubling, run):
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


def test_results_find_their_callers_whatever_the_sizes_of_the_batches(doubling, run):
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


def test_a_batch_waits_for_company_but_not_longer_than_its_delay(doubling, run):
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


def test_a_full_batch_does_not_wait(doubling, run):
    process = Doubler()
    batcher = doubling(process, max_batch=2, max_delay_ms=60_000)

    async def work() -> None:
        await asyncio.gather(batcher.submit(1), batcher.submit(2))
        assert process.batches == [[1, 2]]

    run(batcher, work)  # within its 20 s, far below the delay


def test_a_full_batch_is_prepared_while_the_model_computes_and_a_smaller_one_waits_for_company(doubling, run, occupy):
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


# ---- errors


def test_an_error_reaches_only_its_caller(doubling, run):
    process = Doubler()
    batcher = doubling(process, max_batch=3, max_delay_ms=5000)

    async def work() -> None:
        before, bad, after = await asyncio.gather(*(batcher.submit(n) for n in (1, -1, 3)), return_exceptions=True)
        assert isinstance(bad, InputError)
        assert isinstance(before, Batched) and isinstance(after, Batched)
        assert (before.result, after.result) == (2, 6)
        assert process.batches == [[1, 3]]

    run(batcher, work)


def test_a_failing_model_reaches_every_caller_and_the_next_batch_works(doubling, run):
    process = Doubler()
    batcher = doubling(process, max_batch=3, max_delay_ms=20)

    async def work() -> None:
        failed = await asyncio.gather(*(batcher.submit(n) for n in (1, FAILS, 3)), return_exceptions=True)
        assert len(process.batches) == 1
        for error in failed:
            assert type(error) is EdgeFMError and "out of memory" in str(error)
        assert (await batcher.submit(4)).result == 8

    run(batcher, work)


def test_a_model_with_too_few_results_is_a_failing_model(run):
    batcher: Batcher = DynamicBatcher(lambda item: item, lambda items: items[1:], max_batch=4, max_delay_ms=1)

    async def work() -> None:
        for result in await asyncio.gather(*(batcher.submit(n) for n in range(3)), return_exceptions=True):
            assert type(result) is EdgeFMError and "2 results for 3 samples" in str(result)

    run(batcher, work)


def test_who_waits_for_a_model_that_hangs_is_told(doubling, run, occupy):
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


# ---- the end


@pytest.mark.parametrize("where", ["collecting", "computing", "queued"])
def test_closing_cancels_whoever_still_waits(where: str, doubling, occupy):
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
