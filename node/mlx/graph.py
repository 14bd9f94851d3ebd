"""Dependencies between arrays, read off MLX's lazy graph."""

from collections.abc import Hashable, Sequence
from typing import TypeVar

import mlx.core as mx

from node.mlx.compat import Edge, lazy_graph

Source = TypeVar("Source", bound=Hashable)
Sink = TypeVar("Sink", bound=Hashable)


def dependencies(
    sinks: Sequence[tuple[Sink, mx.array]], sources: Sequence[tuple[Source, mx.array]]
) -> dict[Sink, set[Source]]:
    """For each sink the sources that it was computed from, but not through another source.

    Several arrays may go by one name. All must be `compat.marked`. Nothing is evaluated.
    """
    names = {f"source {i}": source for i, (source, _) in enumerate(sources)}
    arrays = dict(zip(names, (array for _, array in sources), strict=True))
    arrays |= {f"sink {i}": array for i, (_, array) in enumerate(sinks)}
    reached: dict[str, set[Source]] = {}
    # Inputs come before what is computed from them, so one pass is enough. A compiled function is
    # one node however often it runs: each time it is announced it starts anew.
    for part in lazy_graph(arrays):
        if isinstance(part, Edge):
            before = part.before
            origins = {names[before]} if before in names else reached.get(before, set())
            reached.setdefault(part.after, set()).update(origins)
        else:
            reached.pop(part.name, None)
    used: dict[Sink, set[Source]] = {}
    for i, (sink, _) in enumerate(sinks):
        used.setdefault(sink, set()).update(reached.get(f"sink {i}", set()))
    return used
