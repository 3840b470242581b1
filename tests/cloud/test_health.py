"""Health: what a client of the standard service is told while the FM hangs or fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from edgefm.cloud.batcher import DynamicBatcher
from edgefm.cloud.health import HealthWatch
from edgefm.cloud.keeper import Keeper
from edgefm.models.errors import EdgeFMError, ModelError
from grpc_health.v1 import health_pb2


@pytest.mark.parametrize("trouble", ["hangs", "fails"])
def test_a_model_that_does_not_answer_is_not_serving(tmp_path: Path, trouble: str):
    """A real batcher and a real store; the model waits at a gate or raises."""
    gate, failing = threading.Event(), threading.Event()
    statuses: dict[str, int] = {}

    def process(items: Sequence[object]) -> Sequence[object]:
        assert gate.wait(20)
        if failing.is_set():
            raise RuntimeError("out of memory")
        return items

    async def set_status(name: str, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        statuses[name] = status

    async def becomes(**expected: int) -> None:
        while any(statuses[name] != status for name, status in expected.items()):
            await asyncio.sleep(0.01)

    async def work(keeper: Keeper) -> None:
        batcher: Any = DynamicBatcher(lambda item: item, process, 4, 0, patience_s=0.2)
        batcher.start()
        canary = object()
        health = HealthWatch(("all",), set_status, keeper, batcher, lambda: batcher.submit(canary), 0.05)
        batcher.on_batch = lambda size, seconds, error: health.batch_computed(error)
        failing.set()
        gate.set()
        with pytest.raises(ModelError, match="out of memory"):
            await health.start()
        failing.clear()
        await health.start()
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        assert statuses == {"all": serving, "fm": serving, "store": serving}
        if trouble == "hangs":
            gate.clear()
        else:
            failing.set()
        asked = asyncio.create_task(batcher.submit(object()))
        await becomes(all=not_serving, fm=not_serving, store=serving)
        assert ("has been at one batch" if trouble == "hangs" else "out of memory") in health.unhealthy["fm"]
        failing.clear()
        gate.set()
        await becomes(all=serving, fm=serving, store=serving)
        with pytest.raises(EdgeFMError):
            await asked
        await health.close()
        await batcher.close()

    async def all_of_it() -> None:
        keeper = Keeper(tmp_path, 0, 0.0, lambda environment: None)
        await keeper.start()
        try:
            await asyncio.wait_for(work(keeper), 30)
        finally:
            gate.set()
            await keeper.close()

    asyncio.run(all_of_it())
