"""Errors as HTTP answers: a status, and one JSON object for each family of clients."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from unicluster.errors import (
    BusyError,
    DoesNotFitError,
    InputError,
    NotFoundError,
    UnavailableError,
    UniclusterError,
)
from unicluster.v1.chat_pb2 import ChatInfo

Json = dict[str, Any]

# Seconds after which a client may try again.
BUSY_RETRY = 1
LOADING_RETRY = 5

# How messages of InputError begin: with the field's name.
_FIELD = re.compile(r"([A-Za-z_][\w.\[\]]*): ")


class HttpError(UniclusterError):
    """An error that only HTTP knows: a path, a key, a body. `status` is its own."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.headers = headers or {}


@dataclass(frozen=True)
class NotReady:
    """Why the model does not answer. `state`: loading, ready, recovering or failed.

    progress: share of its weights that are fetched and loaded, 0 to 1; None while nothing loads.
    """

    state: str
    reason: str
    progress: float | None = None

    def fields(self) -> Json:
        """The fields that an error object has of it, in every protocol."""
        share = None if self.progress is None else round(self.progress, 4)
        return {"state": self.state, "reason": self.reason, "progress": share}


def not_ready(info: ChatInfo, why_not: str) -> NotReady:
    """State of the model that is described by `info`."""
    reason = info.detail or why_not
    return NotReady(info.state, reason, info.progress if info.HasField("progress") else None)


@dataclass(frozen=True)
class Failure:
    """An error as it is answered. `kind` is OpenAI's type of error; `param` names what is wrong.

    not_ready: with status 503, how the model is.
    """

    status: int
    kind: str
    message: str
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    not_ready: NotReady | None = None

    def more(self) -> Json:
        """Fields of the error object beyond those that its protocol has."""
        return {} if self.not_ready is None else self.not_ready.fields()

    def of_model(self, info: ChatInfo, why_not: str) -> "Failure":
        """A copy of the failure, which states how the model is where that is its reason."""
        if self.code != UNAVAILABLE:
            return self
        return replace(self, not_ready=not_ready(info, why_not or self.message))


UNAVAILABLE = "unavailable"
INTERNAL = Failure(500, "server_error", "unexpected error here: the log of `serve` has it")


def failure_of(error: Exception) -> Failure:
    """The answer to an error. Of those that are not ours nothing is said but that they happened."""
    message = str(error)
    match error:
        case HttpError():
            return Failure(error.status, error.kind, message, error.code, headers=error.headers)
        case InputError():
            named = _FIELD.match(message)
            return Failure(400, "invalid_request_error", message, param=named and named[1])
        case NotFoundError():
            return Failure(404, "invalid_request_error", message, "model_not_found", "model")
        case BusyError():
            headers = {"Retry-After": str(BUSY_RETRY)}
            return Failure(429, "rate_limit_error", message, "queue_full", headers=headers)
        case UnavailableError() | DoesNotFitError():
            headers = {"Retry-After": str(LOADING_RETRY)}
            return Failure(503, "server_error", message, UNAVAILABLE, headers=headers)
        case UniclusterError():
            return Failure(500, "server_error", message)
    return INTERNAL


def renamed(error: Exception, names: Mapping[str, str]) -> Exception:
    """An InputError with the name that its field has in the client's protocol; others as they are.

    names: by fields of GenerateRequest, as messages begin with them; one that is not there has the
    name of the field that it is in.
    """
    message = str(error)
    named = _FIELD.match(message) if type(error) is InputError else None
    field = "" if named is None else named[1]
    while named is not None and field:
        if field in names:
            return InputError(names[field] + message[named.end(1) :])
        field = field.rpartition(".")[0]
    return error


_ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_error(failure: Failure) -> Json:
    """The error object of Anthropic's API."""
    other = "invalid_request_error" if failure.status < 500 else "api_error"
    kind = _ANTHROPIC_KINDS.get(failure.status, other)
    return {"type": "error", "error": {"type": kind, "message": failure.message, **failure.more()}}


def openai_error(failure: Failure) -> Json:
    """The error object of OpenAI's APIs."""
    return {
        "error": {
            "message": failure.message,
            "type": failure.kind,
            "param": failure.param,
            "code": failure.code,
            **failure.more(),
        }
    }
