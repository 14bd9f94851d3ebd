"""The HTTP door: its paths, and how errors are answered on each."""

import logging
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from coordinator.api.body import Bodies
from coordinator.api.doorman import Doorman
from coordinator.api.guard import Guard
from coordinator.api.models import model_json, model_name, one_model
from coordinator.api.ollama_info import running, show, tags
from coordinator.api.responding import Respond, caller_of
from coordinator.openapi.document import document
from coordinator.protocols import anthropic
from coordinator.protocols.anthropic import read_count, read_message
from coordinator.protocols.asked import Asked
from coordinator.protocols.errors import (
    LOADING_RETRY,
    HttpError,
    anthropic_error,
    failure_of,
    not_ready,
    openai_error,
    renamed,
)
from coordinator.protocols.ollama import ollama_error
from coordinator.protocols.ollama import read_chat as read_ollama_chat
from coordinator.protocols.ollama import read_generate as read_ollama_generate
from coordinator.protocols.openai_chat import read_chat
from coordinator.protocols.openai_completions import read_completion
from coordinator.protocols.openai_responses import read_response
from coordinator.serving.exposition import DeploymentCollector
from coordinator.serving.gateway import Gateway
from unicluster import __version__
from unicluster.client.metrics import metrics_from_wire
from unicluster.errors import InputError, UniclusterError
from unicluster.trust.role import audit

log = logging.getLogger(__name__)

Read = Callable[[Any, str], Asked]


