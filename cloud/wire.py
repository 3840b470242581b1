"""From the cloud's own objects and errors to messages on the wire."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Sized
from typing import NoReturn, TypeVar

import grpc
import grpc.aio

from ..models.errors import (
    ConfigError,
    DeadlineError,
    EdgeFMError,
    EnvironmentMissingError,
    ImageError,
    InputError,
    LabelExistsError,
    LabelMissingError,
    NoLanguageModelError,
    OverloadedError,
)
from ..models.pool import LabelPool
from ..models.versions import BlobRef, StudentManifest
from ..proto.limits import MAX_LABELS_PER_CALL, PUSHBACK_KEY
from ..proto.v1 import edgefm_pb2 as pb
from .recognition import Recognised
from .store import NewSample

log = logging.getLogger("edgefm.cloud.wire")
Context = grpc.aio.ServicerContext
T = TypeVar("T")

LONGEST_DETAIL = 500
"""Characters of an error's text, which may quote what came: it travels percent-encoded in the trailers, and of more than
8 KiB of those a client says RESOURCE_EXHAUSTED instead."""


def new_sample(
    request: pb.RecognizeRequest | pb.UploadRequest, found: Recognised, propensity: float, durable: bool
) -> NewSample:
    return NewSample(request.environment, request.image, found.labelled, propensity, request.device_id, durable)


def query_error(error: EdgeFMError) -> pb.QueryError:
    """For one sample of a stream; the others go on."""
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


async def abort(context: Context, error: EdgeFMError) -> NoReturn:
    """Ends the call with the status that the error means to a client."""
    if isinstance(error, LabelExistsError):
        code = grpc.StatusCode.ALREADY_EXISTS
    elif isinstance(error, LabelMissingError):
        code = grpc.StatusCode.NOT_FOUND
    elif isinstance(error, NoLanguageModelError):
        code = grpc.StatusCode.FAILED_PRECONDITION
    elif isinstance(error, (InputError, ConfigError)):
        code = grpc.StatusCode.INVALID_ARGUMENT
    elif isinstance(error, DeadlineError):
        code = grpc.StatusCode.DEADLINE_EXCEEDED
    elif isinstance(error, OverloadedError):
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        context.set_trailing_metadata(((PUSHBACK_KEY, str(error.retry_after_ms)),))
    else:
        code = grpc.StatusCode.INTERNAL
    await context.abort(code, detail(error))


async def translated(work: Awaitable[T], context: Context) -> T:
    """The work's result; its deliberate errors end the call."""
    try:
        return await work
    except EdgeFMError as error:
        await abort(context, error)


async def check_count(labels: Sized, context: Context) -> None:
    if len(labels) > MAX_LABELS_PER_CALL:
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, f"{len(labels)} labels in one call; at most {MAX_LABELS_PER_CALL}"
        )


def detail(error: EdgeFMError) -> str:
    """What a call that ends with the error says of it."""
    text = str(error)
    return text if len(text) <= LONGEST_DETAIL else f"{text[:LONGEST_DETAIL]}..."


def student_message(manifest: StudentManifest) -> pb.StudentVersion:
    return pb.StudentVersion(
        environment=manifest.environment,
        version=manifest.version,
        manifest_json=manifest.to_json(),
        files=[_blob_message(ref) for ref in manifest.files],
    )


def _blob_message(ref: BlobRef) -> pb.Blob:
    return pb.Blob(name=ref.name, sha256=ref.sha256, size_bytes=ref.size_bytes)


def pool_version(pool: LabelPool, ref: BlobRef) -> pb.PoolVersion:
    return pb.PoolVersion(version=pool.version, file=_blob_message(ref))
