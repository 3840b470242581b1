"""The gRPC service: translation between the wire and `Environments`, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict, deque
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import numpy as np

from ..models.checks import check_device_id
from ..models.errors import EdgeFMError, InputError, StoreError
from ..models.pool import LabelPool
from ..proto.limits import (
    FETCH_CHUNK_BYTES,
    MAX_IMAGE_BYTES,
    MAX_NAME_LENGTH,
    MAX_REFUSALS_PER_CALL,
    PROTOCOL_VERSION,
)
from ..proto.v1 import edgefm_pb2 as pb
from .drift import Observation
from .environments import Environments, check_propensity
from .health import HealthWatch
from .label_service import LabelService
from .metrics import CloudMetrics
from .recent import RecentAnswers
from .recognition import FmBatcher, Query, Recognised
from .status import environment_status
from .tasks import TaskSet
from .uploads import Uploads
from .wire import Context, abort, check_count, new_sample, pool_version, query_error, student_message, translated

log = logging.getLogger("edgefm.cloud.service")

MAX_IN_FLIGHT = 64
"""Unanswered requests of one Recognize stream; past it the stream is read no further (flow control)."""
DEFAULT_TOP_K = 5
KEEP_PATIENCE_S = 0.5
"""How long an answer waits for its sample to be stored; after that it goes without."""
REFUSALS = 20
"""Remembered of each environment, for an operator."""
_REASON_LENGTH = 1000
"""Characters that are remembered of why a device refused."""


class EdgeFMService(LabelService):
    """See `proto/v1/edgefm.proto` for what each call promises."""

    def __init__(
        self,
        environments: Environments,
        batcher: FmBatcher,
        health: HealthWatch,
        metrics: CloudMetrics,
        recent: RecentAnswers,
    ) -> None:
        super().__init__(environments)
        self._batcher = batcher
        self._health = health
        self._metrics = metrics
        self._recent = recent
        self._uploads = Uploads(environments, batcher, health)
        self._refusals: defaultdict[str, deque[pb.ReportedRefusal]] = defaultdict(lambda: deque(maxlen=REFUSALS))

    async def Register(self, request: pb.RegisterRequest, context: Context) -> pb.RegisterResponse:  # noqa: N802
        if request.protocol != PROTOCOL_VERSION:
            older = "the device" if request.protocol < PROTOCOL_VERSION else "the cloud"
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the device speaks protocol {request.protocol}, the cloud {PROTOCOL_VERSION}: "
                f"upgrade edgefm on {older}",
            )
        await check_count(request.labels, context)
        await _check_device(request.device_id, context)
        register = self._environments.register(request.environment, request.labels, request.student_profile)
        warnings = await translated(register, context)
        pool, ref = self._environments.pool(request.environment)
        log.info("event=device device=%s environment=%s", request.device_id, request.environment)
        return pb.RegisterResponse(
            student=student_message(self._environments.student(request.environment)),
            pool=pool_version(pool, ref),
            foundation_model=self._environments.model.name,
            max_image_bytes=MAX_IMAGE_BYTES,
            warnings=warnings,
        )

    async def Recognize(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.RecognizeRequest], context: Context
    ) -> AsyncIterator[pb.RecognizeResponse]:
        # Answers leave in the order they are ready, so a task each; the semaphore bounds what one stream may occupy.
        answers: asyncio.Queue[pb.RecognizeResponse | None] = asyncio.Queue()
        room = asyncio.Semaphore(MAX_IN_FLIGHT)

        peer = context.peer()

        async def answer(request: pb.RecognizeRequest) -> None:
            try:
                response = await self._recognize(request, request.device_id or peer)
                self._metrics.answered(response)
                answers.put_nowait(response)
            finally:
                room.release()

        async def read() -> None:
            try:
                async with TaskSet() as tasks:
                    async for request in request_iterator:
                        await room.acquire()
                        tasks.start(answer(request))
            finally:
                answers.put_nowait(None)

        reader = asyncio.create_task(read(), name="recognize-reader")
        try:
            while (response := await answers.get()) is not None:
                yield response
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.RpcError):
                await reader

    async def _recognize(self, request: pb.RecognizeRequest, owner: str) -> pb.RecognizeResponse:
        try:
            pool, _ = self._environments.pool(request.environment)
            check_device_id(request.device_id)
            propensity = request.propensity or 1.0
            query_propensity = request.query_propensity or propensity
            check_propensity(propensity)
            check_propensity(query_propensity)
            if request.keep:
                self._environments.student(request.environment)  # samples of the base have no place
            query = Query(request.image, pool, request.top_k or DEFAULT_TOP_K)
            batched = await self._batcher.submit(query, owner, request.deadline_ms)
        except EdgeFMError as error:
            return pb.RecognizeResponse(query_id=request.query_id, error=query_error(error))
        found = batched.result
        if request.keep or request.edge_label:  # a device's own; not one that only scores or is ranked
            self._recent.add(request.environment, found.label)
        if request.edge_label:
            agrees = request.edge_label == found.label
            observation = Observation(request.edge_margin, agrees, query_propensity, self._environments.now_s())
            if request.edge_pool_version == pool.version:
                self._environments.observe(request.environment, request.student_version, pool.version, observation)
        if request.keep:
            await self._keep(request, found, propensity)
        return pb.RecognizeResponse(
            query_id=request.query_id,
            matches=[
                pb.Match(label=pool.labels[index], similarity=similarity)
                for index, similarity in zip(found.indices.tolist(), found.similarities.tolist(), strict=True)
            ],
            unknown=found.unknown,
            margin=found.margin,
            queue_ms=batched.queue_ms,
            compute_ms=batched.compute_ms,
            batch_size=batched.batch_size,
            pool_version=pool.version,
            samples_labelled=self._environments.samples_labelled(request.environment),
            edge_similarity=_similarity(pool, batched.result.embedding, request.edge_label),
        )

    async def _keep(self, request: pb.RecognizeRequest, found: Recognised, propensity: float) -> None:
        """The answer does not depend on it: a disk that is full or hangs costs the sample, not the answer."""
        with contextlib.suppress(StoreError, asyncio.TimeoutError):  # counted, logged and shown by health
            kept = self._environments.keep(new_sample(request, found, propensity, durable=False))
            await asyncio.wait_for(kept, KEEP_PATIENCE_S)

    async def Upload(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.UploadRequest], context: Context
    ) -> pb.UploadResponse:
        return await self._uploads.take(request_iterator, context)

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchEvent]:  # noqa: N802
        changed = self._environments.watch(request.environment)
        try:
            sent_student, sent_pool = None, None
            while True:
                changed.clear()
                try:
                    pool, ref = self._environments.pool(request.environment)
                    student = self._environments.student(request.environment)
                except InputError as error:
                    await abort(context, error)
                # The pool first: a student that learned a label is of use only with it.
                if ref.sha256 != sent_pool:
                    sent_pool = ref.sha256
                    yield pb.WatchEvent(pool=pool_version(pool, ref))
                if student.version != sent_student:
                    sent_student = student.version
                    yield pb.WatchEvent(student=student_message(student))
                await changed.wait()
        finally:
            self._environments.unwatch(request.environment, changed)

    async def Fetch(self, request: pb.FetchRequest, context: Context) -> AsyncIterator[pb.FetchChunk]:  # noqa: N802
        try:
            path = self._environments.registry.blob_path(request.sha256)
        except InputError as error:
            await abort(context, error)
        if not path.is_file():
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no blob {request.sha256}")
        total = path.stat().st_size
        if request.offset_bytes > total:
            await context.abort(
                grpc.StatusCode.OUT_OF_RANGE, f"offset {request.offset_bytes} is past the blob's {total} bytes"
            )
        offset = request.offset_bytes
        with path.open("rb") as file:
            file.seek(offset)
            while data := file.read(FETCH_CHUNK_BYTES):
                yield pb.FetchChunk(data=data, offset_bytes=offset, total_bytes=total, sha256=request.sha256)
                offset += len(data)

    async def Rollback(self, request: pb.RollbackRequest, context: Context) -> pb.StudentVersion:  # noqa: N802
        version = request.version if request.HasField("version") else None
        change = self._environments.rollback(request.environment, version)
        return student_message(await translated(change, context))

    async def Report(self, request: pb.ReportRequest, context: Context) -> pb.ReportResponse:  # noqa: N802
        try:
            check_device_id(request.device_id)
            self._environments.student(request.environment)
        except InputError as error:
            await abort(context, error)
        if len(request.refusals) > MAX_REFUSALS_PER_CALL:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"{len(request.refusals)} refusals in one call; at most {MAX_REFUSALS_PER_CALL}",
            )
        heard = self._refusals[request.environment]
        for refusal in request.refusals:
            refusal.reason = refusal.reason[:_REASON_LENGTH]
            if refusal.WhichOneof("what") == "pool_version":
                refusal.pool_version = refusal.pool_version[:MAX_NAME_LENGTH]
            reported = pb.ReportedRefusal(device_id=request.device_id, refusal=refusal)
            if reported in heard:  # a device repeats what it has seen no answer to
                continue
            heard.append(reported)
            kind = refusal.kind if refusal.kind in pb.Refusal.Kind.values() else pb.Refusal.KIND_UNSPECIFIED
            log.warning(
                "event=refused_by_device device=%s environment=%s what=%s kind=%s reason=%s",
                request.device_id,
                request.environment,
                refusal.student_version if refusal.WhichOneof("what") == "student_version" else refusal.pool_version,
                pb.Refusal.Kind.Name(kind),
                refusal.reason,
            )
            self._metrics.refused(pb.Refusal.Kind.Name(kind))
        return pb.ReportResponse()

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:  # noqa: N802
        environments = self._environments
        try:
            if request.environment:
                environments.student(request.environment)
            names = [request.environment] if request.environment else environments.names()
            live, bulk = self._batcher.waiting
            return pb.StatusResponse(
                foundation_model=environments.model.name,
                queue_live=live,
                queue_bulk=bulk,
                unhealthy=self._health.unhealthy,
                environments=[environment_status(environments, name, self._refusals[name]) for name in names],
            )
        except InputError as error:
            await abort(context, error)


def _similarity(pool: LabelPool, embedding: np.ndarray, label: str) -> float | None:
    return float(embedding @ pool.embeddings[pool.labels.index(label)]) if label in pool.labels else None


async def _check_device(device_id: str, context: Context) -> None:
    try:
        check_device_id(device_id)
    except InputError as error:
        await abort(context, error)
