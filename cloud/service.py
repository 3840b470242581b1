"""The gRPC service: translation between the wire and `Environments`, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from typing import NoReturn, TypeVar

import grpc
import grpc.aio
import numpy as np

from ..models.errors import (
    ConfigError,
    DeadlineError,
    EdgeFMError,
    ImageError,
    InputError,
    LabelExistsError,
    LabelMissingError,
)
from ..models.foundation import FoundationModel
from ..models.images import decode_image
from ..models.pool import LabelPool
from ..models.versions import BlobRef, StudentManifest
from ..proto.limits import FETCH_CHUNK_BYTES, MAX_IMAGE_BYTES, MAX_LABELS_PER_CALL, PROTOCOL_VERSION
from ..proto.v1 import edgefm_pb2 as pb
from ..proto.v1 import edgefm_pb2_grpc as rpc
from .batcher import Batched, DynamicBatcher
from .environments import BASE, Environments

log = logging.getLogger("edgefm.cloud.service")
T = TypeVar("T")
Context = grpc.aio.ServicerContext
FmBatcher = DynamicBatcher[bytes, np.ndarray]

MAX_IN_FLIGHT = 64
"""Unanswered requests of one Recognize stream; past it the stream is read no further (flow control)."""


def embed_encoded(model: FoundationModel, images: Sequence[bytes]) -> list[np.ndarray | EdgeFMError]:
    """Decodes and embeds a batch; a damaged image costs its own answer only. Returns (D,) float32 or an error each."""
    results: list[np.ndarray | EdgeFMError] = []
    decoded = []
    for data in images:
        try:
            if len(data) > MAX_IMAGE_BYTES:
                raise ImageError(f"an image of {len(data)} bytes; at most {MAX_IMAGE_BYTES} are taken")
            decoded.append(decode_image(data))
            results.append(np.empty(0))
        except ImageError as error:
            results.append(error)
    embeddings = iter(model.embed_images(decoded)) if decoded else iter(())
    return [result if isinstance(result, EdgeFMError) else next(embeddings) for result in results]


class EdgeFMService(rpc.EdgeFMServicer):
    """See `proto/v1/edgefm.proto` for what each call promises."""

    def __init__(self, environments: Environments, batcher: FmBatcher) -> None:
        self._environments = environments
        self._batcher = batcher

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

        async def answer(request: pb.RecognizeRequest) -> None:
            try:
                answers.put_nowait(await self._recognize(request))
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

    async def _recognize(self, request: pb.RecognizeRequest) -> pb.RecognizeResponse:
        try:
            pool, _ = self._environments.pool(request.environment)
            batched = await self._batcher.submit(request.image, request.deadline_ms)
            if request.keep:
                await self._environments.keep(
                    request.environment, request.image, batched.result, request.propensity or 1.0, request.device_id
                )
        except EdgeFMError as error:
            return pb.RecognizeResponse(query_id=request.query_id, error=_query_error(error))
        return self._recognized(request, pool, batched)

    def _recognized(
        self, request: pb.RecognizeRequest, pool: LabelPool, batched: Batched[np.ndarray]
    ) -> pb.RecognizeResponse:
        found = pool.recognise(batched.result[None], request.top_k or 5)
        return pb.RecognizeResponse(
            query_id=request.query_id,
            matches=[
                pb.Match(label=pool.labels[index], similarity=similarity)
                for index, similarity in zip(found.indices[0], found.similarities[0], strict=True)
            ],
            unknown=bool(found.unknown[0]),
            margin=float(found.margins[0]),
            queue_ms=batched.queue_ms,
            compute_ms=batched.compute_ms,
            batch_size=batched.batch_size,
            pool_version=pool.version,
            samples_labelled=self._environments.samples_labelled(request.environment),
            edge_similarity=_similarity(pool, batched.result, request.edge_label),
        )

    async def Upload(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.UploadRequest], context: Context
    ) -> pb.UploadResponse:
        acks = []
        async for request in request_iterator:
            ack = pb.UploadAck(upload_id=request.upload_id)
            try:
                self._environments.pool(request.environment)
                batched = await self._batcher.submit(request.image)
                ack.sha256, ack.duplicate = await self._environments.keep(
                    request.environment, request.image, batched.result, request.propensity or 1.0, request.device_id
                )
            except InputError as error:
                ack.error.CopyFrom(_query_error(error))
            except EdgeFMError as error:  # not the sample's fault: unacknowledged, so that it is sent again
                log.error("event=upload_failed device=%s reason=%s", request.device_id, error)
                continue
            acks.append(ack)
        return pb.UploadResponse(acks=acks)

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
        for refusal in request.refusals:
            log.warning(
                "event=refused_by_device device=%r environment=%r what=%s kind=%s reason=%r",
                request.device_id,
                request.environment,
                refusal.student_version if refusal.WhichOneof("what") == "student_version" else refusal.pool_version,
                pb.Refusal.Kind.Name(refusal.kind),
                refusal.reason,
            )
        return pb.ReportResponse()

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


def _query_error(error: EdgeFMError) -> pb.QueryError:
    if isinstance(error, ImageError):
        code = pb.QueryError.CODE_BAD_IMAGE
    elif isinstance(error, DeadlineError):
        code = pb.QueryError.CODE_DEADLINE
    elif isinstance(error, InputError):
        code = pb.QueryError.CODE_UNKNOWN_ENVIRONMENT
    else:
        code = pb.QueryError.CODE_INTERNAL
        log.error("event=query_failed reason=%s", error)
    return pb.QueryError(code=code, message=str(error))


async def _abort(context: Context, error: EdgeFMError) -> NoReturn:
    if isinstance(error, LabelExistsError):
        code = grpc.StatusCode.ALREADY_EXISTS
    elif isinstance(error, LabelMissingError):
        code = grpc.StatusCode.NOT_FOUND
    elif isinstance(error, (InputError, ConfigError)):
        code = grpc.StatusCode.INVALID_ARGUMENT
    else:
        code = grpc.StatusCode.INTERNAL
    await context.abort(code, str(error))


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
