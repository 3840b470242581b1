"""The gRPC service: translation between the wire and `Environments`, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from typing import NoReturn, TypeVar

import grpc
import grpc.aio
import numpy as np

from ..models.errors import (
    ConfigError,
    DeadlineError,
    EdgeFMError,
    EnvironmentMissingError,
    ImageError,
    InputError,
    LabelExistsError,
    LabelMissingError,
    OverloadedError,
    StoreError,
)
from ..models.pool import LabelPool
from ..models.versions import BlobRef, StudentManifest
from ..proto.limits import FETCH_CHUNK_BYTES, MAX_IMAGE_BYTES, MAX_LABELS_PER_CALL, PROTOCOL_VERSION, PUSHBACK_KEY
from ..proto.v1 import edgefm_pb2 as pb
from ..proto.v1 import edgefm_pb2_grpc as rpc
from .drift import Observation
from .environments import BASE, Environments, check_propensity
from .health import HealthWatch
from .metrics import CloudMetrics
from .recognition import FmBatcher, Query, Recognised
from .status import environment_status
from .store import NewSample

log = logging.getLogger("edgefm.cloud.service")
T = TypeVar("T")
Context = grpc.aio.ServicerContext

MAX_IN_FLIGHT = 64
"""Unanswered requests of one Recognize stream; past it the stream is read no further (flow control)."""
MAX_UPLOADS_IN_FLIGHT = 16
DEFAULT_TOP_K = 5
KEEP_PATIENCE_S = 0.5
"""How long an answer waits for its sample to be stored; after that it goes without."""
UPLOAD_RETRY_MS = 5000
"""When an upload that store or model failed may come again."""
REFUSALS = 20
"""Remembered of each environment, for an operator."""
LONGEST_DETAIL = 500
"""Characters of an error's text, which may quote what came: it travels percent-encoded in the trailers, and of more than
8 KiB of those a client says RESOURCE_EXHAUSTED instead."""


class EdgeFMService(rpc.EdgeFMServicer):
    """See `proto/v1/edgefm.proto` for what each call promises."""

    def __init__(
        self, environments: Environments, batcher: FmBatcher, health: HealthWatch, metrics: CloudMetrics
    ) -> None:
        self._environments = environments
        self._batcher = batcher
        self._health = health
        self._metrics = metrics
        self._refusals: defaultdict[str, deque[pb.ReportedRefusal]] = defaultdict(lambda: deque(maxlen=REFUSALS))

    async def Register(self, request: pb.RegisterRequest, context: Context) -> pb.RegisterResponse:  # noqa: N802
        if request.protocol != PROTOCOL_VERSION:
            older = "the device" if request.protocol < PROTOCOL_VERSION else "the cloud"
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the device speaks protocol {request.protocol}, the cloud {PROTOCOL_VERSION}: "
                f"upgrade edgefm on {older}",
            )
        await _check_count(request.labels, context)
        register = self._environments.register(request.environment, request.labels, request.student_profile)
        warnings = await self._translated(register, context)
        pool, ref = self._environments.pool(request.environment)
        log.info("event=device device=%s environment=%s", request.device_id, request.environment)
        return pb.RegisterResponse(
            student=_student_message(self._environments.student(request.environment)),
            pool=_pool_version(pool, ref),
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
                async with _TaskSet() as tasks:
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
            propensity = request.propensity or 1.0
            query_propensity = request.query_propensity or propensity
            check_propensity(propensity)
            check_propensity(query_propensity)
            if request.keep:
                self._environments.student(request.environment)  # samples of the base have no place
            query = Query(request.image, pool, request.top_k or DEFAULT_TOP_K)
            batched = await self._batcher.submit(query, owner, request.deadline_ms)
        except EdgeFMError as error:
            return pb.RecognizeResponse(query_id=request.query_id, error=_query_error(error))
        found = batched.result
        if request.edge_label:
            agrees = request.edge_label == found.label
            observation = Observation(request.edge_margin, agrees, query_propensity, time.time())
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
        sample = _sample(request, found, propensity, durable=False)
        with contextlib.suppress(StoreError, asyncio.TimeoutError):  # counted, logged and shown by health
            await asyncio.wait_for(self._environments.keep(sample), KEEP_PATIENCE_S)

    async def Upload(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.UploadRequest], context: Context
    ) -> pb.UploadResponse:
        acks: dict[int, pb.UploadAck] = {}  # by place in the stream
        postponed: list[EdgeFMError] = []
        room = asyncio.Semaphore(MAX_UPLOADS_IN_FLIGHT)
        peer = context.peer()

        async def take(place: int, request: pb.UploadRequest) -> None:
            try:
                acks[place] = await self._upload(request, request.device_id or peer)
            except EdgeFMError as error:  # not the sample's fault
                log.error("event=upload_postponed device=%s reason=%s", request.device_id, error)
                postponed.append(error)
                acks[place] = _postponed_ack(request.upload_id, error)
            finally:
                room.release()

        async with _TaskSet() as tasks:
            place = 0
            async for request in request_iterator:
                await room.acquire()
                if postponed:
                    break
                tasks.start(take(place, request))
                place += 1
        if postponed and len(postponed) == len(acks):
            await _come_again(context, postponed[0])
        return pb.UploadResponse(acks=[acks[place] for place in sorted(acks)])

    async def _upload(self, request: pb.UploadRequest, owner: str) -> pb.UploadAck:
        """Raises `EdgeFMError` when the sample may be sent again."""
        try:
            propensity = request.propensity or 1.0
            check_propensity(propensity)
            self._environments.student(request.environment)
            if "store" in self._health.unhealthy:
                raise StoreError(self._health.unhealthy["store"])  # before the FM has worked for nothing
            pool, _ = self._environments.pool(request.environment)
            batched = await self._batcher.submit(Query(request.image, pool, 1), owner, live=False)
            sample = _sample(request, batched.result, propensity, durable=True)
            kept = await self._environments.keep(sample)
            return pb.UploadAck(upload_id=request.upload_id, sha256=kept.sha256, duplicate=kept.duplicate)
        except InputError as error:
            return pb.UploadAck(upload_id=request.upload_id, error=_query_error(error))

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
                    await _abort(context, error)
                # The pool first: a student that learned a label is of use only with it.
                if ref.sha256 != sent_pool:
                    sent_pool = ref.sha256
                    yield pb.WatchEvent(pool=_pool_version(pool, ref))
                if student.version != sent_student:
                    sent_student = student.version
                    yield pb.WatchEvent(student=_student_message(student))
                await changed.wait()
        finally:
            self._environments.unwatch(request.environment, changed)

    async def Fetch(self, request: pb.FetchRequest, context: Context) -> AsyncIterator[pb.FetchChunk]:  # noqa: N802
        try:
            path = self._environments.registry.blob_path(request.sha256)
        except InputError as error:
            await _abort(context, error)
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

    async def ListLabels(self, request: pb.ListLabelsRequest, context: Context) -> pb.LabelPool:  # noqa: N802
        try:
            if not request.environment and not self._environments.has_base:
                return pb.LabelPool()
            return _pool_message(request.environment, self._environments.pool(request.environment or BASE)[0])
        except InputError as error:
            await _abort(context, error)

    async def AddLabels(self, request: pb.AddLabelsRequest, context: Context) -> pb.LabelPool:  # noqa: N802
        await _check_count(request.labels, context)
        change = self._environments.add_labels(request.environment, request.labels)
        return _pool_message(request.environment, await self._translated(change, context))

    async def RemoveLabels(self, request: pb.RemoveLabelsRequest, context: Context) -> pb.LabelPool:  # noqa: N802
        await _check_count(request.labels, context)
        change = self._environments.remove_labels(request.environment, request.labels)
        return _pool_message(request.environment, await self._translated(change, context))

    async def Rollback(self, request: pb.RollbackRequest, context: Context) -> pb.StudentVersion:  # noqa: N802
        version = request.version if request.HasField("version") else None
        change = self._environments.rollback(request.environment, version)
        return _student_message(await self._translated(change, context))

    async def Report(self, request: pb.ReportRequest, context: Context) -> pb.ReportResponse:  # noqa: N802
        try:
            self._environments.student(request.environment)
        except InputError as error:
            await _abort(context, error)
        for refusal in request.refusals:
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
            reported = pb.ReportedRefusal(device_id=request.device_id, refusal=refusal)
            self._refusals[request.environment].append(reported)
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
            await _abort(context, error)

    async def _translated(self, work: Awaitable[T], context: Context) -> T:
        try:
            return await work
        except EdgeFMError as error:
            await _abort(context, error)


class _TaskSet:
    """Tasks that end with their block: awaited when it ends well, cancelled when it does not."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def __aenter__(self) -> _TaskSet:
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _similarity(pool: LabelPool, embedding: np.ndarray, label: str) -> float | None:
    return float(embedding @ pool.embeddings[pool.labels.index(label)]) if label in pool.labels else None


