"""Handlers of gRPC methods that first look at the call."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
# Ends the call where it must not go on. Given the request, or the iterator of a stream of them.
Check = Callable[[Any, Context], Awaitable[None]]


def checked(
    handler: Handler, check: Check, deserializer: Callable[[bytes], Any] | None = None
) -> Handler:
    """`handler`, which awaits `check` before it does anything.

    `deserializer` makes requests of bytes in place of the handler's.
    """
    makers: dict[tuple[bool, bool], tuple[Any, Any]] = {
        (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
    }
    make, behavior = makers[handler.request_streaming, handler.response_streaming]

    async def answer(request: Any, context: Context) -> Any:
        await check(request, context)
        return await behavior(request, context)

    async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
        await check(request, context)
        async for response in behavior(request, context):
            yield response

    # gRPC tells by this whether responses are yielded, or written to the context.
    yields = inspect.isasyncgenfunction(behavior)
    made: Handler = make(
        generate if yields else answer,
        request_deserializer=deserializer or handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return made
