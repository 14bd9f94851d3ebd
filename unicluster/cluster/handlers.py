"""Handlers of gRPC methods that first look at the call, and interceptors that make them."""

import contextlib
import inspect
from abc import abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
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

    @contextlib.asynccontextmanager
    async def guard(request: Any, context: Context) -> AsyncIterator[None]:
        await check(request, context)
        yield

    return _wrapped(handler, guard, deserializer)


def guarded(
    handler: Handler, guard: Callable[[Context], AbstractAsyncContextManager[None]]
) -> Handler:
    """`handler`, all of which runs within `guard`."""
    return _wrapped(handler, lambda request, context: guard(context), None)


def _wrapped(
    handler: Handler,
    guard: Callable[[Any, Context], AbstractAsyncContextManager[None]],
    deserializer: Callable[[bytes], Any] | None,
) -> Handler:
    makers: dict[tuple[bool, bool], tuple[Any, Any]] = {
        (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
    }
    make, behavior = makers[handler.request_streaming, handler.response_streaming]

    async def answer(request: Any, context: Context) -> Any:
        async with guard(request, context):
            return await behavior(request, context)

    async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
        async with guard(request, context):
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


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic at run time
    """Puts something round the handler of each method of a server."""

    @abstractmethod
    def wrapped(self, handler: Handler, method: str) -> Handler:
        """The handler to use in place of a method's; `method` is its full name."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler: Handler | None = await continuation(handler_call_details)
        if handler is None:
            return handler  # type: ignore[return-value]  # gRPC says that there is no such method
        return self.wrapped(handler, handler_call_details.method)


class CallLimit(Interceptor):
    """Refuses more than `most` calls at once of a certificate, with RESOURCE_EXHAUSTED.

    So one peer leaves some of the server's calls to others.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[bytes] = Counter()

    def wrapped(self, handler: Handler, method: str) -> Handler:
        return checked(handler, self._admit)

    async def _admit(self, request: Any, context: Context) -> None:
        peer = next(iter(context.auth_context().get("x509_pem_cert", [])), b"")
        if self._open[peer] >= self._most:
            reason = f"{self._most} calls of yours are open already: try again later"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
        self._open[peer] += 1

        def leave(context: Context) -> None:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]

        done: Any = leave  # grpc-stubs wants a class, and gRPC any callable
        context.add_done_callback(done)