def _sample(
    request: pb.RecognizeRequest | pb.UploadRequest, found: Recognised, propensity: float, durable: bool
) -> NewSample:
    return NewSample(request.environment, request.image, found.labelled, propensity, request.device_id, durable)


def _query_error(error: EdgeFMError) -> pb.QueryError:
    retry_after_ms = 0
    if isinstance(error, ImageError):
        code = pb.QueryError.CODE_BAD_IMAGE
    elif isinstance(error, DeadlineError):
        code = pb.QueryError.CODE_DEADLINE
    elif isinstance(error, OverloadedError):
        code, retry_after_ms = pb.QueryError.CODE_OVERLOADED, error.retry_after_ms
    elif isinstance(error, EnvironmentMissingError):
        code = pb.QueryError.CODE_UNKNOWN_ENVIRONMENT
    elif isinstance(error, InputError):
        code = pb.QueryError.CODE_INVALID_REQUEST
    else:
        code = pb.QueryError.CODE_INTERNAL
        log.error("event=query_failed reason=%s", error)
    return pb.QueryError(code=code, message=str(error), retry_after_ms=retry_after_ms)


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
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, _detail(error))


def _detail(error: EdgeFMError) -> str:
    text = str(error)
    return text if len(text) <= LONGEST_DETAIL else f"{text[:LONGEST_DETAIL]}..."


