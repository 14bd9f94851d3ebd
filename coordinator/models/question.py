"""A model that a person requested by name, and the sizes of its variants."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from coordinator.models import catalog
from coordinator.planning.engines import ENGINES
from coordinator.planning.placement import Layout
from coordinator.planning.shortfall import Alternative, for_users, halves
from coordinator.planning.variants import ModelVariants, check_same
from unicluster.errors import InputError
from unicluster.v1.node_pb2 import InspectRequest, ModelLayout

# Answers several requests for a layout.
Inspect = Callable[[Sequence[InspectRequest]], Sequence[ModelLayout]]


@dataclass(frozen=True)
class RequestedModel:
    """A model by name, with the request for its layout. `quants`: all that could be requested.

    gguf: the request for the same model as a GGUF. hypothetical_gguf: plan with a hypothetical one
    of about the same size, if there is no request for it. engine: mlx, ggml, or auto (the
    faster one).
    """

    display: str
    quant: str
    request: InspectRequest
    quants: tuple[str, ...]
    gguf: InspectRequest | None = None
    gguf_display: str = ""
    hypothetical_gguf: bool = False
    engine: str = "auto"

    @property
    def requests(self) -> list[InspectRequest]:
        return [self.request] if self.gguf is None else [self.request, self.gguf]


def ask(name: str, quant: str | None, context: int, users: int, kv_bits: int = 0) -> RequestedModel:
    """A catalogue name, a config.json, a directory, a hub repository or demo.

    Raises InputError or NotFoundError as `catalog.resolve` does.
    """
    request = InspectRequest(model=name, context=context, users=users, kv_bits=kv_bits)
    entry = catalog.find(name)
    if entry is not None:
        quant = quant or catalog.DEFAULT_QUANT
        source = catalog.resolve(name, quant)
        if quant not in entry.quants:
            raise InputError(f"{entry.id} comes quantized: --quant {' or '.join(entry.quants)}")
        request.model, request.config_json = source.display, json.dumps(entry.config)
        request.quant = "" if quant == "none" else entry.recipes.get(quant, quant)
        return RequestedModel(source.display, quant, request, entry.quants)
    if name.endswith(".json"):
        path = Path(name).expanduser()
        try:
            request.config_json = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{name}: can't be read: {error}") from error
        request.model = display = path.parent.absolute().name or name
    else:
        source = catalog.resolve(name)
        request.model, display = source.model, source.display
    request.quant = "" if quant in (None, "none") else str(quant)
    shown = f"{display} {request.quant}" if request.quant else display
    return RequestedModel(shown, request.quant, request, catalog.QUANTS)


def with_gguf(requested: RequestedModel, name: str) -> RequestedModel:
    """A requested model with a GGUF of it besides. Raises what `catalog.resolve` does."""
    source = catalog.resolve(name)
    gguf = _changed(requested.request, model=source.model, quant="", config_json="")
    return replace(requested, gguf=gguf, gguf_display=source.display)


def variants_of(requested: RequestedModel, answers: Sequence[ModelLayout]) -> ModelVariants:
    """The sizes of a model's variants; `answers` are those to `requested.requests`.

    Raises InputError where no variant is for the requested engine, or the GGUF is another model.
    """
    hypothetical = ModelVariants.with_hypothetical_gguf(answers[0])
    layout = hypothetical.layout
    if requested.quant not in ("", "none"):
        layout = replace(layout, quant=requested.quant)
    variants = ModelVariants(layout)
    if requested.gguf is not None:
        gguf = Layout.from_proto(answers[1])
        check_same(layout, gguf, (requested.display, requested.gguf_display))
        variants = ModelVariants(layout, gguf)
    elif requested.hypothetical_gguf:
        variants = replace(hypothetical, layout=layout)
    return variants.only(requested.engine)


def alternatives(
    requested: RequestedModel, inspect: Inspect
) -> Callable[[ModelVariants], list[list[Alternative]]]:
    """Every smaller variant of the model, exactly: in each quantization, context, and users."""

    def options(variants: ModelVariants) -> list[list[Alternative]]:
        quants = _smaller_quants(requested, variants)
        contexts = halves(variants.layout.context, 1024)
        smaller = [(f"--quant {quant}", _quantized(requested, q)) for quant, q in quants.items()]
        smaller += [(f"--context {tokens}", _for_context(requested, tokens)) for tokens in contexts]
        answers = iter(inspect([r for _, other in smaller for r in other.requests]))
        smaller_variants = [
            Alternative(flag, variants_of(other, [next(answers) for _ in other.requests]))
            for flag, other in smaller
        ]
        fewer = [
            Alternative(f"--users {n}", variants.map(partial(for_users, users=n)))
            for n in halves(variants.layout.users, 1)
        ]
        return [smaller_variants[: len(quants)], smaller_variants[len(quants) :], fewer]

    return options


def _quantized(requested: RequestedModel, quant: str) -> RequestedModel:
    return replace(requested, request=_changed(requested.request, quant=quant), quant=quant)


def _for_context(requested: RequestedModel, context: int) -> RequestedModel:
    gguf = None if requested.gguf is None else _changed(requested.gguf, context=context)
    return replace(requested, request=_changed(requested.request, context=context), gguf=gguf)


def _smaller_quants(requested: RequestedModel, variants: ModelVariants) -> dict[str, str]:
    """Quantizations of fewer bits, the most bits first, each with what a request calls it."""
    as_stored = variants.layout.quantized and not requested.quant
    if as_stored or (ENGINES[variants.layout.engine].reads_gguf and not variants.hypothetical):
        return {}  # it can't be quantized again
    entry = catalog.find(requested.display.split(" ")[0])
    recipes = entry.recipes if entry is not None else {}
    order = [quant for quant in reversed(catalog.QUANTS) if quant in requested.quants]
    now = order.index(requested.quant) if requested.quant in order else 0
    return {quant: recipes.get(quant, quant) for quant in order[now + 1 :] if quant != "none"}


def _changed(request: InspectRequest, **fields: str | int) -> InspectRequest:
    copy = InspectRequest()
    copy.CopyFrom(request)
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy
