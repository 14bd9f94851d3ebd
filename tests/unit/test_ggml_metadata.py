"""Damaged metadata of GGUFs is one line that names the key: nothing is divided by 0 or made up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from node.ggml.cutting.checked import check_layer_numbers, check_metadata
from node.ggml.cutting.kinds import layer_kinds, recurrent_layers
from node.ggml.load import open_gguf
from tests.support.tiny_gguf import ARCHITECTURES, write_gguf
from unicluster.checkpoints.fingerprint import whole
from unicluster.checkpoints.gguf import Header, parse, read_header
from unicluster.errors import InputError

HEADS, KV_HEADS = "attention.head_count", "attention.head_count_kv"
PATTERN, WINDOW = "attention.sliding_window_pattern", "attention.sliding_window"
RECURRENT, INTERVAL = "attention.recurrent_layers", "full_attention_interval"


def header_of(file: Path, architecture: str, stated: dict[str, Any]) -> Header:
    """A header without tensors, with a tiny model's metadata and what is `stated`."""
    _, own = ARCHITECTURES.get(architecture, (None, {}))
    common = {"block_count": 6, HEADS: 4, KV_HEADS: 2, "feed_forward_length": 128}
    writer = gguf.GGUFWriter(str(file), architecture)
    for key, value in (common | own | stated).items():
        name = f"{architecture}.{key}"
        match value:
            case bool():
                writer.add_bool(name, value)
            case int() if value < 0:
                writer.add_int32(name, value)
            case int():
                writer.add_uint64(name, value) if value >> 32 else writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
            case _:
                writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return parse(file.read_bytes())


DAMAGED: list[tuple[str, dict[str, Any], str]] = [
    # Numbers that can't be.
    ("llama", {"block_count": 0}, "block_count is 0, instead of a whole number from 1 to 512"),
    ("llama", {"block_count": -6}, "block_count is -6"),
    ("llama", {"block_count": 513}, "block_count is 513"),
    ("llama", {"block_count": "six"}, "block_count is 'six'"),
    ("llama", {"block_count": 6.0}, "block_count is 6.0"),
    ("llama", {"block_count": [6]}, "block_count has 1 values, instead of one"),
    ("llama", {"context_length": -1}, "context_length is -1"),
    ("llama", {"embedding_length": 0}, "embedding_length is 0"),
    ("llama", {"attention.key_length": -16}, "attention.key_length is -16"),
    ("llama", {"vocab_size": 1 << 40}, "vocab_size is 1099511627776"),
    # Layers that are none.
    ("glm4moe", {"nextn_predict_layers": 6}, "nextn_predict_layers is 6, of 6 layers"),
    ("glm4moe", {"nextn_predict_layers": -1}, "nextn_predict_layers is -1"),
    ("deepseek2", {"leading_dense_block_count": -1}, "leading_dense_block_count is -1"),
    ("gemma4", {"attention.shared_kv_layers": -2}, "attention.shared_kv_layers is -2"),
    # Arrays of another length, or of other things.
    ("llama", {HEADS: [4] * 5}, f"{HEADS} has 5 values, for 6 layers"),
    ("llama", {HEADS: [4] * 7}, f"{HEADS} has 7 values, for 6 layers"),
    ("llama", {KV_HEADS: [2, 2, -1, 2, 2, 2]}, f"{KV_HEADS} is -1 for a layer"),
    ("llama", {HEADS: ["4"] * 6}, f"{HEADS} is '4' for a layer"),
    ("llama", {"feed_forward_length": [128] * 3}, "feed_forward_length has 3 values"),
    ("gemma3", {PATTERN: [True] * 5}, f"{PATTERN} has 5 values, for 6 layers"),
    ("gemma3", {PATTERN: "all"}, f"{PATTERN} is 'all'"),
    ("qwen3next", {RECURRENT: [True, False]}, f"{RECURRENT} has 2 values, for 6 layers"),
    ("glm-dsa", {"attention.indexer.types": [1, 0]}, "attention.indexer.types has 2 values"),
    ("glm-dsa", {"attention.indexer.types": 1}, "attention.indexer.types is no array"),
    ("deepseek4", {"attention.compress_ratios": [4] * 5}, "attention.compress_ratios has 5 values"),
    # Periods.
    ("qwen3next", {INTERVAL: 0}, f"{INTERVAL} is 0, instead of a whole number from 1"),
    ("qwen3next", {INTERVAL: -4}, f"{INTERVAL} is -4"),
    ("gemma3", {PATTERN: -6}, f"{PATTERN} is -6"),
    ("gemma3", {PATTERN: 1}, f"{PATTERN} leaves no layer a window"),
    ("gemma3", {PATTERN: [False] * 6}, f"{PATTERN} leaves no layer a window"),
    ("llama4", {"interleave_moe_layer_step": -2}, "interleave_moe_layer_step is -2"),
    # Values that contradict one another.
    ("gpt-oss", {WINDOW: 0}, f"{WINDOW} is 0"),
    ("llama", {KV_HEADS: 3}, f"{KV_HEADS} is 3 for 4 heads of layer 0"),
    ("deci", {KV_HEADS: [2, 2, 2, 3, 2, 2]}, f"{KV_HEADS} is 3 for 4 heads of layer 3"),
    ("qwen3moe", {"expert_used_count": 5}, "expert_used_count is 5, of 4 experts"),
    ("qwen3moe", {"expert_used_count": 0}, "expert_used_count is 0, of 4 experts"),
    ("qwen3moe", {"expert_count": 2000}, "expert_count is 2000"),
    ("qwen3moe", {"expert_group_count": 3}, "expert_group_count is 3, of 4 experts"),
    ("qwen3moe", {"expert_group_count": 2}, "expert_group_used_count is 0, of 2 groups"),
]


