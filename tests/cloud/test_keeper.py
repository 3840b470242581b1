"""The keeper: who is told what of a sample, and what the disk's state is said to be."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
from edgefm.cloud.keeper import Keeper
from edgefm.cloud.store import Labelled, NewSample
from edgefm.models.errors import StoreError

SAID = Labelled(np.eye(1, 16, dtype=np.float32)[0], "cat", 0.5, "pool")


def sample(number: int, environment: str = "yard") -> NewSample:
    return NewSample(environment, f"image {number}".encode(), SAID, 1.0, "device")


def run(folder: Path, work: Callable[[Keeper, list[str]], Awaitable[None]], retention_days: float = 0.0) -> None:
    async def all_of_it() -> None:
        told: list[str] = []
        keeper = Keeper(folder, 0, retention_days, told.append)
        try:
            await keeper.start()
            await asyncio.wait_for(work(keeper, told), 30)
        finally:
            await keeper.close()

    asyncio.run(all_of_it())


def test_everybody_hears_of_their_own_sample(tmp_path: Path):
    async def work(keeper: Keeper, told: list[str]) -> None:
        kept = await asyncio.gather(*(keeper.keep(sample(number % 150)) for number in range(200)))
        assert [one.duplicate for one in kept] == [False] * 150 + [True] * 50
        assert len({one.sha256 for one in kept}) == 150
        assert told == ["yard"] * 150 and keeper.labelled("yard") == 150 == keeper.store.count("yard")
        assert keeper.outcomes == {"kept": 150, "duplicate": 50}

    run(tmp_path, work)


def test_a_sample_stays_when_its_sender_goes(tmp_path: Path):
    async def work(keeper: Keeper, told: list[str]) -> None:
        going = [asyncio.create_task(keeper.keep(sample(number))) for number in range(10)]
        await asyncio.sleep(0)
        for task in going:
            task.cancel()
        await keeper.keep(sample(10))
        assert keeper.labelled("yard") == 11 == len(told)

    run(tmp_path, work)


def test_a_full_disk_is_told_and_forgotten_once_it_is_over(tmp_path: Path, full_disk):
    async def work(keeper: Keeper, told: list[str]) -> None:
        with full_disk():
            results = await asyncio.gather(*(keeper.keep(sample(n)) for n in range(5)), return_exceptions=True)
            assert all(isinstance(result, StoreError) for result in results) and told == []
            assert keeper.failure is not None and "free space" in keeper.failure
            await keeper.check()
            assert keeper.failure is not None
        assert keeper.outcomes == {"failed": 5} and keeper.labelled("yard") == 0
        await keeper.check()
        assert keeper.failure is None
        await keeper.keep(sample(0))

    run(tmp_path, work)


def test_what_waits_for_a_slow_disk_is_bounded(tmp_path: Path):
    async def work(keeper: Keeper, told: list[str]) -> None:
        results = await asyncio.gather(*(keeper.keep(sample(number)) for number in range(1100)), return_exceptions=True)
        refused = [result for result in results if isinstance(result, StoreError)]
        assert len(refused) == 1100 - 1024 and "wait for the disk" in str(refused[0])
        assert keeper.labelled("yard") == 1024 and keeper.failure is None

    run(tmp_path, work)


def test_retention_removes_what_is_older(tmp_path: Path):
    async def work(keeper: Keeper, told: list[str]) -> None:
        for number in range(4):
            await keeper.keep(sample(number))
        with sqlite3.connect(tmp_path / "samples.db") as db:
            oldest = "SELECT sha256 FROM samples ORDER BY received_at LIMIT 2"
            db.execute(f"UPDATE samples SET received_at = received_at - 3 * 86400 WHERE sha256 IN ({oldest})")
        db.close()
        await keeper.check()
        assert keeper.store.count("yard") == 2 and keeper.labelled("yard") == 4

    run(tmp_path, work, retention_days=2.0)
