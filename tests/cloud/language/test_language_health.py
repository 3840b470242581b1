"""Health of a language model that fails: told apart from recognition, and asked again until it works."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from edgefm.cloud.batcher import DynamicBatcher
from edgefm.cloud.health import HealthWatch
from edgefm.cloud.keeper import Keeper
from edgefm.cloud.language.engine import LanguageEngine
from edgefm.models.errors import ModelError
from edgefm.models.language.generate import Sampling
from grpc_health.v1 import health_pb2

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def test_recognition_serves_on_while_the_language_model_fails(run, machine, tmp_path: Path):
    broken, statuses, read = True, {}, machine.read

    def failing(generation, count):
        if broken:
            raise RuntimeError("out of memory")
        return read(generation, count)

    machine.read = failing

    async def set_status(name: str, status: Any) -> None:
        statuses[name] = status

    async def becomes(**expected: int) -> None:
        while any(statuses[name] != status for name, status in expected.items()):
            await asyncio.sleep(0.01)

    async def work(engine: LanguageEngine) -> None:
        nonlocal broken
        keeper = Keeper(tmp_path, 0, 0.0, lambda environment: None)
        await keeper.start()
        batcher: Any = DynamicBatcher(lambda item: item, lambda items: items, 4, 0)
        batcher.start()
        asked = HealthWatch(
            ("all",), set_status, keeper, batcher, lambda: batcher.submit(object()), 0.05, engine, ("words",)
        )
        await asked.start()
        assert statuses == dict.fromkeys(("all", "words", "fm", "store", "language"), SERVING)
        with pytest.raises(ModelError, match="out of memory"):
            async for _ in engine.generate([{"role": "user", "content": "A fruit?"}], Sampling(3), "generate"):
                pass
        await becomes(words=NOT_SERVING, language=NOT_SERVING, all=SERVING, fm=SERVING)
        assert "out of memory" in asked.unhealthy["language"]
        broken = False
        await becomes(words=SERVING, language=SERVING)
        await asked.close()
        await batcher.close()
        await keeper.close()

    run(work)
