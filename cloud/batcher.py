"""Dynamic batching: single requests in, full batches to the model, each result back to its caller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..models.errors import DeadlineError, EdgeFMError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batched(Generic[Result]):
    """A result and what it cost."""

    result: Result
    queue_ms: float
    compute_ms: float
    batch_size: int


@dataclass
class _Waiting(Generic[Item, Result]):
    item: Item
    arrived: float
    deadline: float | None
    future: asyncio.Future[Batched[Result]]


class DynamicBatcher(Generic[Item, Result]):
    """Runs `process` on up to `max_batch` items, waiting at most `max_delay_ms` for a batch to fill.

    `process` runs in a thread of its own, one batch at a time; for each item it returns a result or the error that
    this item alone gets. Items that are past their deadline or whose caller has gone are not computed.
    """

    def __init__(
        self,
        process: Callable[[Sequence[Item]], Sequence[Result | EdgeFMError]],
        max_batch: int = 16,
        max_delay_ms: float = 5.0,
    ) -> None:
        self._process = process
        self._max_batch = max_batch
        self._max_delay_s = max_delay_ms / 1e3
        self._queue: asyncio.Queue[_Waiting[Item, Result]] = asyncio.Queue()
        self._unanswered: set[asyncio.Future[Batched[Result]]] = set()  # queued, being collected or being computed
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="fm")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="batcher")

    async def close(self) -> None:
        """Stops; whoever still waits gets a `CancelledError`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for future in self._unanswered:
            future.cancel()
        self._executor.shutdown()

    async def submit(self, item: Item, deadline_ms: float = 0) -> Batched[Result]:
        """Waits for the item's result.

        Args:
            deadline_ms: from now; past it the item is not computed. 0: none.

        Raises:
            DeadlineError: the deadline passed in the queue.
            EdgeFMError: what `process` returned for this item.
        """
        now = time.perf_counter()
        future: asyncio.Future[Batched[Result]] = asyncio.get_running_loop().create_future()
        self._unanswered.add(future)
        future.add_done_callback(self._unanswered.discard)
        deadline = now + deadline_ms / 1e3 if deadline_ms else None
        await self._queue.put(_Waiting(item, now, deadline, future))
        return await future

    async def _run(self) -> None:
        while True:
            await self._serve(await self._collect())

    async def _collect(self) -> list[_Waiting[Item, Result]]:
        first = await self._queue.get()
        batch, closes = [first], first.arrived + self._max_delay_s
        while len(batch) < self._max_batch:
            if not self._queue.empty():
                batch.append(self._queue.get_nowait())
                continue
            left = closes - time.perf_counter()
            if left <= 0:
                break
            try:
                batch.append(await asyncio.wait_for(self._queue.get(), left))
            except asyncio.TimeoutError:
                break
        return batch

    async def _serve(self, batch: list[_Waiting[Item, Result]]) -> None:
        started = time.perf_counter()
        live = []
        for waiting in batch:
            if waiting.future.done():
                continue
            if waiting.deadline is not None and started > waiting.deadline:
                waited = (started - waiting.arrived) * 1e3
                waiting.future.set_exception(DeadlineError(f"the deadline passed after {waited:.0f} ms in the queue"))
                continue
            live.append(waiting)
        if not live:
            return
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._executor, self._process, [w.item for w in live])
        except Exception as error:  # a failing model must not end the service: every caller of the batch learns of it
            results = [EdgeFMError(f"the model failed: {error}")] * len(live)
        compute_ms = (time.perf_counter() - started) * 1e3
        for waiting, result in zip(live, results, strict=True):
            if waiting.future.done():
                continue
            if isinstance(result, EdgeFMError):
                waiting.future.set_exception(result)
            else:
                queue_ms = (started - waiting.arrived) * 1e3
                waiting.future.set_result(Batched(result, queue_ms, compute_ms, len(live)))
