"""Which arrays an array was computed from, read off MLX's lazy graph."""

import io
from collections.abc import Hashable, Sequence
from typing import TypeVar

import mlx.core as mx

Source = TypeVar("Source", bound=Hashable)
Sink = TypeVar("Sink", bound=Hashable)


def marked(array: mx.array) -> mx.array:
    """The same values as an array of its own in the graph, so that it can be told apart."""
    return mx.stop_gradient(array)


def dependencies(
    sinks: Sequence[tuple[Sink, mx.array]], sources: Sequence[tuple[Source, mx.array]]
) -> dict[Sink, set[Source]]:
    """For each sink the sources that it was computed from, but not through another source.

    Several arrays may go by one name. All must be `marked`. Nothing is evaluated.
    """
    names = {f"source {i}": source for i, (source, _) in enumerate(sources)}
    arrays = dict(zip(names, (array for _, array in sources), strict=True))
    arrays |= {f"sink {i}": array for i, (_, array) in enumerate(sinks)}
    dot = io.StringIO()
    mx.export_to_dot(dot, **arrays)
    reached: dict[str, set[Source]] = {}
    # Inputs come before what is computed from them, so one pass is enough. A compiled function is
    # one node however often it runs: each time it is announced it starts anew.
    for line in dot.getvalue().splitlines():
        before, arrow, after = (part.strip('"') for part in line.partition(" -> "))
        if arrow:
            found = {names[before]} if before in names else reached.get(before, set())
            reached.setdefault(after, set()).update(found)
        elif "[label" in line:
            reached.pop(line.strip("{ ").partition(" ")[0], None)
    used: dict[Sink, set[Source]] = {}
    for i, (sink, _) in enumerate(sinks):
        used.setdefault(sink, set()).update(reached.get(f"sink {i}", set()))
    return used
