"""Samples that devices hand over in bulk: labelled by the FM when it has room, and acknowledged once they are kept."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import NoReturn

import grpc

from ..models.checks import check_device_id
from ..models.errors import EdgeFMError, InputError, OverloadedError, StoreError
from ..proto.limits import PUSHBACK_KEY
from ..proto.v1 import edgefm_pb2 as pb
from .environments import Environments, check_propensity
from .health import HealthWatch
from .recognition import FmBatcher, Query
from .tasks import TaskSet
from .wire import Context, detail, new_sample, query_error

log = logging.getLogger("edgefm.cloud.uploads")

MAX_UPLOADS_IN_FLIGHT = 16
UPLOAD_RETRY_MS = 5000
"""When an upload that store or model failed may come again."""


class Uploads:
    """Takes upload streams."""

    def __init__(self, environments: Environments, batcher: FmBatcher, health: HealthWatch) -> None:
        self._environments = environments
        self._batcher = batcher
        self._health = health

    async def take(self, requests: AsyncIterator[pb.UploadRequest], context: Context) -> pb.UploadResponse:
        """One stream; aborts the call when nothing of it could be taken, and says when to come again."""
        acks: dict[int, pb.UploadAck] = {}  # by place in the stream
        postponed: list[EdgeFMError] = []
        room = asyncio.Semaphore(MAX_UPLOADS_IN_FLIGHT)
        peer = context.peer()

        async def take_one(place: int, request: pb.UploadRequest) -> None:
            try:
                acks[place] = await self._keep(request, request.device_id or peer)
            except EdgeFMError as error:  # not the sample's fault
                log.error("event=upload_postponed device=%s reason=%s", request.device_id, error)
                postponed.append(error)
                acks[place] = _postponed_ack(request.upload_id, error)
            finally:
                room.release()

        async with TaskSet() as tasks:
            place = 0
            async for request in requests:
                await room.acquire()
                if postponed:
                    break
                tasks.start(take_one(place, request))
                place += 1
        if postponed and len(postponed) == len(acks):
            await _come_again(context, postponed[0])
        return pb.UploadResponse(acks=[acks[place] for place in sorted(acks)])

    async def _keep(self, request: pb.UploadRequest, owner: str) -> pb.UploadAck:
        """Raises `EdgeFMError` when the sample may be sent again."""
        try:
            check_device_id(request.device_id)
            propensity = request.propensity or 1.0
            check_propensity(propensity)
            self._environments.student(request.environment)
            if "store" in self._health.unhealthy:
                raise StoreError(self._health.unhealthy["store"])  # before the FM has worked for nothing
            pool, _ = self._environments.pool(request.environment)
            batched = await self._batcher.submit(Query(request.image, pool, 1), owner, live=False)
            kept = await self._environments.keep(new_sample(request, batched.result, propensity, durable=True))
            return pb.UploadAck(upload_id=request.upload_id, sha256=kept.sha256, duplicate=kept.duplicate)
        except InputError as error:
            return pb.UploadAck(upload_id=request.upload_id, error=query_error(error))


def _postponed_ack(upload_id: int, error: EdgeFMError) -> pb.UploadAck:
    overloaded = isinstance(error, OverloadedError)
    code = pb.QueryError.CODE_OVERLOADED if overloaded else pb.QueryError.CODE_INTERNAL
    told = pb.QueryError(code=code, message=str(error), retry_after_ms=_retry_ms(error))
    return pb.UploadAck(upload_id=upload_id, error=told)


def _retry_ms(error: EdgeFMError) -> int:
    return error.retry_after_ms if isinstance(error, OverloadedError) else UPLOAD_RETRY_MS


async def _come_again(context: Context, error: EdgeFMError) -> NoReturn:
    """Nothing was taken; the trailing metadata says when to come again."""
    context.set_trailing_metadata(((PUSHBACK_KEY, str(_retry_ms(error))),))
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, detail(error))
