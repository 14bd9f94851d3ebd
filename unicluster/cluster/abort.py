"""How a service ends a call with one of our errors."""

from typing import Any, NoReturn

import grpc.aio

from unicluster.cluster.channels import OUR_OWN, STOPPING, status_of
from unicluster.errors import StoppingError, UniclusterError


async def abort(context: "grpc.aio.ServicerContext[Any, Any]", error: UniclusterError) -> NoReturn:
    """Ends the call: the client's `as_error` turns it into the same error again."""
    marks = OUR_OWN + STOPPING if isinstance(error, StoppingError) else OUR_OWN
    await context.abort(status_of(error), str(error), trailing_metadata=marks)
