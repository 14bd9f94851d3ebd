"""How many calls one peer may have open at a server."""

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from unicluster.cluster.handlers import Context, Handler, checked


class CallLimit(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic at run time
    """Refuses more than `most` calls at once of a certificate, with RESOURCE_EXHAUSTED.

    So one peer leaves some of the server's calls to others.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[bytes] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler: Handler | None = await continuation(handler_call_details)
        if handler is None:
            return handler  # type: ignore[return-value]  # gRPC says that there is no such method
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
