"""Metadata that cutting and llama.cpp go by, checked before either does.

llama.cpp takes much of it as it comes: a period of 0 is divided by, and what contradicts itself
ends the process. An array that is too short would be read to its end, and the rest made up.
"""

import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from node.ggml.cutting.architectures import (
    KNOWN,
    UNEQUAL_EXPERTS,
    UNEQUAL_HEADS,
    UNEQUAL_WIDTHS,
    Architecture,
)
from node.ggml.cutting.kinds import (
    HEADS_KEY,
    INDEXER_KEY,
    INTERVAL_KEY,
    KV_HEADS_KEY,
    LOOPS_KEY,
    PATTERN_KEY,
    PER_LAYER_KEY,
    RATIOS_KEY,
    RECURRENT_KEY,
    SHARED_KV_KEY,
    WINDOW_KEY,
    by_layer,
    layer_count,
    layer_kinds,
)
from unicluster.checkpoints.gguf import Header, Value
from unicluster.errors import InputError

# llama-hparams.h: LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS.
MOST_LAYERS, MOST_EXPERTS = 512, 1024
MOST = (1 << 31) - 1
BLOCKS_KEY, NEXTN_KEY = "block_count", "nextn_predict_layers"
EXPERTS_KEY, USED_KEY = "expert_count", "expert_used_count"
GROUPS_KEY, GROUPS_USED_KEY = "expert_group_count", "expert_group_used_count"

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_PERIODS = {key for rule in KNOWN.values() for key in rule.every if isinstance(key, str)}
# Whole numbers, from the least to the greatest.
_NUMBERS: dict[str, tuple[int, int]] = {
    BLOCKS_KEY: (1, MOST_LAYERS),
    NEXTN_KEY: (0, MOST_LAYERS),
    "embedding_length": (1, MOST),
    EXPERTS_KEY: (0, MOST_EXPERTS),
    INTERVAL_KEY: (1, MOST),
    **dict.fromkeys(_PERIODS, (0, MOST)),
    **dict.fromkeys(
        (
            *("context_length", "vocab_size", "leading_dense_block_count", "hash_layer_count"),
            *(SHARED_KV_KEY, LOOPS_KEY, PER_LAYER_KEY, WINDOW_KEY, GROUPS_KEY, GROUPS_USED_KEY),
            *("attention.key_length", "attention.value_length", "attention.q_lora_rank"),
            *("attention.key_length_mla", "attention.value_length_mla", "attention.kv_lora_rank"),
            *("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count"),
            *("attention.indexer.key_length", "attention.indexer.top_k", "token_shift_count"),
            *("ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.group_count"),
            *("ssm.time_step_rank", "wkv.head_size", "shortconv.l_cache", "kda.head_dim"),
            *("hyper_connection.count", "expert_gating_func"),
        ),
        (0, MOST),
    ),
}
# Numbers that llama.cpp takes of the first layer for all, but of some architectures.
_UNEQUAL = {
    HEADS_KEY: UNEQUAL_HEADS,
    KV_HEADS_KEY: UNEQUAL_HEADS,
    "feed_forward_length": UNEQUAL_WIDTHS,
    "expert_feed_forward_length": UNEQUAL_EXPERTS,
}
# A whole number, or one for each of all layers.
_NUMBER_OR_ARRAY = (
    *(HEADS_KEY, KV_HEADS_KEY, USED_KEY, RECURRENT_KEY),
    *("feed_forward_length", "expert_feed_forward_length"),
)
# An array for each layer, which may go on; the first of them may be a period instead.
_ARRAYS = (PATTERN_KEY, INDEXER_KEY, RATIOS_KEY)


def check_metadata(file: Path, header: Header) -> None:
    """Raises InputError, naming the file and the key, for what can't be or contradicts itself."""
    name, wrong = header.architecture, ""
    if f"{name}.{BLOCKS_KEY}" in header.metadata:  # else it is no language model
        wrong = next(chain(_numbers(header), _arrays(header), _together(header)), "")
    if wrong:
        raise InputError(f"{file}: damaged metadata: {name}.{wrong}; copy the GGUF again")
    if name not in KNOWN:
        return
    for key, unequal in _UNEQUAL.items():
        numbers = set(by_layer(header, key, layer_count(header)))
        if len(numbers) > 1 and name not in unequal:
            raise InputError(
                f"{file}: {name}.{key} is {sorted(numbers)} by layer, which llama.cpp can't compute"
            )


