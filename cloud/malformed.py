"""Requests that are no messages of the contract: their sender is told, and nothing else happens.

gRPC on its own takes the failed parsing for a bug of the server: the sender gets UNKNOWN, and the log a traceback for
each, so that whoever can connect can fill the disk with it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

T = TypeVar("T")
Context = grpc.aio.ServicerContext


@dataclass(frozen=True)
class _Malformed:
    """In the place of a request that could not be parsed."""

    reason: str


class MalformedRequests(grpc.aio.ServerInterceptor):
    """Ends calls with such a request as INVALID_ARGUMENT, those of some services.

    Args:
        services: full names of services whose streaming answers are asynchronous generators.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self._prefixes = tuple(f"/{service}/" for service in services)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        found = await continuation(handler_call_details)
        if not found or not handler_call_details.method.startswith(self._prefixes):
            return found  # there is no such method, or it is another service's
        handler: Any = found
        parse, serialize = _tolerant(handler.request_deserializer), handler.response_serializer
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(_one_to_one(handler.unary_unary), parse, serialize)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(_one_to_many(handler.unary_stream), parse, serialize)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(_many_to_one(handler.stream_unary), parse, serialize)
        return grpc.stream_stream_rpc_method_handler(_many_to_many(handler.stream_stream), parse, serialize)


def _tolerant(parse: Callable[[bytes], T]) -> Callable[[bytes], T | _Malformed]:
    def parse_or_say(data: bytes) -> T | _Malformed:
        try:
            return parse(data)
        except DecodeError as error:
            return _Malformed(str(error))

    return parse_or_say


def _one_to_one(serve: Callable[[Any, Context], Awaitable[T]]) -> Any:
    async def served(request: Any, context: Context) -> T:
        return await serve(await _checked(request, context), context)

    return served


def _one_to_many(serve: Callable[[Any, Context], AsyncGenerator[T, None]]) -> Any:
    async def served(request: Any, context: Context) -> AsyncIterator[T]:
        async with aclosing(serve(await _checked(request, context), context)) as answers:
            async for answer in answers:
                yield answer

    return served


def _many_to_one(serve: Callable[[AsyncIterator[Any], Context], Awaitable[T]]) -> Any:
    async def served(requests: AsyncIterator[Any], context: Context) -> T:
        return await serve(_each_checked(requests, context), context)

    return served


def _many_to_many(serve: Callable[[AsyncIterator[Any], Context], AsyncGenerator[T, None]]) -> Any:
    async def served(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[T]:
        async with aclosing(serve(_each_checked(requests, context), context)) as answers:
            async for answer in answers:
                yield answer

    return served


async def _each_checked(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
    async for request in requests:
        yield await _checked(request, context)


async def _checked(request: Any, context: Context) -> Any:
    if isinstance(request, _Malformed):
        await _refuse(request, context)
    return request


async def _refuse(request: _Malformed, context: Context) -> NoReturn:
    await context.abort(
        grpc.StatusCode.INVALID_ARGUMENT, f"{request.reason}; the device and the cloud need the same edgefm"
    )
