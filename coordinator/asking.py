"""What a person means by MODEL, and what it weighs in each form that might do."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coordinator import catalog
from coordinator.placement import Layout
from coordinator.shortfall import Alternative, for_users, halves
from unicluster.errors import InputError
from unicluster.v1.node_pb2 import InspectRequest, ModelLayout

# Answers several requests for a layout.
Inspect = Callable[[Sequence[InspectRequest]], Sequence[ModelLayout]]


@dataclass(frozen=True)
class Asked:
    """A model, and the request that tells its layout. `quants`: others that could be asked for."""

    display: str
    quant: str
    request: InspectRequest
    quants: tuple[str, ...]


def ask(name: str, quant: str | None, context: int, users: int, kv_bits: int = 0) -> Asked:
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
        return Asked(source.display, quant, request, entry.quants)
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
    return Asked(shown, request.quant, request, catalog.QUANTS)


def layout_of(asked: Asked, inspect: Inspect) -> Layout:
    """What it weighs."""
    layout = Layout.from_proto(inspect([asked.request])[0])
    return layout if not asked.quant else replace(layout, quant=asked.quant)


def alternatives(asked: Asked, inspect: Inspect) -> Callable[[Layout], list[list[Alternative]]]:
    """Every smaller form of the model, exactly: in each quantization, context, and users."""

    def options(layout: Layout) -> list[list[Alternative]]:
        smaller = _smaller_quants(asked, layout)
        contexts = halves(layout.context, 1024)
        requests = [_changed(asked.request, quant=quant) for quant in smaller.values()]
        requests += [_changed(asked.request, context=context) for context in contexts]
        flags = [f"--quant {quant}" for quant in smaller]
        flags += [f"--context {context}" for context in contexts]
        found = [Layout.from_proto(answer) for answer in inspect(requests)] if requests else []
        forms = [Alternative(*pair) for pair in zip(flags, found, strict=True)]
        fewer = [Alternative(f"--users {n}", for_users(layout, n)) for n in halves(layout.users, 1)]
        return [forms[: len(smaller)], forms[len(smaller) :], fewer]

    return options


def _smaller_quants(asked: Asked, layout: Layout) -> dict[str, str]:
    """Quantizations of fewer bits, the most bits first, each with what a request calls it."""
    if layout.quantized and not asked.quant:
        return {}  # as stored: it can't be quantized again
    entry = catalog.find(asked.display.split(" ")[0])
    recipes = entry.recipes if entry is not None else {}
    order = [quant for quant in reversed(catalog.QUANTS) if quant in asked.quants]
    now = order.index(asked.quant) if asked.quant in order else 0
    return {quant: recipes.get(quant, quant) for quant in order[now + 1 :] if quant != "none"}


def _changed(request: InspectRequest, **fields: str | int) -> InspectRequest:
    copy = InspectRequest()
    copy.CopyFrom(request)
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy
