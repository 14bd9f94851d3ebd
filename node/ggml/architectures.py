"""Properties of GGUF architectures that depend on a layer's number.

llama.cpp builds a cut file as if it were a model of its own, so what it would derive from a
layer's number must be written into the file. Architectures that are not listed here may do more
with it, and are refused by name. Checked with llama.cpp as in llama-cpp-python 0.3.36.
"""

from dataclasses import dataclass

from unicluster.checkpoints.gguf import Header
from unicluster.errors import StageError


@dataclass(frozen=True)
class Architecture:
    """Rules of an architecture: kinds of layers by their number, scaling of embeddings.

    window: every that many layers the last one attends to everything, the others to a window.
    interval: every that many layers the last one is attention, the others are recurrent.
    scaled: embeddings are multiplied by the square root of their size.
    whole: numbers of layers by which llama.cpp knows special models; no stage may have as many.
    indexer: layers choose what to attend to, or take the choice of one before.
    entry: the tensor that layer 0 gets, where llama.cpp doesn't take hidden states as input.
    """

    window: int = 0
    interval: int = 0
    scaled: bool = False
    whole: tuple[int, ...] = ()
    indexer: bool = False
    entry: str = ""


KNOWN = {
    "llama": Architecture(),
    "qwen2": Architecture(),
    "qwen2moe": Architecture(),
    "qwen3": Architecture(),
    "qwen3moe": Architecture(),
    "gemma3": Architecture(window=6, scaled=True, whole=(62,)),
    "deepseek2": Architecture(whole=(26, 27, 47, 48)),
    "deepseek32": Architecture(),
    "glm-dsa": Architecture(indexer=True),
    "glm4moe": Architecture(entry="embd"),
    "gpt-oss": Architecture(window=2),
    "qwen3next": Architecture(interval=4),
}

# By mlx-lm's name of a model: what its GGUFs are called.
OF_MLX = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "kimi_k2": "deepseek2",
    "deepseek_v32": "deepseek32",
    "glm_moe_dsa": "glm-dsa",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss",
    "qwen3_next": "qwen3next",
}

WINDOW_KEY = "attention.sliding_window"
PATTERN_KEY = "attention.sliding_window_pattern"
RECURRENT_KEY = "attention.recurrent_layers"
INDEXER_KEY = "attention.indexer.types"
# In GLM-5.2, which is made for so many tokens, not every layer chooses.
SHARED_FROM = 1 << 20
INTERVAL_KEY = "full_attention_interval"


def known(header: Header) -> Architecture:
    """Raises StageError for an architecture that can't be cut."""
    name = header.architecture
    if name not in KNOWN:
        raise StageError(
            f"{name or 'no architecture'}: a GGUF of it can't be cut yet; those that can are "
            f"{', '.join(sorted(KNOWN))}"
        )
    return KNOWN[name]


def layer_count(header: Header) -> int:
    """Layers of the model proper, without those that only predict further tokens."""
    blocks = int(header.arch("block_count", 0))
    return blocks - int(header.arch("nextn_predict_layers", 0))


def layer_kinds(header: Header) -> dict[str, list[bool]]:
    """Metadata with a value for each layer, where llama.cpp would go by the layer's number."""
    rule, count = known(header), layer_count(header)
    kinds: dict[str, list[bool]] = {}
    if rule.window and header.arch(WINDOW_KEY, 0):
        period = header.arch(PATTERN_KEY, rule.window)
        if isinstance(period, list):
            kinds[PATTERN_KEY] = [bool(flag) for flag in period[:count]]
        else:
            kinds[PATTERN_KEY] = [i % period < period - 1 for i in range(count)]
    if rule.interval:
        interval = header.arch(INTERVAL_KEY, rule.interval)
        usual = [(i + 1) % interval != 0 for i in range(count)]
        kinds[RECURRENT_KEY] = [bool(flag) for flag in header.arch(RECURRENT_KEY, usual)[:count]]
    if rule.indexer:
        types = header.arch(INDEXER_KEY, choosing(count, header.arch("context_length", 0)))
        kinds[INDEXER_KEY] = [bool(flag) for flag in types[:count]]
    return kinds


def choosing(layers: int, context: int) -> list[bool]:
    """True for layers with an indexer for sparse attention, where the GGUF doesn't say."""
    return [context < SHARED_FROM or i < 2 or i % 4 == 2 for i in range(layers)]


def forbidden_cuts(header: Header) -> list[int]:
    """Layers before which there should be no cut.

    Each stage needs layers of both kinds, and what its first layers are to attend to.
    """
    kinds = layer_kinds(header)
    recurrent, chooses = kinds.get(RECURRENT_KEY, []), kinds.get(INDEXER_KEY, [])
    apart = {cut for cut in range(1, len(recurrent)) if recurrent[cut - 1]}
    return sorted(apart | {cut for cut in range(1, len(chooses)) if not chooses[cut]})
