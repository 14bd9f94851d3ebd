"""Metadata of a stage's file: that of the model, as if its layers were all that there are."""

import struct
from collections.abc import Sequence

import numpy as np

from node.ggml.cutting.kinds import (
    HEADS_KEY,
    LITE_KEY,
    PATTERN_KEY,
    SHARED_KV_KEY,
    WINDOW_KEY,
    by_layer,
    is_lite,
    known,
    layer_count,
    layer_kinds,
)
from unicluster.checkpoints.gguf import ARRAY, BOOL, PLAIN, STRING, UINT32, Header, Value

# Arrays whose length is not the number of layers, even where it happens to be the same.
_NOT_BY_LAYER = ("rope.dimension_sections",)
# They may be longer than the model has layers.
_BY_LAYER = ("attention.compress_ratios", "swiglu_clamp_exp", "swiglu_clamp_shexp")
# By layer too, without the name of the architecture before.
_UNPREFIXED = "xielu."
# Images, which are not served: with these keys llama.cpp's input is wider.
_OF_IMAGES = ("n_deepstack_layers", "deepstack_mapping")
# Numbers of leading layers of another kind.
LEADING = ("leading_dense_block_count", "hash_layer_count")
_GATING_KEY, _SOFTMAX, _SIGMOID = "expert_gating_func", 1, 2
# llama.cpp: deepseek2 of so many layers and tokens is GLM-4.7-Flash.
_SIGMOID_LAYERS, _SIGMOID_TOKENS = (47, 48), 154880
FLOAT32, ENDLESS = 6, 1 << 30


def stage_metadata(header: Header, first: int, end: int, vocabulary: int) -> dict[str, Value]:
    """Metadata for the layers [first, end). vocabulary: rows of the embedding in the file."""
    name, blocks = header.architecture, int(header.arch("block_count"))
    metadata = {}
    for key, value in header.metadata.items():
        field = key.removeprefix(f"{name}.")
        if key.startswith(("tokenizer.", "split.")) or key == "general.alignment":
            continue
        if field in _OF_IMAGES:
            continue
        if (field != key or key.startswith(_UNPREFIXED)) and _is_by_layer(field, value, blocks):
            value = array(_kind(value), value.read()[first:end])
        metadata[key] = value
    fields = _by_number(header, first, end) | _of_total(header)
    metadata |= {f"{name}.{field}": value for field, value in fields.items()}
    metadata.pop(f"{name}.nextn_predict_layers", None)
    metadata[f"{name}.block_count"] = uint32(end - first)
    metadata[f"{name}.vocab_size"] = uint32(vocabulary)
    metadata["tokenizer.ggml.model"] = Value(STRING, text("no_vocab"))
    return metadata


def _is_by_layer(field: str, value: Value, blocks: int) -> bool:
    if value.length is None or field in _NOT_BY_LAYER:
        return False
    return value.length == blocks or (field in _BY_LAYER and value.length > blocks)


def _by_number(header: Header, first: int, end: int) -> dict[str, Value]:
    """What llama.cpp would derive from the numbers of these layers."""
    fields = {}
    for field, every in layer_kinds(header).items():
        flags = every[first:end]
        if field == PATTERN_KEY and not any(flags):
            if known(header).distinct:
                continue  # it has no windows at all
            # llama.cpp insists on a windowed layer: one whose window is never full.
            flags = [True for _ in flags]
            fields[WINDOW_KEY] = uint32(ENDLESS)
            base = header.metadata.get(f"{header.architecture}.rope.freq_base")
            if base is not None:
                fields["rope.freq_base_swa"] = base
        fields[field] = array(BOOL, flags)
    for field in LEADING:
        if (leading := header.arch(field)) is not None:
            fields[field] = uint32(min(max(leading - first, 0), end - first))
    if shared := int(header.arch(SHARED_KV_KEY, 0)):
        from_layer = layer_count(header) - shared
        fields[SHARED_KV_KEY] = uint32(max(end - max(from_layer, first), 0))
    return fields


def _of_total(header: Header) -> dict[str, Value]:
    """What llama.cpp would derive from the number of layers, or from the first layer's heads."""
    fields, name, count = {}, header.architecture, layer_count(header)
    if name == "minicpm" and header.arch("residual_scale") is None:
        fields["residual_scale"] = float32(float(np.float32(1.4) / np.sqrt(np.float32(count))))
    if name == "deepseek2":
        if is_lite(header):
            fields[LITE_KEY] = uint32(0)
        if not header.arch(_GATING_KEY):
            rows = header.arch("vocab_size") or len(header.get("tokenizer.ggml.tokens", ()))
            sigmoid = count in _SIGMOID_LAYERS and rows == _SIGMOID_TOKENS
            fields[_GATING_KEY] = uint32(_SIGMOID if sigmoid else _SOFTMAX)
    heads = by_layer(header, HEADS_KEY, count)
    if len(set(heads)) > 1 and heads[0]:
        usual = uint32(int(header.arch("embedding_length")) // heads[0])
        for field in ("attention.key_length", "attention.value_length"):
            if header.arch(field) is None:
                fields[field] = usual
    return fields


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def uint32(number: int) -> Value:
    return Value(UINT32, struct.pack("<I", number))


def float32(number: float) -> Value:
    return Value(FLOAT32, struct.pack("<f", number))


def array(kind: int, values: Sequence[object]) -> Value:
    head = struct.pack("<IQ", kind, len(values))
    if kind == STRING:
        return Value(ARRAY, head + b"".join(text(str(value)) for value in values))
    return Value(ARRAY, head + struct.pack(f"<{len(values)}{PLAIN[kind]}", *values))


def _kind(value: Value) -> int:
    return int(struct.unpack_from("<I", value.raw)[0])
