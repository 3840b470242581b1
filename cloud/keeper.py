"""Keeps samples from the event loop: what comes while the disk is busy shares the next transaction."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..models.errors import StoreError
from .store import Kept, NewSample
from .store_repair import open_store

_DAY_S = 86_400.0
_MAX_PENDING = 1024
_DISK_PATIENCE_S = 30.0


class Keeper:
    """The sample store with a thread of its own; call it from the event loop only.

    Attributes:
        outcomes: samples `kept`, `duplicate` and `failed` since the start.
        failure: why the store cannot be written to; None while it can.
    """

    def __init__(self, root: Path, quota_bytes: int, retention_days: float, on_kept: Callable[[str], None]) -> None:
        self._root = root
        self._quota_bytes = quota_bytes
        self._retention_days = retention_days
        self._on_kept = on_kept
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._pending: list[tuple[NewSample, asyncio.Future[Kept]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._labelled: dict[str, int] = {}
        self.outcomes: Counter[str] = Counter()
        self.failure: str | None = None

    async def start(self) -> None:
        """Opens and repairs the store. Raises `StoreError`."""
        loop = asyncio.get_running_loop()
        self.store, _ = await loop.run_in_executor(self._thread, open_store, self._root, self._quota_bytes)
        self._labelled = self.store.labelled()

    async def close(self) -> None:
        if self._writer is not None:
            await self._writer
        self._thread.shutdown()
        if hasattr(self, "store"):
            self.store.close()

    def labelled(self, environment: str) -> int:
        """Samples of the environment ever labelled by the FM and kept."""
        return self._labelled.get(environment, 0)

    async def keep(self, sample: NewSample) -> Kept:
        """Raises `StoreError`, also for those that shared the transaction. A sample stays when its caller goes away."""
        if len(self._pending) >= _MAX_PENDING:
            self.outcomes["failed"] += 1
            raise StoreError(f"{_MAX_PENDING} samples wait for the disk, and no more may")
        future: asyncio.Future[Kept] = asyncio.get_running_loop().create_future()
        self._pending.append((sample, future))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write(), name="keeper")
        return await future

    async def count(self, environment: str, since: float) -> int:
        """Stored samples received at `since` (Unix seconds) or later."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.store.count, environment, since)

    async def check(self) -> None:
        """A real write, and what retention removes; sets `failure`."""
        loop = asyncio.get_running_loop()
        try:
            await asyncio.wait_for(loop.run_in_executor(self._thread, self._check), _DISK_PATIENCE_S)
            self.failure = None
        except StoreError as error:
            self.failure = str(error)
        except asyncio.TimeoutError:
            self.failure = f"the disk has not answered for {_DISK_PATIENCE_S:.0f} s"

    def _check(self) -> None:
        self.store.probe()
        if self._retention_days:
            self.store.purge(self.store.clock.now_s() - self._retention_days * _DAY_S)

    async def _write(self) -> None:
        try:
            while self._pending:
                group, self._pending = self._pending, []
                await self._add(group)
        finally:
            self._writer = None

    async def _add(self, group: list[tuple[NewSample, asyncio.Future[Kept]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._thread, self.store.add, [sample for sample, _ in group])
        except StoreError as error:
            self.failure = str(error)
            self.outcomes["failed"] += len(group)
            for _, future in group:
                if not future.done():
                    future.set_exception(error)
            return
        for (sample, future), kept in zip(group, results, strict=True):
            self.outcomes["duplicate" if kept.duplicate else "kept"] += 1
            if not kept.duplicate:
                self._labelled[sample.environment] = self.labelled(sample.environment) + 1
                self._on_kept(sample.environment)
            if not future.done():
                future.set_result(kept)