def make_app(
    gateway: Gateway,
    doorman: Doorman,
    hosts: Collection[str] = (),
    origins: Collection[str] = (),
) -> ASGIApp:
    """The application; `hosts` and `origins` as of Guard."""
    door = _Door(gateway, doorman)

    # Not in a thread, where Starlette would call other functions: the gateway is of this loop.
    async def failed(request: Request, error: Exception) -> Response:
        return _failed(gateway, request, error)

    async def no_such_path(request: Request, error: Exception) -> Response:
        return _no_such_path(gateway, request, error)

    return Starlette(
        routes=[
            Route("/healthz", door.healthy),
            Route("/readyz", door.ready),
            Route("/metrics", door.metrics),
            Route("/openapi.json", door.describe),
            Route("/v1/models", door.models),
            Route("/v1/models/{name:path}", door.model),
            Route("/v1/chat/completions", door.generating(read_chat), methods=["POST"]),
            Route("/v1/messages", door.generating(read_message), methods=["POST"]),
            Route("/v1/messages/count_tokens", door.count, methods=["POST"]),
            Route("/api/chat", door.generating(read_ollama_chat), methods=["POST"]),
            Route("/api/generate", door.generating(read_ollama_generate), methods=["POST"]),
            Route("/api/tags", door.ollama_tags),
            Route("/api/ps", door.ollama_running),
            Route("/api/show", door.ollama_show, methods=["POST"]),
            Route("/api/version", door.ollama_version),
            Route("/v1/responses", door.generating(read_response), methods=["POST"]),
            *(
                Route(path, door.embeddings, methods=["POST"])
                for path in ("/v1/embeddings", "/api/embed", "/api/embeddings")
            ),
            Route("/v1/completions", door.generating(read_completion), methods=["POST"]),
        ],
        middleware=[
            Middleware(Guard, hosts=hosts, origins=origins, refuse=partial(_failed, gateway)),
            Middleware(
                CORSMiddleware,
                allow_origins=list(origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
            ),
        ],
        exception_handlers={
            HTTPException: no_such_path,
            UniclusterError: failed,
            Exception: failed,
        },
    )


class _Door:
    def __init__(self, gateway: Gateway, doorman: Doorman) -> None:
        self._gateway = gateway
        self._doorman = doorman
        self._bodies = Bodies()
        self._since = int(time.time())
        self._document = JSONResponse(document()).body

    async def healthy(self, request: Request) -> Response:
        """Whether this process answers at all."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether the model can answer; 503 with the reason while it can't."""
        reason = self._gateway.why_not
        if not reason:
            return JSONResponse({"status": "ready"})
        how = not_ready(self._gateway.info(), reason)
        said = {"status": how.state, "reason": reason, "progress": how.progress}
        return JSONResponse(said, 503, {"Retry-After": str(LOADING_RETRY)})

    async def metrics(self, request: Request) -> Response:
        """Metrics of the deployment for Prometheus, which sends a key as its bearer token."""
        self._doorman.key_of(request)
        measured = metrics_from_wire(await self._gateway.measure())
        registry = CollectorRegistry()
        registry.register(DeploymentCollector(lambda: measured))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def describe(self, request: Request) -> Response:
        """The OpenAPI document of all this."""
        return Response(self._document, media_type="application/json")

    async def models(self, request: Request) -> Response:
        self._doorman.key_of(request)
        listed = [model_json(self._gateway, self._since)]
        return JSONResponse({"object": "list", "data": listed})

    async def model(self, request: Request) -> Response:
        self._doorman.key_of(request)
        name = request.path_params["name"]
        return JSONResponse(one_model(self._gateway, self._since, name))

    async def ollama_tags(self, request: Request) -> Response:
        self._doorman.key_of(request)
        return JSONResponse(tags(self._gateway, self._since))

    async def ollama_running(self, request: Request) -> Response:
        self._doorman.key_of(request)
        return JSONResponse(running(self._gateway))

    async def ollama_show(self, request: Request) -> Response:
        self._doorman.key_of(request)
        body = await self._bodies.read(request)
        return JSONResponse(await show(self._gateway, self._since, body))

    async def ollama_version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def embeddings(self, request: Request) -> Response:
        """Refused: no model that is served here makes any."""
        self._doorman.key_of(request)
        raise HttpError(
            400,
            f"{model_name(self._gateway)} makes no embeddings: it writes text. Ask a server of an "
            "embedding model for them, and this one for answers",
            code="model_not_supported",
        )

    async def count(self, request: Request) -> Response:
        """Tokens of the prompt of an Anthropic request."""
        self._doorman.check_model(self._doorman.key_of(request), self._names())
        counted = read_count(await self._bodies.read(request))
        try:
            tokens = await self._gateway.count_tokens(counted)
        except InputError as error:
            raise renamed(error, anthropic.NAMES) from None
        return JSONResponse({"input_tokens": tokens})

    def generating(self, read: Read) -> Callable[[Request], Any]:
        """The endpoint of a protocol whose requests `read` understands."""

        async def endpoint(request: Request) -> ASGIApp:
            key = self._doorman.key_of(request)
            self._doorman.check_model(key, self._names())
            asked = read(await self._bodies.read(request), model_name(self._gateway))
            most = self._gateway.info().context
            if asked.context > most > 0:
                raise InputError(f"options.num_ctx: the context here is {most} (`--context`)")
            caller = caller_of(request)
            if key is not None:
                audit.info("key %s (%s): %s from %s", key.id, key.name, request.url.path, caller)
            admission = partial(self._doorman.admitted, key)
            return Respond(self._gateway, asked, caller, admission)

        return endpoint

    def _names(self) -> set[str]:
        service = self._gateway.service
        served = set(service.names) if service is not None else {self._gateway.display}
        return served | {model_name(self._gateway)}


def _no_such_path(gateway: Gateway, request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(getattr(error, "headers", None) or {})
    message = {404: "there is nothing at this path", 405: "this path takes another method"}
    reason = message.get(status, "the request is refused")
    return _failed(gateway, request, HttpError(status, reason, code="unknown_url", headers=headers))


def _failed(gateway: Gateway, request: Request, error: Exception) -> Response:
    if not isinstance(error, UniclusterError):
        log.error("a request to %s failed", request.url.path, exc_info=error)
    failure = failure_of(error).of_model(gateway.info(), gateway.why_not)
    in_their_form = openai_error
    if request.url.path.startswith("/v1/messages"):
        in_their_form = anthropic_error
    elif request.url.path.startswith("/api/"):
        in_their_form = ollama_error
    return JSONResponse(in_their_form(failure), failure.status, failure.headers)