async def _abort(context: Context, error: EdgeFMError) -> NoReturn:
    if isinstance(error, LabelExistsError):
        code = grpc.StatusCode.ALREADY_EXISTS
    elif isinstance(error, LabelMissingError):
        code = grpc.StatusCode.NOT_FOUND
    elif isinstance(error, (InputError, ConfigError)):
        code = grpc.StatusCode.INVALID_ARGUMENT
    else:
        code = grpc.StatusCode.INTERNAL
    await context.abort(code, _detail(error))


async def _check_count(labels: Sequence[str], context: Context) -> None:
    if len(labels) > MAX_LABELS_PER_CALL:
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, f"{len(labels)} labels in one call; at most {MAX_LABELS_PER_CALL}"
        )


def _student_message(manifest: StudentManifest) -> pb.StudentVersion:
    return pb.StudentVersion(
        environment=manifest.environment,
        version=manifest.version,
        manifest_json=manifest.to_json(),
        files=[_blob_message(ref) for ref in manifest.files],
    )


def _blob_message(ref: BlobRef) -> pb.Blob:
    return pb.Blob(name=ref.name, sha256=ref.sha256, size_bytes=ref.size_bytes)


def _pool_version(pool: LabelPool, ref: BlobRef) -> pb.PoolVersion:
    return pb.PoolVersion(version=pool.version, file=_blob_message(ref))


def _pool_message(environment: str, pool: LabelPool) -> pb.LabelPool:
    return pb.LabelPool(environment=environment, pool_version=pool.version, labels=pool.labels, warnings=pool.warnings)