def check_layer_numbers(file: Path, headers: Iterable[Header]) -> None:
    """Raises InputError where there are tensors of layers that the first header knows nothing of.

    Layers behind the model proper are those that predict further tokens, and nothing else; without
    any of the model proper llama.cpp would crash.
    """
    first, *others = headers
    blocks, count = int(first.arch(BLOCKS_KEY, 0)), layer_count(first)
    parts: dict[int, set[str]] = {}
    for header in (first, *others):
        for tensor in header.tensors:
            if match := _LAYER.fullmatch(tensor):
                parts.setdefault(int(match[1]), set()).add(match[2])
    if parts and min(parts) >= count:
        raise InputError(
            f"{file}: of {first.architecture} it has only layers that predict further tokens, and "
            f"none of the {count} of the model itself: name the GGUF of the model"
        )
    behind = sorted(layer for layer in parts if layer >= count)
    wrong = [n for n in behind if n >= blocks or not any(map(_predicts, parts[n]))]
    if wrong:
        stated = f"{blocks} layers"
        if blocks > count:
            stated += f", of which {blocks - count} predict further tokens"
        raise InputError(
            f"{file}: damaged metadata: {stated}, and there is blk.{wrong[0]}."
            f"{min(parts[wrong[0]])}; copy the GGUF again"
        )


def _predicts(tensor: str) -> bool:
    return tensor.startswith("nextn.")


def _numbers(header: Header) -> Iterable[str]:
    """Reasons why values of single numbers can't be."""
    for key, (least, most) in _NUMBERS.items():
        value = _value(header, key)
        if value is None:
            continue
        if value.length is not None:
            yield f"{key} has {value.length} values, instead of one"
        elif not _within(number := value.read(), least, most):
            yield f"{key} is {_shown(number)}, instead of a whole number from {least} to {most}"


def _arrays(header: Header) -> Iterable[str]:
    """Reasons why values that each layer has can't be."""
    blocks, count = int(header.arch(BLOCKS_KEY)), layer_count(header)
    if count < 1:
        yield f"{NEXTN_KEY} is {header.arch(NEXTN_KEY)}, of {blocks} layers"
        return
    for key in (*_NUMBER_OR_ARRAY, *_ARRAYS):
        value = _value(header, key)
        if value is None:
            continue
        least, exact = (blocks, True) if key in _NUMBER_OR_ARRAY else (count, False)
        read = value.read()
        if value.length is None and not exact and key != PATTERN_KEY:
            yield f"{key} is no array"
        elif value.length is not None and (len(read) < least or (exact and len(read) != least)):
            yield f"{key} has {len(read)} values, for {blocks} layers"
        values = [read] if value.length is None else read
        if bad := [each for each in values if not _within(each, 0, MOST)]:
            yield f"{key} is {_shown(bad[0])} for a layer, instead of a whole number"


def _together(header: Header) -> Iterable[str]:
    """Reasons why values contradict one another; llama.cpp ends the process for most of them."""
    rule, count = KNOWN.get(header.architecture, Architecture()), layer_count(header)
    heads, kv_heads = (by_layer(header, key, count) for key in (HEADS_KEY, KV_HEADS_KEY))
    for layer, (all_heads, kv) in enumerate(zip(heads, kv_heads, strict=True)):
        if all_heads and kv and all_heads % kv:
            yield f"{KV_HEADS_KEY} is {kv} for {all_heads} heads of layer {layer}"
    windows = layer_kinds(header).get(PATTERN_KEY)
    if windows and not any(windows):
        yield f"{PATTERN_KEY} leaves no layer a window"
    if rule.always and header.arch(WINDOW_KEY) == 0 and header.architecture != "llama4":
        yield f"{WINDOW_KEY} is 0"
    experts, groups = header.arch(EXPERTS_KEY, 0), header.arch(GROUPS_KEY, 0)
    used = max(by_layer(header, USED_KEY, count))
    if used > experts or (experts and not used):
        yield f"{USED_KEY} is {used}, of {experts} experts"
    if groups and (groups >= experts or experts % groups):
        yield f"{GROUPS_KEY} is {groups}, of {experts} experts"
    if groups > 1 and not 0 < header.arch(GROUPS_USED_KEY, 0) < groups:
        yield f"{GROUPS_USED_KEY} is {header.arch(GROUPS_USED_KEY, 0)}, of {groups} groups"


def _value(header: Header, key: str) -> Value | None:
    return header.metadata.get(f"{header.architecture}.{key}")


def _within(number: Any, least: int, most: int) -> bool:
    return isinstance(number, int) and least <= number <= most


def _shown(value: Any) -> str:
    """A value as far as a line has room for it."""
    return repr(value)[:40]
