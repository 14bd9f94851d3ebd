"""The models that are served, as OpenAI's clients list them, and whether they can answer."""

from coordinator.protocols.asked import Json
from coordinator.serving.gateway import Gateway
from unicluster.errors import NotFoundError, shown


def model_name(gateway: Gateway) -> str:
    """The name of the model in answers: one word, by which it may be requested, too."""
    return gateway.display.split(" ")[0]


def model_json(gateway: Gateway, created: int) -> Json:
    """One model of /v1/models; `created` is when serving began, in seconds since 1970 UTC.

    `context_length` is for prompt and answer together; null while it is not known.
    """
    info = gateway.info()
    return {
        "id": model_name(gateway),
        "object": "model",
        "created": created,
        "owned_by": "unicluster",
        "context_length": info.context or None,
        "quantization": info.quant or None,
        "users": info.users or None,
        "state": info.state,
        "detail": info.detail or None,
    }


def one_model(gateway: Gateway, created: int, name: str) -> Json:
    """The model of that name. Raises NotFoundError where it is not served."""
    service = gateway.service
    names = service.names if service is not None else {gateway.display}
    if name not in names | {model_name(gateway)}:
        raise NotFoundError(f"model: {shown(name)} is not served, {gateway.display!r} is")
    return model_json(gateway, created)
