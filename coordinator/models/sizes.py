"""Sizes of the catalogue's models: `python -m coordinator.models.sizes` stores them."""

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from coordinator.models.catalog import QUANTS, Entry, entries
from coordinator.models.inspect_child import layouts
from coordinator.models.question import ask
from coordinator.planning.placement import Layout

FILE = "sizes.json"


@cache
def stored() -> dict[str, Any]:
    """Parameters by model, and bytes of weights by quantization."""
    text = resources.files("coordinator.models").joinpath(FILE).read_text("utf-8")
    sizes: dict[str, Any] = json.loads(text)
    return sizes


def computed(models: Sequence[Entry]) -> dict[str, Any]:
    """Parameters and bytes by model, from its configuration. Takes a second for each."""
    asked = [(e, q, ask(e.id, q, 0, 1).request) for e in models for q in QUANTS if q in e.quants]
    sizes: dict[str, Any] = {e.id: {"parameters": 0, "bytes": {}} for e in models}
    for (entry, quant, _), answer in zip(asked, layouts([r for _, _, r in asked]), strict=True):
        layout = Layout.from_proto(answer)
        sizes[entry.id]["parameters"] = layout.parameters
        sizes[entry.id]["bytes"][quant] = layout.weight_bytes
    return sizes


def main() -> None:
    rows = [f'"{model}": {json.dumps(row)}' for model, row in computed(entries()).items()]
    text = "{\n" + ",\n".join(rows) + "\n}\n"
    (Path(__file__).parent / FILE).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
