"""The standard health service, kept true: the FM answers, the store can be written to, and the language model, if any, works."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from grpc_health.v1 import health_pb2

from ..models.errors import EdgeFMError, ModelError, OverloadedError
from .keeper import Keeper
from .recognition import FmBatcher

if TYPE_CHECKING:
    from .language.engine import LanguageEngine

log = logging.getLogger("edgefm.cloud.health")
_CANARY_PATIENCE_S = 10.0
_STEP_PATIENCE_S = 60.0
_RECOGNITION = ("fm", "store")

SetStatus = Callable[[str, "health_pb2.HealthCheckResponse.ServingStatus"], Awaitable[None]]


class HealthWatch:
    """Checks every `period_s` and sets the status of `names`, and of the parts: `fm`, `store` and `language`.

    The store is written to each time. The FM is known by the batches it computes; after one that failed, a canary asks
    it again until it answers. A batch that takes longer than the batcher's `patience_s` counts as hanging. The language model
    is known by its steps, and asked again likewise; recognition does not need it.

    Args:
        names: of services that need the FM and the store.
        language: None: the cloud has no language model. `language_names`: of services that need it.

    Attributes:
        unhealthy: what is wrong, by part.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        set_status: SetStatus,
        keeper: Keeper,
        batcher: FmBatcher,
        canary: Callable[[], Awaitable[object]],
        period_s: float,
        language: LanguageEngine | None = None,
        language_names: tuple[str, ...] = (),
    ) -> None:
        self._needs = dict.fromkeys(names, _RECOGNITION) | dict.fromkeys(language_names, ("language",))
        self._language = language
        self._set_status = set_status
        self._keeper = keeper
        self._batcher = batcher
        self._canary = canary
        self._period_s = period_s
        self._fm_failure: str | None = None
        self._task: asyncio.Task[None] | None = None
        self.unhealthy: dict[str, str] = {}

    async def start(self) -> None:
        """Raises `ModelError` when the FM does not answer."""
        try:
            await self._canary()
        except EdgeFMError as error:
            raise ModelError(f"the foundation model does not answer: {error}") from error
        await self._check(first=True)
        self._task = asyncio.create_task(self._run(), name="health")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def batch_computed(self, error: EdgeFMError | None) -> None:
        self._fm_failure = None if error is None else str(error)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            await self._check()

    async def _check(self, first: bool = False) -> None:
        await self._keeper.check()
        await self._publish({"store": self._keeper.failure, "fm": await self._fm()}, first)
        if self._language is not None:  # apart: it may take its time to answer
            await self._publish({"language": await self._language_failure(self._language)}, first)

    async def _publish(self, found: Mapping[str, str | None], first: bool) -> None:
        unhealthy = {part: reason for part, reason in self.unhealthy.items() if part not in found}
        unhealthy |= {part: reason for part, reason in found.items() if reason is not None}
        for part in found:
            if part in unhealthy and part not in self.unhealthy:
                log.error("event=unhealthy part=%s reason=%s", part, unhealthy[part])
            elif part not in unhealthy and part in self.unhealthy:
                log.warning("event=healthy_again part=%s", part)
        changed = first or unhealthy.keys() != self.unhealthy.keys()
        self.unhealthy = unhealthy
        if changed:
            for part in found:
                await self._set_status(part, _status(part not in unhealthy))
            for name, needed in self._needs.items():
                if not found.keys().isdisjoint(needed):
                    await self._set_status(name, _status(unhealthy.keys().isdisjoint(needed)))

    async def _fm(self) -> str | None:
        if self._batcher.computing_s > self._batcher.patience_s:
            return f"the model has been at one batch for {self._batcher.computing_s:.0f} s"
        if self._fm_failure is not None:
            try:
                await asyncio.wait_for(self._canary(), _CANARY_PATIENCE_S)
            except OverloadedError:
                pass  # it has work; the next batch will tell
            except (EdgeFMError, asyncio.TimeoutError) as error:
                self._fm_failure = str(error) or "the canary got no answer"
        return self._fm_failure

    async def _language_failure(self, engine: LanguageEngine) -> str | None:
        if engine.stepping_s > _STEP_PATIENCE_S:
            return f"the model has been at one step for {engine.stepping_s:.0f} s"
        if engine.failure is not None:
            with contextlib.suppress(EdgeFMError, asyncio.TimeoutError):  # what it says is in `failure`
                await asyncio.wait_for(engine.try_again(), _CANARY_PATIENCE_S)
        return engine.failure


def _status(serving: bool) -> health_pb2.HealthCheckResponse.ServingStatus:
    response = health_pb2.HealthCheckResponse
    return response.SERVING if serving else response.NOT_SERVING
