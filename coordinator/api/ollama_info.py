"""The model that is served, as Ollama's clients list and show models."""

from datetime import UTC, datetime, timedelta

from coordinator.api.models import model_name
from coordinator.protocols.asked import Json
from coordinator.protocols.fields import Fields
from coordinator.protocols.ollama import name_of
from coordinator.serving.gateway import Gateway
from unicluster.errors import NotFoundError, shown

# Clients ask until when a model is loaded: for as long as `serve` runs.
FOR_EVER = timedelta(days=365)


def tags(gateway: Gateway, since_s: float) -> Json:
    """The answer of /api/tags: one model, loaded since `since_s` (1970 UTC)."""
    return {"models": [{**_entry(gateway), "modified_at": _time(since_s)}]}


def running(gateway: Gateway) -> Json:
    """The answer of /api/ps: the model, once it can answer."""
    if gateway.why_not:
        return {"models": []}
    entry = _entry(gateway)
    expires = (datetime.now(UTC) + FOR_EVER).isoformat()
    context = gateway.info().context
    memory = {"size_vram": entry["size"], "context_length": context, "expires_at": expires}
    return {"models": [{**entry, **memory}]}


async def show(gateway: Gateway, since_s: float, body: object) -> Json:
    """The answer of /api/show. Raises NotFoundError for another model.

    What the model can do beside answering is known of its tokenizer: not before it is loaded.
    """
    fields = Fields(body)
    name = fields.text("model") or fields.text("name") or ""
    fields.flag("verbose")
    fields.done()
    served = gateway.service.names if gateway.service is not None else {gateway.display}
    if name_of(name) not in {*served, model_name(gateway)}:
        raise NotFoundError(f"model: {shown(name)} is not served, {gateway.display!r} is")
    info = gateway.info() if gateway.why_not else await gateway.describe()
    able = {"completion": True, "tools": info.tools, "thinking": info.reasons}
    return {
        "details": _details(gateway),
        "model_info": {
            "general.architecture": "unicluster",
            "unicluster.context_length": info.context,
        },
        "capabilities": [name for name, can in able.items() if can],
        "modified_at": _time(since_s),
        "template": "",
        "parameters": "",
        "modelfile": "",
        "license": "",
    }


def _entry(gateway: Gateway) -> Json:
    name = f"{model_name(gateway)}:latest"
    size = sum(stage.weight_bytes for stage in gateway.info().stages)
    return {"name": name, "model": name, "size": size, "digest": "", "details": _details(gateway)}


def _details(gateway: Gateway) -> Json:
    return {
        "parent_model": "",
        "format": "",
        "family": "unicluster",
        "families": ["unicluster"],
        "parameter_size": "",
        "quantization_level": gateway.info().quant,
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
