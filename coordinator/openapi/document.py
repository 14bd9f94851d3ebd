"""The OpenAPI document of the HTTP doors: every path, with its errors and who may ask.

That it is what the translations read and write is tested: tests/unit/test_openapi.py.
"""

from dataclasses import dataclass

from coordinator.openapi import anthropic, ollama, openai_answers, openai_requests, responses
from coordinator.openapi.parts import NOT_READY, TEXT, answered, choice, ref
from coordinator.protocols.asked import EVENTS, LINES, Json
from unicluster import __version__

JSON, PLAIN = "application/json", "text/plain"
# Of every path; with a body.
REFUSED = {
    400: "no HTTP, or two lengths of the body",
    401: "no good key",
    403: "not for this key or page",
    421: "another Host",
    503: "too many connections",
    505: "another version of HTTP",
}
# Statuses that the server itself may answer with, in plain text, before anything is read.
OF_SERVER = (400, 503)
OF_BODIES = {
    400: "the request, with the field",
    404: "another model",
    408: "the body did not arrive",
    413: "the body is too large",
    415: "the body is not JSON as it is",
    429: "a limit of the key, or the queue is full",
    500: "a stage failed",
    503: "the model loads, moves or has lost a machine",
}
WITH_RETRY = (429, 503)


@dataclass(frozen=True)
class Path:
    """One path. `answer` and `body` are names of schemas; `piece` is that of a stream's parts."""

    name: str
    summary: str
    answer: str
    body: str = ""
    piece: str = ""
    error: str = "OpenAIError"
    open: bool = False  # without a key
    refuses: bool = False  # whatever the body
    errors: tuple[int, ...] = ()  # besides those of all paths with a body, or without


EMBEDDINGS = (
    ("/v1/embeddings", "OpenAIError"),
    ("/api/embed", "OllamaError"),
    ("/api/embeddings", "OllamaError"),
)
PATHS = (
    Path(
        *("/v1/chat/completions", "A conversation", "ChatCompletion", "ChatRequest", "ChatEvent"),
    ),
    Path(
        *("/v1/completions", "Plain text, gone on with", "Completion", "CompletionRequest"),
        piece="CompletionEvent",
    ),
    Path(
        *("/v1/responses", "A response, without state", "Response", "ResponseRequest"),
        piece="ResponseEvent",
    ),
    Path(
        *("/v1/messages", "Anthropic's messages", "MessageAnswer", "MessageRequest"),
        *("MessageEvent", "AnthropicError"),
    ),
    Path(
        *("/v1/messages/count_tokens", "Tokens of a prompt", "Count", "CountRequest"),
        error="AnthropicError",
    ),
    *(
        Path(name, "Refused: no model served here makes any", "", error=error, refuses=True)
        for name, error in EMBEDDINGS
    ),
    Path("/v1/models", "The model that is served", "Models"),
    Path("/v1/models/{name}", "One model", "Model", errors=(404,)),
    Path(
        *("/api/chat", "Ollama's chat", "OllamaChatAnswer", "OllamaChatRequest"),
        *("OllamaChatLine", "OllamaError"),
    ),
    Path(
        *("/api/generate", "Ollama's generate", "OllamaGenerateAnswer", "OllamaGenerateRequest"),
        *("OllamaGenerateLine", "OllamaError"),
    ),
    Path(
        *("/api/show", "The model, as Ollama shows it", "OllamaShown", "OllamaShowRequest"),
        error="OllamaError",
    ),
    Path("/api/tags", "Models, as Ollama lists them", "OllamaTags", error="OllamaError"),
    Path("/api/ps", "Models that answer", "OllamaRunning", error="OllamaError"),
    Path("/api/version", "This version", "OllamaVersion", error="OllamaError", open=True),
    Path("/healthz", "Whether this process answers", "Healthy", open=True),
    Path("/readyz", "Whether the model answers", "Ready", open=True),
    Path("/metrics", "Metrics for Prometheus", "", errors=(503,)),
    Path("/openapi.json", "This document", "", open=True),
)
SCHEMAS: dict[str, Json] = {
    **openai_requests.SCHEMAS,
    **openai_answers.SCHEMAS,
    **responses.SCHEMAS,
    **anthropic.SCHEMAS,
    **ollama.SCHEMAS,
    "Healthy": answered({"status": choice("ok")}),
    "Ready": answered({"status": choice("ready")}),
    "NotReady": answered({"status": TEXT, "reason": TEXT, "progress": NOT_READY["progress"]}),
}


def document() -> Json:
    """The OpenAPI document, version 3.1, as JSON."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "unicluster",
            "version": __version__,
            "description": "Fields that are null count as left out; no other field is ignored.",
        },
        "paths": {path.name: {_method(path): _operation(path)} for path in PATHS},
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        # The last: where there is no key yet, this machine needs none.
        "security": [{"bearer": []}, {"header": []}, {}],
    }


def _method(path: Path) -> str:
    return "post" if path.body or path.refuses else "get"


def _operation(path: Path) -> Json:
    operation: Json = {"summary": path.summary, "responses": _responses(path)}
    if path.body:
        content = {JSON: {"schema": ref(path.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    if "{name}" in path.name:
        named = {"name": "name", "in": "path", "required": True, "schema": TEXT}
        operation["parameters"] = [named]
    if path.open:
        operation["security"] = []
    return operation


def _responses(path: Path) -> Json:
    errors = {**REFUSED, **(OF_BODIES if path.body else {})}
    errors |= {status: OF_BODIES[status] for status in path.errors}
    if path.open:
        del errors[401]
    found: Json = {}
    if path.refuses:
        errors[400] = "nothing here can answer it"
    else:
        found["200"] = {"description": "the answer", "content": _content(path)}
    late = bool(path.body) or 503 in path.errors
    for status, reason in sorted(errors.items()):
        schema = path.error if status != 503 or late else ""
        found[str(status)] = _error(status, reason, schema)
    if path.name == "/readyz":
        found["503"] = _error(503, "not yet", "NotReady")
    return found


def _content(path: Path) -> Json:
    if path.name == "/metrics":
        return {PLAIN: {"schema": TEXT}}
    if not path.answer:
        return {JSON: {"schema": {"type": "object"}}}
    content: Json = {JSON: {"schema": ref(path.answer)}}
    if path.piece:
        # OpenAPI 3.1 says nothing of the parts of a stream; `itemSchema` is as 3.2 has it.
        if path.error == "OllamaError":
            content[LINES] = {"itemSchema": ref(path.piece)}
        else:
            content[EVENTS] = {"itemSchema": _event(path.piece)}
    return content


def _event(piece: str) -> Json:
    """An event of a stream, whose data are JSON of that schema, but for OpenAI's last, [DONE]."""
    data = {**TEXT, "contentMediaType": JSON, "contentSchema": ref(piece)}
    return {"type": "object", "required": ["data"]} | {"properties": {"data": data, "event": TEXT}}


def _error(status: int, reason: str, schema: str) -> Json:
    """A response with an error; `schema` is that of its JSON, "" where it has none."""
    content: Json = {JSON: {"schema": ref(schema)}} if schema else {}
    if status in OF_SERVER:
        content[PLAIN] = {"schema": TEXT}
    response: Json = {"description": reason, "content": content}
    if status in WITH_RETRY and schema:
        seconds = {"description": "seconds to wait", "schema": {"type": "string"}}
        response["headers"] = {"Retry-After": seconds}
    return response
