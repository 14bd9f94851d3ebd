"""`unicluster.load`: any model on several processes or machines, as an ordinary mlx-lm model."""

from collections.abc import Sequence
from typing import Any

from unicluster.errors import InputError


def load(
    model: str,
    *,
    local_nodes: int | None = None,
    nodes: Sequence[str] | None = None,
    quant: str = "",
) -> tuple[Any, Any]:
    """A model and its tokenizer for any mlx-lm function; this process becomes the head.

    Args:
        model: a directory, a hub repository id, a catalogue name, or "demo".
        local_nodes: cut the model into that many stages on this machine; this process holds
            the first, worker processes the others.
        nodes: agents to put stages on besides this process, each `HOST:PORT` or the name of
            a machine of this cluster; this process holds the first stage.
        quant: q2, q3, q4, q6 or q8 to quantize on load; default as stored.

    Returns `(model, tokenizer)`. The model gives the same logits as the whole model. Its
    `close()`, or the end of the process, frees the memory everywhere.

    Raises InputError, NotFoundError, DoesNotFitError, StageError or UnavailableError.

    Example:
        >>> model, tokenizer = unicluster.load("demo", local_nodes=3)
        >>> mlx_lm.generate(model, tokenizer, "What is 2 + 3?")
    """
    if (local_nodes is None) == (nodes is None):
        raise InputError("load: give either local_nodes=N or nodes=[...]")
    from coordinator.catalog import resolve
    from node.layout import inspect
    from node.loader import load_local, load_on_nodes

    source = resolve(model, quant or None)
    layout = inspect(source.model, source.quant)
    if nodes is not None:
        from coordinator.members import place_from_here

        cuts, stops, identity = place_from_here(layout, nodes)
        return load_on_nodes(source.model, source.quant, cuts, stops, identity)

    from coordinator.planner import Layout, split_evenly

    layers = len(layout.layer_bytes)
    if local_nodes is None or not 1 <= local_nodes <= layers:
        raise InputError(f"local_nodes: between 1 and {layers}, the layers of {model}")
    cuts = split_evenly(Layout.from_proto(layout), local_nodes)
    return load_local(source.model, source.quant, cuts)
