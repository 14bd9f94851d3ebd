"""Kinds of a GGUF's layers, by number, and the layers before which it can be cut."""

from math import lcm

from node.ggml.cutting.architectures import KNOWN, NOT_CAUSAL, REFUSED, Architecture
from unicluster.checkpoints.gguf import Header
from unicluster.errors import StageError

WINDOW_KEY = "attention.sliding_window"
PATTERN_KEY = "attention.sliding_window_pattern"
RECURRENT_KEY = "attention.recurrent_layers"
INDEXER_KEY = "attention.indexer.types"
INTERVAL_KEY = "full_attention_interval"
HEADS_KEY, KV_HEADS_KEY = "attention.head_count", "attention.head_count_kv"
SHARED_KV_KEY = "attention.shared_kv_layers"
RATIOS_KEY = "attention.compress_ratios"
LOOPS_KEY = "num_loops"
PER_LAYER_KEY = "embedding_length_per_layer_input"
LITE_KEY = "attention.q_lora_rank"
# In GLM-5.2, which is made for so many tokens, not every layer chooses.
SHARED_FROM = 1 << 20


def known(header: Header) -> Architecture:
    """Raises StageError for what can't be served, because it is no causal language model.

    One that is not known here is left as it is: it can be served by one machine.
    """
    name = header.architecture
    if not name or name in NOT_CAUSAL:
        raise StageError(f"{name or 'no architecture'}: this GGUF is no language model for answers")
    if name in REFUSED:
        raise StageError(f"{name}: {REFUSED[name]}: use its safetensors, with MLX")
    return KNOWN.get(
        name,
        Architecture(uncut="which of its properties depend on a layer's number is not known here"),
    )


def layer_count(header: Header) -> int:
    """Layers of the model proper, without those that only predict further tokens."""
    blocks = int(header.arch("block_count", 0))
    return blocks - int(header.arch("nextn_predict_layers", 0))


def layer_kinds(header: Header) -> dict[str, list[bool]]:
    """Metadata with a value for each layer, where llama.cpp would go by the layer's number."""
    rule, count = known(header), layer_count(header)
    kinds: dict[str, list[bool]] = {}
    pattern = header.arch(PATTERN_KEY, rule.window)
    if isinstance(pattern, list):
        kinds[PATTERN_KEY] = [bool(flag) for flag in pattern[:count]]
    elif rule.window and header.arch(WINDOW_KEY, int(rule.always)):
        # As llama_hparams::set_swa_pattern: of a period of 0 all have a window, of 1 none.
        full = 0 if rule.full_first else pattern - 1
        kinds[PATTERN_KEY] = [not pattern or i % pattern != full for i in range(count)]
    if rule.interval and header.arch(RECURRENT_KEY) is not None:
        kinds[RECURRENT_KEY] = [bool(flag) for flag in by_layer(header, RECURRENT_KEY, count)]
    elif rule.interval:
        interval = int(header.arch(INTERVAL_KEY, rule.interval))
        kinds[RECURRENT_KEY] = [(i + 1) % interval != 0 for i in range(count)]
    if rule.indexer and header.arch("attention.indexer.top_k", 0):
        types = header.arch(INDEXER_KEY, choosing(count, header.arch("context_length", 0)))
        kinds[INDEXER_KEY] = [bool(flag) for flag in types[:count]]
    return kinds


def recurrent_layers(header: Header) -> list[bool]:
    """Whether each layer has a recurrent state instead of a KV cache; of neither: False."""
    count = layer_count(header)
    if not known(header).hybrid:
        return layer_kinds(header).get(RECURRENT_KEY, [False] * count)
    return [
        not heads and not (wide and header.architecture.startswith("nemotron_h"))
        for heads, wide in zip(
            by_layer(header, KV_HEADS_KEY, count),
            by_layer(header, "feed_forward_length", count),
            strict=True,
        )
    ]


def attending_layers(header: Header) -> list[bool]:
    """Whether each layer has a KV cache."""
    count = layer_count(header)
    if known(header).hybrid:
        return [bool(heads) for heads in by_layer(header, KV_HEADS_KEY, count)]
    return [not recurrent for recurrent in recurrent_layers(header)]


def by_layer(header: Header, key: str, count: int) -> list[int]:
    """Values of a key that is a number for all layers, or an array."""
    value = header.arch(key, 0)
    return (
        [int(each) for each in value[:count]] if isinstance(value, list) else [int(value)] * count
    )


def choosing(layers: int, context: int) -> list[bool]:
    """True for layers with an indexer for sparse attention, where the GGUF doesn't say."""
    return [context < SHARED_FROM or i < 2 or i % 4 == 2 for i in range(layers)]


def why_uncut(header: Header) -> str:
    """The reason why a model can't be cut at all; empty where it can."""
    rule, arch = known(header), header.arch
    if rule.uncut and not (header.architecture == "nanbeige" and int(arch(LOOPS_KEY, 1)) == 1):
        return rule.uncut
    if header.architecture == "llama4" and arch(WINDOW_KEY) == 0:
        return "llama.cpp computes the last layer without positions"
    if arch(PER_LAYER_KEY, 0):
        return "every layer takes an embedding of its own"
    if layer_count(header) in rule.total and not is_lite(header):
        return f"llama.cpp knows that of {layer_count(header)} layers by their number"
    return ""


def is_lite(header: Header) -> bool:
    """Whether it is a deepseek2 without low-rank queries, which llama.cpp knows by its layers."""
    return header.architecture == "deepseek2" and not header.arch(LITE_KEY)


def forbidden_counts(header: Header) -> tuple[int, ...]:
    """Numbers of layers that no stage may have."""
    return () if is_lite(header) else known(header).total


def period(header: Header) -> int:
    """Cuts must be at multiples of it."""
    rule = known(header)
    if header.architecture == "smallthinker" and not header.arch(WINDOW_KEY, 0):
        return 1
    return lcm(*(k if isinstance(k, int) else int(header.arch(k, 0)) or 1 for k in rule.every))


def why_not_before(header: Header, layer: int) -> str:
    """The reason why a stage can't begin with a layer, whatever its end; empty where it can."""
    rule, arch = known(header), header.arch
    if layer % (step := period(header)):
        return f"kinds of layers come in groups of {step}, so cuts are at multiples of {step}"
    chooses = layer_kinds(header).get(INDEXER_KEY, [])
    if chooses and not chooses[layer]:
        return f"layer {layer} attends to what a layer before it chose"
    if rule.leading and layer < int(arch(rule.leading, 0)):
        return f"layer {layer} takes token ids"
    heads = by_layer(header, HEADS_KEY, layer_count(header))
    if heads[0] and not heads[layer]:
        return f"llama.cpp takes the size of heads from the first layer, and {layer} has none"
    shared = int(arch(SHARED_KV_KEY, 0))
    if shared and layer > layer_count(header) - shared - 2:
        return f"layers from {layer} on attend to the KV caches of layers before"
    return ""


def mixture(header: Header, first: int, end: int) -> str:
    """The kind of layer that llama.cpp needs in each stage, and is not in [first, end); else ""."""
    rule = known(header)
    recurrent, attending = recurrent_layers(header), attending_layers(header)
    if any(recurrent) and any(attending):
        if not any(recurrent[first:end]):
            return "a recurrent state"
        if not any(attending[first:end]):
            return "attention"
    ratios = by_layer(header, RATIOS_KEY, layer_count(header))
    if left := sorted(set(ratios) - {0} - set(ratios[first:end])):
        return f"attention that is compressed {left[0]} times"
    windows = layer_kinds(header).get(PATTERN_KEY, [])
    if rule.distinct and any(windows) and not any(windows[first:end]):
        return "a window"
    if header.architecture == "gemma4" and all(windows[first:end]) and not all(windows):
        return "attention without a window"  # which alone uses rope_freqs
    return ""


def forbidden_cuts(header: Header) -> list[int]:
    """Layers before which there should be no cut, so that each stage has what llama.cpp needs."""
    count = layer_count(header)
    if why_uncut(header):
        return list(range(1, count))
    allowed, begin = [], 0
    for cut in range(1, count):
        if not why_not_before(header, cut) and not mixture(header, begin, cut):
            allowed.append(cut)
            begin = cut
    while allowed and mixture(header, allowed[-1], count):
        allowed.pop()
    return sorted(set(range(1, count)) - set(allowed))


def check_cut(header: Header, first: int, end: int) -> None:
    """Raises StageError if llama.cpp can't take the layers [first, end) for a model."""
    name, count = header.architecture, layer_count(header)
    if not 0 <= first < end <= count:
        raise StageError(f"{name}: no layers {first} to {end} in a model of {count}")
    if end - first == count:
        known(header)
        return
    if reason := why_uncut(header):
        raise StageError(f"{name}: it can't be cut, because {reason}: run it on one machine")
    for layer in (first, end):
        if 0 < layer < count and (reason := why_not_before(header, layer)):
            raise StageError(f"{name}: no stage can begin with layer {layer}: {reason}")
    if missing := mixture(header, first, end):
        raise StageError(
            f"{name}: llama.cpp needs layers of all kinds in each stage, and of {first} to "
            f"{end - 1} none has {missing}"
        )
    if end - first in forbidden_counts(header):
        raise StageError(
            f"{name}: a stage of {end - first} layers would be taken for another model by "
            "llama.cpp: use other machines, or more or fewer of them (--nodes)"
        )
