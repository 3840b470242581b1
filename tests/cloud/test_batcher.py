from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from edgefm.cloud.batcher import DynamicBatcher
from edgefm.models.errors import DeadlineError, EdgeFMError, InputError


class Doubler:
    """Doubles numbers; remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, items: Sequence[int]) -> list[int | EdgeFMError]:
        self.gate.wait(5)
        self.batches.append(list(items))
        return [InputError("negative") if item < 0 else item * 2 for item in items]


async def _with(batcher: DynamicBatcher[int, int], work):
    batcher.start()
    try:
        return await work()
    finally:
        await batcher.close()


def test_concurrent_requests_share_a_batch_and_get_their_own_results():
    process = Doubler()
    batcher = DynamicBatcher(process, max_batch=8, max_delay_ms=50)

    async def work():
        return await asyncio.gather(*(batcher.submit(n) for n in range(16)))

    results = asyncio.run(_with(batcher, work))
    assert [batched.result for batched in results] == [2 * n for n in range(16)]
    assert [len(batch) for batch in process.batches] == [8, 8]
    assert {batched.batch_size for batched in results} == {8}


def test_an_error_reaches_only_its_caller():
    batcher = DynamicBatcher(Doubler(), max_delay_ms=50)

    async def work():
        return await asyncio.gather(batcher.submit(1), batcher.submit(-1), return_exceptions=True)

    good, bad = asyncio.run(_with(batcher, work))
    assert good.result == 2 and isinstance(bad, InputError)


def test_what_is_past_its_deadline_is_not_computed():
    process = Doubler()
    process.gate.clear()
    batcher = DynamicBatcher(process, max_batch=1, max_delay_ms=0)

    async def work():
        first = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0.05)
        late = asyncio.create_task(batcher.submit(2, deadline_ms=20))
        await asyncio.sleep(0.1)
        process.gate.set()
        assert (await first).result == 2
        with pytest.raises(DeadlineError):
            await late

    asyncio.run(_with(batcher, work))
    assert process.batches == [[1]]
