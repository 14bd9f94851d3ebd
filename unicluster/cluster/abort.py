"""How a service ends a call with one of our errors."""

from typing import Any, NoReturn

import grpc.aio

from unicluster.cluster.channels import OUR_OWN, status_of
from unicluster.errors import UniclusterError


async def abort(context: "grpc.aio.ServicerContext[Any, Any]", error: UniclusterError) -> NoReturn:
    """Ends the call: the client's `as_error` turns it into the same error again."""
    await context.abort(status_of(error), str(error), trailing_metadata=OUR_OWN)
