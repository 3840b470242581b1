"""Dynamic batching: single requests in, full batches to the model, each result back to its caller."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..models.errors import DeadlineError, EdgeFMError, OverloadedError
from .fair_queue import FairQueue

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")

log = logging.getLogger("edgefm.cloud.batcher")
_FIRST_RETRY_MS = 1000
"""The hint before any batch has been measured."""
_RETRY_MS = (10, 60_000)
_FORGET = 0.2
"""Weight of the latest batch in the measured service time."""
_CLOSE_PATIENCE_S = 2.0
"""How long closing waits for the batch that the model is at."""


@dataclass(frozen=True)
class Batched(Generic[Result]):
    """A result and what it cost. `queue_ms + compute_ms` is all the time from `submit` to the result."""

    result: Result
    queue_ms: float
    compute_ms: float  # preparation and model, of the batch
    batch_size: int


@dataclass(eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    owner: str
    arrived: float
    deadline: float | None
    future: asyncio.Future[Batched[Result]]
    queue: FairQueue[_Waiting[Item, Result]] | None  # None once it has left its queue
    timer: asyncio.TimerHandle | None = None

    def leave_queue(self) -> None:
        if self.queue is not None:
            self.queue.remove(self.owner, self)
            self.queue = None

    def fail(self, error: EdgeFMError) -> None:
        self.leave_queue()
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(frozen=True)
class _Batch(Generic[Item, Prepared, Result]):
    members: list[tuple[_Waiting[Item, Result], Prepared]]
    prepare_s: float


class _ModelThread(Generic[Prepared, Result]):
    """One thread for one model. A daemon: the process would wait for an executor's thread, and a model may hang."""

    def __init__(self, process: Callable[[Sequence[Prepared]], Sequence[Result]]) -> None:
        self._process = process
        self._jobs: queue.SimpleQueue[tuple[Sequence[Prepared], Future[Sequence[Result]]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fm", daemon=True)
        self._thread.start()

    def submit(self, batch: Sequence[Prepared]) -> Future[Sequence[Result]]:
        future: Future[Sequence[Result]] = Future()
        self._jobs.put((batch, future))
        return future

    def close(self, patience_s: float) -> bool:
        """Blocks for `patience_s` at most; returns whether the thread has ended."""
        self._jobs.put(None)
        self._thread.join(patience_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            batch, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._process(batch))
            except BaseException as error:
                future.set_exception(error)


class DynamicBatcher(Generic[Item, Prepared, Result]):
    """Runs `process` on up to `max_batch` items, waiting at most `max_delay_ms` for a batch to fill; after a batch of one,
    whoever comes while the model is idle does not wait: there has been nobody to wait for.

    `prepare` makes one item ready (decodes and preprocesses an image) and raises the `EdgeFMError` that this item alone
    gets. `process` runs in a thread of its own, one batch at a time. While it runs, the next batch is prepared beside it,
    but only when that batch is full: a smaller one stays open for company until the model is free.

    At most `max_queue` items wait. Owners (devices) are served in turn. Bulk items (uploads) get the places of a batch
    that live ones leave free. When the queue is full, whoever occupies most of it gives way: bulk before live, then the
    newest item of the owner with the most, which may be the one that just came. It gets an `OverloadedError`.
    Items past their deadline or whose caller has gone free their place at once and are not computed.

    When the model takes longer than `patience_s` for a batch, its callers get an error; the next batch starts once the
    model is done with it.

    Attributes:
        on_batch: called with the size and seconds of each computed batch and the model's error, if it failed.
    """

    def __init__(
        self,
        prepare: Callable[[Item], Prepared],
        process: Callable[[Sequence[Prepared]], Sequence[Result]],
        max_batch: int = 16,
        max_delay_ms: float = 5.0,
        max_queue: int = 1024,
        patience_s: float = 60.0,
    ) -> None:
        self._prepare = prepare
        self.patience_s = patience_s
        self._max_batch = max_batch
        self._max_delay_s = max_delay_ms / 1e3
        self._max_queue = max_queue
        self._live: FairQueue[_Waiting[Item, Result]] = FairQueue()
        self._bulk: FairQueue[_Waiting[Item, Result]] = FairQueue()
        self._due = 0.0  # when the batch being collected closes
        self._company = True  # whether waiting for some is worth it: the batch before had more than one item
        self._changed = asyncio.Event()
        self._taken: set[_Waiting[Item, Result]] = set()  # being prepared or computed
        self._workers = min(os.cpu_count() or 1, 8)
        self._prepare_pool = ThreadPoolExecutor(self._workers, thread_name_prefix="prepare")
        self._model_thread = _ModelThread(process)
        self._task: asyncio.Task[None] | None = None
        self._computing: asyncio.Task[None] | None = None
        self._computing_since: float | None = None
        self._last_done = 0.0
        self._item_s: float | None = None
        self.on_batch: Callable[[int, float, EdgeFMError | None], None] = lambda size, seconds, error: None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="batcher")

    async def close(self) -> None:
        """Stops; whoever still waits gets a `CancelledError`. A model that hangs is left behind after two seconds."""
        tasks = [task for task in (self._task, self._computing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._waiting:
            self._taken.add(self._pop())
        for waiting in self._taken:
            waiting.future.cancel()
        self._prepare_pool.shutdown(cancel_futures=True)
        ended = await asyncio.to_thread(self._model_thread.close, _CLOSE_PATIENCE_S)
        if not ended:
            log.error(
                "event=model_left_behind reason=%s", f"it has not finished a batch within {_CLOSE_PATIENCE_S:g} s"
            )

    @property
    def waiting(self) -> tuple[int, int]:
        """Live and bulk items in the queue."""
        return len(self._live), len(self._bulk)

    @property
    def computing_s(self) -> float:
        """How long the model has been at the batch it is at; 0 when it is idle."""
        return 0.0 if self._computing_since is None else time.perf_counter() - self._computing_since

    async def submit(self, item: Item, owner: str = "", deadline_ms: float = 0, live: bool = True) -> Batched[Result]:
        """Waits for the item's result.

        Args:
            owner: who shares the model with the other owners.
            deadline_ms: from now; past it the item is not computed. 0: none.
            live: somebody waits for the answer; False for bulk.

        Raises:
            DeadlineError: the deadline passed in the queue.
            OverloadedError: the queue is full.
            EdgeFMError: what `prepare` raised for this item, or the model failed.
        """
        if self._waiting >= self._max_queue:
            self._make_room(owner, live)
        loop, now = asyncio.get_running_loop(), time.perf_counter()
        queue = self._live if live else self._bulk
        deadline = now + deadline_ms / 1e3 if deadline_ms else None
        waiting: _Waiting[Item, Result] = _Waiting(item, owner, now, deadline, loop.create_future(), queue)
        if deadline_ms:
            waiting.timer = loop.call_later(deadline_ms / 1e3, self._expire, waiting)
        if not self._waiting:
            self._due = now + (self._max_delay_s if self._company else 0.0)
            self._changed.set()
        queue.push(owner, waiting)
        if self._waiting == self._max_batch:
            self._changed.set()
        try:
            return await waiting.future
        finally:
            waiting.leave_queue()  # it is still there when the caller has gone
            if waiting.timer is not None:
                waiting.timer.cancel()

    # ---- the queue

    @property
    def _waiting(self) -> int:
        return len(self._live) + len(self._bulk)

    def _pop(self) -> _Waiting[Item, Result]:
        waiting = (self._live or self._bulk).pop()
        waiting.queue = None
        return waiting

    def _make_room(self, owner: str, live: bool) -> None:
        """Evicts an item, or raises `OverloadedError` when the new one is what gives way."""
        outranks = live and len(self._bulk) > 0
        queue = self._bulk if outranks or not live else self._live
        heaviest, most = queue.heaviest()
        if not outranks and most <= queue.waiting(owner) + 1:
            raise self._overloaded()
        queue.newest(heaviest).fail(self._overloaded())

    def _overloaded(self) -> OverloadedError:
        ahead = self._waiting + len(self._taken)
        estimated_ms = _FIRST_RETRY_MS if self._item_s is None else round(ahead * self._item_s * 1e3)
        retry_ms = min(max(estimated_ms, _RETRY_MS[0]), _RETRY_MS[1])
        return OverloadedError(f"{self._waiting} samples wait, and no more may; ask again in {retry_ms} ms", retry_ms)

    def _expire(self, waiting: _Waiting[Item, Result]) -> None:
        waited = (time.perf_counter() - waiting.arrived) * 1e3
        waiting.fail(DeadlineError(f"the deadline passed after {waited:.0f} ms in the queue"))

    # ---- batches

    async def _run(self) -> None:
        while True:
            await self._collect()
            batch = await self._prepare_batch([self._pop() for _ in range(min(self._waiting, self._max_batch))])
            if self._computing is not None:
                await self._computing
            self._computing = asyncio.create_task(self._compute(batch), name="fm")

    async def _collect(self) -> None:
        """Until a batch is full, or something is due and the model is free for it."""
        while self._waiting < self._max_batch:
            idle = self._computing is None or self._computing.done()
            left = self._due - time.perf_counter() if self._waiting and idle else None
            if left is not None and left <= 0:
                break
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except asyncio.TimeoutError:
                continue

    async def _prepare_batch(self, taken: list[_Waiting[Item, Result]]) -> _Batch[Item, Prepared, Result]:
        self._due = 0.0  # what is left has waited already
        self._company = len(taken) > 1
        self._taken.update(taken)
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        share = -(-len(taken) // self._workers)
        parts = [taken[start : start + share] for start in range(0, len(taken), share)]
        jobs = [loop.run_in_executor(self._prepare_pool, self._prepare_each, [w.item for w in part]) for part in parts]
        members = []
        for waiting, prepared in zip(taken, [one for part in await asyncio.gather(*jobs) for one in part], strict=True):
            if isinstance(prepared, EdgeFMError):
                self._taken.discard(waiting)
                waiting.fail(prepared)
            else:
                members.append((waiting, prepared))
        return _Batch(members, time.perf_counter() - started)

    def _prepare_each(self, items: Sequence[Item]) -> list[Prepared | EdgeFMError]:
        prepared: list[Prepared | EdgeFMError] = []
        for item in items:
            try:
                prepared.append(self._prepare(item))
            except EdgeFMError as error:
                prepared.append(error)
            except Exception as error:  # the item's own affair all the same, whatever its decoder met
                prepared.append(EdgeFMError(f"cannot prepare a sample: {error}"))
        return prepared

    async def _compute(self, batch: _Batch[Item, Prepared, Result]) -> None:
        started = time.perf_counter()
        live = []
        for waiting, prepared in batch.members:
            if waiting.deadline is not None and started > waiting.deadline:
                self._expire(waiting)
            if waiting.future.done():
                self._taken.discard(waiting)
            else:
                live.append((waiting, prepared))
                if waiting.timer is not None:
                    waiting.timer.cancel()  # what is being computed is answered
        if live:
            await self._compute_live(live, started, batch.prepare_s)
        self._changed.set()

    async def _compute_live(
        self, live: list[tuple[_Waiting[Item, Result], Prepared]], started: float, prepare_s: float
    ) -> None:
        error: EdgeFMError | None = None
        results: Sequence[Result] = ()
        self._computing_since = started
        hangs = asyncio.get_running_loop().call_later(self.patience_s, self._give_up, [waiting for waiting, _ in live])
        try:
            results = await asyncio.wrap_future(self._model_thread.submit([prepared for _, prepared in live]))
            if len(results) != len(live):
                raise ValueError(f"{len(results)} results for {len(live)} samples")
        except Exception as failure:  # a failing model must not end the service: every caller of the batch learns of it
            error = EdgeFMError(f"the model failed: {failure}")
        finally:
            hangs.cancel()
        self._computing_since = None
        done = time.perf_counter()
        self._measure(len(live), done - max(started - prepare_s, self._last_done))
        self._last_done = done
        compute_ms = (prepare_s + done - started) * 1e3
        for index, (waiting, _) in enumerate(live):
            self._taken.discard(waiting)
            if error is not None:
                waiting.fail(error)
            elif not waiting.future.done():
                queue_ms = (done - waiting.arrived) * 1e3 - compute_ms
                waiting.future.set_result(Batched(results[index], queue_ms, compute_ms, len(live)))
        self.on_batch(len(live), done - started, error)

    def _give_up(self, members: list[_Waiting[Item, Result]]) -> None:
        for waiting in members:
            waiting.fail(EdgeFMError(f"the model has been at this batch for more than {self.patience_s:g} s"))

    def _measure(self, items: int, seconds: float) -> None:
        latest = seconds / items
        self._item_s = latest if self._item_s is None else self._item_s + _FORGET * (latest - self._item_s)