@pytest.mark.parametrize(("architecture", "stated", "said"), DAMAGED)
def test_damaged_metadata_is_refused_by_its_key(
    tmp_path: Path, architecture: str, stated: dict[str, Any], said: str
) -> None:
    file = tmp_path / "model.gguf"
    header = header_of(file, architecture, stated)

    with pytest.raises(InputError) as caught:
        check_metadata(file, header)

    text = str(caught.value)
    assert text.startswith(f"{file}: damaged metadata: {architecture}.{said}")
    assert "\n" not in text


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_said_against_sound_metadata(tmp_path: Path, architecture: str) -> None:
    check_metadata(tmp_path, header_of(tmp_path / "model.gguf", architecture, {}))


def test_unequal_heads_are_taken_where_llama_cpp_knows_them(tmp_path: Path) -> None:
    unequal = {HEADS: [4, 2, 4, 8, 4, 2], KV_HEADS: [2, 1, 2, 4, 1, 2]}
    check_metadata(tmp_path, header_of(tmp_path / "model.gguf", "deci", unequal))
    with pytest.raises(InputError, match=r"llama\.attention\.head_count is \[2, 4, 8\] by layer"):
        check_metadata(tmp_path, header_of(tmp_path / "model.gguf", "llama", unequal))
    equal = {HEADS: [4] * 6, KV_HEADS: [2] * 6}
    check_metadata(tmp_path, header_of(tmp_path / "model.gguf", "llama", equal))


@pytest.mark.parametrize("key", ["feed_forward_length", "expert_feed_forward_length"])
def test_unequal_widths_are_taken_where_llama_cpp_knows_them(tmp_path: Path, key: str) -> None:
    unequal = {key: [128, 64, 128, 256, 64, 128]}
    check_metadata(tmp_path, header_of(tmp_path / "model.gguf", "nemotron_h", unequal))
    for architecture in ("llama", "qwen3moe", "lfm2"):
        reason = rf"{architecture}\.{key} is \[64, 128, 256\] by layer"
        with pytest.raises(InputError, match=reason):
            check_metadata(tmp_path, header_of(tmp_path / "model.gguf", architecture, unequal))
    equal = {key: [128] * 6}
    check_metadata(tmp_path, header_of(tmp_path / "model.gguf", "llama", equal))


