"""A layer that llama.cpp builds as another kind is an error at load, and never a wrong text."""

from collections.abc import Mapping
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

from node.ggml import cut
from node.ggml.cut import Gguf, Piece
from node.ggml.cutting.metadata import array, stage_metadata, uint32
from tests.support.ggml_stages import Tiny
from unicluster.checkpoints.gguf import BOOL, UINT32, Header, Value
from unicluster.errors import StageError


def take_for(monkeypatch: pytest.MonkeyPatch, wrong: Mapping[str, Value]) -> None:
    """Has stages' files say something else of their layers than what the model says."""

    def metadata(header: Header, first: int, end: int, vocabulary: int) -> dict[str, Value]:
        stated = stage_metadata(header, first, end, vocabulary)
        return stated | {f"{header.architecture}.{key}": value for key, value in wrong.items()}

    monkeypatch.setattr(cut, "stage_metadata", metadata)


# An unused tensor: the layer's choice is left to the one before. Missing ones: those of experts
# for a dense layer, of attention for a recurrent one. Others than its own: the other way round.
WRONG: dict[str, tuple[str, int, Mapping[str, Value], str]] = {
    "a choice of another layer": (
        "glm-dsa",
        6,
        {"attention.indexer.types": array(UINT32, [1, 0, 0, 1])},
        r"glm-dsa: llama\.cpp computes layers 2 to 5 without blk\.4\.indexer\.\S+ and 4 other "
        r"tensors, so it takes a layer for another kind: this GGUF can't be cut there",
    ),
    "experts for a dense layer": (
        "deepseek2",
        6,
        {"leading_dense_block_count": uint32(1)},
        r"llama\.cpp can't load \S+: .*'blk\.0\.ffn_gate\.weight' not found",
    ),
    "attention for a recurrent layer": (
        "qwen3next",
        8,
        {"attention.recurrent_layers": array(BOOL, [True, True, False, True, True, False])},
        r"llama\.cpp can't load \S+: .*tensor 'blk\.1\.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_layer_taken_for_another_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    architecture, layers, wrong, said = WRONG[name]
    tiny = Tiny.make(tmp_path, architecture, layers)
    take_for(monkeypatch, wrong)

    with pytest.raises(StageError, match=said) as caught:
        tiny.stages(2, layers)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tensor", ["attn_norm.weight", "attn_q.bias", "attn_q_norm.weight"])
def test_a_tensor_that_a_stage_is_without_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str
) -> None:
    """Also one that llama.cpp could do without: it is in the model's header."""
    tiny = Tiny.make(tmp_path, "glm4moe")
    all_pieces, writing = Gguf.pieces, [True]

    def pieces(gguf: Gguf, first: int, end: int, has_lm_head: bool) -> list[Piece]:
        made = all_pieces(gguf, first, end, has_lm_head)
        left_out = f"blk.1.{tensor}" if writing else ""
        return [piece for piece in made if piece.name != left_out]

    write = cut.write

    def write_part(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        writing.clear()

    monkeypatch.setattr(Gguf, "pieces", pieces)
    monkeypatch.setattr("node.ggml.stage_file.write", write_part)

    with pytest.raises(StageError, match=rf"blk\.\d\.{tensor}"):
        tiny.stages(2, 6)
