"""Proof, as a stage is loaded, that llama.cpp computes with exactly the tensors of its layers.

A layer that llama.cpp takes for another kind, because of its number, is computed without some of
its tensors, or with others than its own: that must be an error, and never a wrong text.
"""

import re
from typing import TYPE_CHECKING

from node.ggml.cut import Gguf
from node.ggml.layers import Layers
from node.ggml.library import tensor_name, tensor_sources
from node.ggml.stage_file import Part
from unicluster.errors import StageError

if TYPE_CHECKING:
    from collections.abc import Iterable

# On its way to another device a tensor's name gets its backend before, and a number behind.
_TENSOR = re.compile(rb"(?:^|#)(blk\.\d+\.[\w.]+)(?:#|$)")
# Not for the computation of an answer, or only for some numbers of tokens.
_UNUSED = re.compile(r"blk\.\d+\.(?:nextn\..*|vis_.*|rope_factors_\w+\.weight|rope_freqs\.weight)")


class Used:
    """Names of the layers' tensors that nodes of a graph take."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def note(self, node: int) -> None:
        """Notes the sources of the node at an address."""
        for source in tensor_sources(node):
            if match := _TENSOR.search(tensor_name(source)):
                self.names.add(match[1].decode(errors="replace"))


def check_graph(layers: Layers, gguf: Gguf, part: Part) -> None:
    """Computes one token with a stage of a cut model; a whole one is left to llama.cpp.

    Raises StageError unless all tensors of the stage's layers take part in it.
    """
    if (part.first, part.end) == (0, gguf.layers):
        return
    used = Used()
    layers.trace(used.note)
    pieces = gguf.pieces(part.first, part.end, part.has_lm_head)
    wanted = {piece.name for piece in pieces if piece.name.startswith("blk.")}
    left = wanted - used.names
    if unused := sorted(name for name in left if not _UNUSED.fullmatch(name)):
        raise StageError(
            f"{gguf.header.architecture}: llama.cpp computes layers {part.first} to "
            f"{part.end - 1} without {_original(unused[0], part.first)}"
            f"{_more(unused)}, so it takes a layer for another kind: this GGUF can't be cut there"
        )


def _original(name: str, first: int) -> str:
    """A tensor's name in the whole model."""
    _, number, rest = name.split(".", 2)
    return f"blk.{int(number) + first}.{rest}"


def _more(names: "Iterable[str]") -> str:
    others = len(list(names)) - 1
    return f" and {others} other tensors" if others else ""