def test_a_period_of_0_is_a_window_for_all(tmp_path: Path) -> None:
    """As in llama.cpp; so is a period in a file, and an array of values."""
    file, flags = tmp_path / "model.gguf", [True, False, True, True, False, True]
    for stated, wanted in (
        ({PATTERN: 0}, [True] * 6),
        ({PATTERN: 3}, [True, True, False] * 2),
        ({PATTERN: flags}, flags),
        ({PATTERN: [*flags, False]}, flags),  # of a layer more, as some files have it
    ):
        assert layer_kinds(header_of(file, "gemma3", stated))[PATTERN] == wanted


def test_recurrent_layers_by_period_by_array_and_all_the_same(tmp_path: Path) -> None:
    file, flags = tmp_path / "model.gguf", [True, False, True, True, False, True]
    for stated, wanted in (
        ({INTERVAL: 2}, [True, False] * 3),
        ({RECURRENT: flags}, flags),
        ({RECURRENT: True}, [True] * 6),
    ):
        assert recurrent_layers(header_of(file, "qwen3next", stated)) == wanted


def test_windows_of_a_file_that_does_not_say_how_large_they_are(tmp_path: Path) -> None:
    """llama.cpp has a size of its own for some models; others have no windows then."""
    file = tmp_path / "model.gguf"

    assert layer_kinds(header_of(file, "gemma2", {}))[PATTERN] == [True, False] * 3
    assert PATTERN not in layer_kinds(header_of(file, "plamo3", {}))


def blocks(count: int) -> Callable[[Path], Path]:
    return lambda file: write_gguf(file, "llama", 6, metadata={"block_count": count})


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (4, r"damaged metadata: 4 layers, and there is blk\.4\.attn_k\.weight"),
        (8, r"there is no \S+ of layer 6|no a tensor of layer 6|blk\.6"),
    ],
    ids=["fewer", "more"],
)
def test_a_count_of_layers_that_the_tensors_do_not_have(
    tmp_path: Path, count: int, said: str
) -> None:
    file = blocks(count)(tmp_path / "model.gguf")

    with pytest.raises(InputError, match=said):
        open_gguf(whole(file))


@pytest.mark.parametrize("architecture", ["glm4moe", "deepseek2", "of-tomorrow"])
def test_only_layers_that_predict_further_tokens(tmp_path: Path, architecture: str) -> None:
    """As files for guessing are: llama.cpp crashes on some."""
    writer = gguf.GGUFWriter(str(file := tmp_path / "mtp.gguf"), architecture)
    for key, number in {"block_count": 7, "nextn_predict_layers": 1, "embedding_length": 8}.items():
        writer.add_uint32(f"{architecture}.{key}", number)
    for name in ("token_embd", "blk.6.attn_norm", "blk.6.nextn.eh_proj"):
        writer.add_tensor(f"{name}.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(InputError, match=r"mtp\.gguf: .* only layers that predict further tokens"):
        open_gguf(whole(file))


def test_a_layer_that_predicts_further_tokens_is_told_by_its_tensors(tmp_path: Path) -> None:
    """Else llama.cpp would take it for one of the model proper, and here it were left out."""
    stated = {"nextn_predict_layers": 1}
    header = read_header(write_gguf(tmp_path / "model.gguf", "glm4moe", 6, metadata=stated))

    with pytest.raises(InputError, match=r"6 layers, of which 1 predict .* there is blk\.5\."):
        check_layer_numbers(tmp_path / "model.gguf", [header])

    tensors = header.tensors | {"blk.5.nextn.eh_proj.weight": header.tensors["output.weight"]}
    check_layer_numbers(tmp_path, [Header(header.metadata, tensors, header.end)])
