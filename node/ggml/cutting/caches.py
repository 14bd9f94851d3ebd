"""Sizes of what llama.cpp keeps for each layer: KV caches and recurrent states."""

from node.ggml.cutting.kinds import (
    HEADS_KEY,
    INDEXER_KEY,
    KV_HEADS_KEY,
    PATTERN_KEY,
    RATIOS_KEY,
    attending_layers,
    by_layer,
    layer_count,
    layer_kinds,
    recurrent_layers,
)
from unicluster.checkpoints.gguf import Header

# Every layer of these has a state and a KV cache.
_BOTH = frozenset(("falcon-h1",))
# llama-kv-cache-dsv4.cpp: layers that choose tokens, and how cells are rounded up.
_CHOOSING_RATIO, _CELLS = 4, 256
# The part of a KV cache that may wait on the host, of a model with recurrent states.
HOST_SHARE = 4
_RECURRENT = frozenset(("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"))


def cache_bytes(header: Header, cells: int, sequences: int, number: int) -> list[int]:
    """Bytes of each layer's caches.

    cells: tokens of all sequences together. sequences: recurrent states. number: bytes of a number
    in a KV cache.
    """
    if any(ratios := by_layer(header, RATIOS_KEY, layer_count(header))):
        return [_compressed(header, cells, sequences, number, ratio) for ratio in ratios]
    return [
        cells * number * width + sequences * state
        for width, state in zip(kv_widths(header), states(header), strict=True)
    ]


def host_bytes(header: Header, cells: int, sequences: int, number: int) -> list[int]:
    """Bytes of each layer's caches on the host, at most, while others need their places.

    Arguments as of cache_bytes. Half as many states again as llama.cpp keeps, and the keys and
    values of a part of its cells; none of models without states, which have places enough.
    """
    if any(by_layer(header, RATIOS_KEY, layer_count(header))):
        most = max(1, sequences // HOST_SHARE)
        return cache_bytes(header, cells, most, number)
    fixed = states(header)
    if not any(fixed):
        return [0] * len(fixed)
    return [
        cells * number * width // HOST_SHARE + 3 * sequences // 2 * state
        for width, state in zip(kv_widths(header), fixed, strict=True)
    ]


def _compressed(header: Header, cells: int, sequences: int, number: int, ratio: int) -> int:
    """As llama_kv_cache_dsv4: each sequence has a cache of its own, of `cells` tokens."""
    head = int(header.arch("attention.key_length"))
    indexer = int(header.arch("attention.indexer.key_length", 0))
    size = cells * head * number
    if ratio:
        compressed = -(-max(-(-cells // ratio), 1) // _CELLS) * _CELLS
        size += compressed * head * number
        rows, width = (2 * ratio, 2 * head) if ratio == _CHOOSING_RATIO else (ratio, head)
        size += 2 * 4 * rows * width
        if ratio == _CHOOSING_RATIO:
            size += compressed * indexer * number + 2 * 4 * rows * 2 * indexer
    return sequences * size


def kv_widths(header: Header) -> list[int]:
    """Numbers that each layer caches for each token."""
    count = layer_count(header)
    if header.architecture in _RECURRENT:
        return [0] * count
    attending = [True] * count if header.architecture in _BOTH else attending_layers(header)
    kv = by_layer(header, KV_HEADS_KEY, count) if header.arch(KV_HEADS_KEY) is not None else None
    heads = kv or by_layer(header, HEADS_KEY, count)
    windows = layer_kinds(header).get(PATTERN_KEY, [False] * count)
    return [
        (_kv_width(header, heads[layer], windows[layer]) + _indexer_width(header, layer))
        * attending[layer]
        for layer in range(count)
    ]


def _kv_width(header: Header, kv_heads: int, windowed: bool) -> int:
    arch = header.arch
    heads = arch(HEADS_KEY, 0)
    first = heads[0] if isinstance(heads, list) else heads
    usual = int(arch("embedding_length")) // first if first else 0
    keys = int(arch("attention.key_length", usual))
    values = int(arch("attention.value_length", usual))
    if windowed:
        keys = int(arch("attention.key_length_swa", keys))
        values = int(arch("attention.value_length_swa", values))
    # With compressed attention the values are a part of the keys.
    return kv_heads * (keys if arch("attention.key_length_mla") is not None else keys + values)


def _indexer_width(header: Header, layer: int) -> int:
    """Beside keys and values are keys to choose by."""
    chooses = layer_kinds(header).get(INDEXER_KEY)
    if chooses is not None and not chooses[layer]:
        return 0
    if layer < int(header.arch("leading_dense_block_count", 0)) and _is_minimax(header):
        return 0
    return int(header.arch("attention.indexer.key_length", 0))


def _is_minimax(header: Header) -> bool:
    return header.architecture == "minimax-m3"


def states(header: Header) -> list[int]:
    """Bytes of each layer's recurrent state of one sequence, which llama.cpp keeps in float32."""
    count = layer_count(header)
    if header.architecture in _BOTH | _RECURRENT:
        recurrent = [True] * count
    else:
        recurrent = recurrent_layers(header)
    size = _state_bytes(header) if any(recurrent) else 0
    return [size * flag for flag in recurrent]


def _state_bytes(header: Header) -> int:
    """As llama_hparams::n_embd_r and n_embd_s."""
    arch = header.arch
    embedding = int(arch("embedding_length"))
    heads = by_layer(header, HEADS_KEY, 1)[0]
    inner, state = int(arch("ssm.inner_size", 0)), int(arch("ssm.state_size", 0))
    kernel = int(arch("ssm.conv_kernel", 0))
    if wkv := int(arch("wkv.head_size", 0)):
        numbers = embedding * (int(arch("token_shift_count", 2)) + wkv)
    elif short := int(arch("shortconv.l_cache", 0)):
        numbers = embedding * (short - 1) + state * inner
    elif kda := int(arch("kda.head_dim", 0)):
        numbers = 3 * (kernel - 1 if kernel else 3) * heads * kda + kda * kda * heads
    else:
        groups = int(arch("ssm.group_count", 0))
        numbers = max(kernel - 1, 0) * (inner + 2 * groups * state)
        linear = int(arch("attention.key_length", embedding // max(heads, 1)))
        is_linear = header.architecture == "minimax-01"
        numbers += linear * linear * heads if is_linear else state * inner
    return 4 * numbers
