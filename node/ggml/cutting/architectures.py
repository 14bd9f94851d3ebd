"""Properties of GGUF architectures that depend on a layer's number.

llama.cpp builds a cut file as if it were a model of its own, so what it would derive from a
layer's number must be written into the file, or the cuts chosen so that it comes out the same.
Metadata with a value for each layer is sliced for all of them. Read from llama.cpp as in
llama-cpp-python 0.3.36 (src/models); tests/unit/test_ggml_architectures.py proves each.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Rules of an architecture; none for one whose layers don't depend on their number.

    window: period of layers that attend to everything, where the others have a window and the
    file has no array; `full_first`: they are the first ones of their periods, else the last ones.
    always: layers have windows also where the file doesn't say of how many tokens.
    distinct: windowed layers differ from others in more than the window, so that a stage needs at
    least one, as llama.cpp insists; else its other layers are written as windowed ones.
    interval: period of attention among recurrent layers, where the file has no array.
    hybrid: a layer is recurrent if it has no KV heads.
    every: numbers, or keys of the metadata with one: cuts are at multiples of them.
    total: numbers of layers by which llama.cpp knows special models, and no stage may have; a model
    of as many can't be cut.
    indexer: layers choose what to attend to, or take the choice of one before.
    scaled: rows of the embedding are multiplied by the square root of their size.
    entry: the tensor that the first layer gets, where llama.cpp does something to its input before.
    refuses_rows: llama.cpp doesn't take rows of an embedding for text.
    exit: the name of a layer's output, with its number.
    streams: the key of how many hidden states a layer outputs, side by side.
    leading: the key of how many layers at the beginning get token ids; no cut is among them.
    untied: llama.cpp wants an lm_head apart from the embedding.
    uncut: why a model can't be cut.
    """

    window: int = 0
    full_first: bool = False
    always: bool = False
    distinct: bool = False
    interval: int = 0
    hybrid: bool = False
    every: tuple[int | str, ...] = ()
    total: tuple[int, ...] = ()
    indexer: bool = False
    scaled: bool = False
    entry: str = ""
    refuses_rows: bool = False
    exit: str = "l_out-%d"
    streams: str = ""
    leading: str = ""
    untied: bool = False
    uncut: str = ""


_PLAIN = Architecture()
_UNTIED = Architecture(untied=True)
_HYBRID = Architecture(hybrid=True)
_SCALED = Architecture(entry="embd")
_INTERLEAVED = "interleave_moe_layer_step"
_OF_FIRST = "every layer takes the values of the first one"
_LOOPS = "its layers are run several times"
_UNNAMED = "llama.cpp gives no name to what goes from layer to layer"
_RESIDUALS = "layers take the results of all before them"

KNOWN: dict[str, Architecture] = {
    # Nothing depends on a layer's number but what the metadata says of it.
    **dict.fromkeys(
        (
            *("llama", "arcee", "arctic", "bitnet", "chatglm"),
            *("command-r", "deci", "deepseek", "deepseek2-ocr", "deepseek32", "ernie4_5"),
            *("exaone", "falcon", "falcon-h1", "grovemoe", "hunyuan-dense", "hunyuan-moe"),
            *("hunyuan_vl", "hy_v3", "jais2", "maincoder", "mamba", "mamba2"),
            *("mistral3", "mistral4", "openelm", "paddleocr", "pangu-embedded"),
            *("phi3", "qwen2", "qwen2vl", "qwen3", "qwen3moe", "qwen3vl"),
            *("qwen3vlmoe", "refact", "seed_oss", "starcoder2"),
        ),
        _PLAIN,
    ),
    **dict.fromkeys(
        (
            *(
                "apertus",
                "bailingmoe",
                "bailingmoe2",
                "codeshell",
                "dbrx",
                "dots1",
                "gptneox",
                "internlm2",
            ),
            *(
                "jais",
                "minimax-m2",
                "nemotron",
                "olmo",
                "olmoe",
                "orion",
                "phi2",
                "plamo",
                "plm",
            ),
            *("phimoe", "qwen", "qwen2moe", "stablelm", "xverse"),
        ),
        _UNTIED,
    ),
    # Recurrent layers among others.
    **dict.fromkeys(("bailingmoe3", "granitehybrid", "jamba", "lfm2", "lfm2moe"), _HYBRID),
    **dict.fromkeys(
        ("nemotron_h", "nemotron_h_moe"), Architecture(hybrid=True, exit="nemotron_h_block_out-%d")
    ),
    "kimi-linear": Architecture(hybrid=True, untied=True),
    "qwen3next": Architecture(interval=4),
    "qwen35": Architecture(interval=4),
    "qwen35moe": Architecture(interval=4),
    # Windows.
    "gemma2": Architecture(window=2, always=True, total=(46,), entry="inp_scaled"),
    "gemma3": Architecture(window=6, total=(62,), scaled=True),
    "gemma4": Architecture(distinct=True, scaled=True),
    "gpt-oss": Architecture(window=2, always=True, untied=True),
    "cohere2": Architecture(window=4, always=True, distinct=True),
    "cohere2moe": Architecture(window=4, full_first=True, always=True, distinct=True),
    "exaone4": Architecture(window=4, distinct=True, total=(64,)),
    "exaone-moe": Architecture(window=4, always=True, distinct=True, untied=True),
    "granite_swa": Architecture(entry="embd", distinct=True),
    "laguna": Architecture(window=4, full_first=True, distinct=True),
    "maple": Architecture(distinct=True, untied=True),
    "mellum": Architecture(window=4, distinct=True, untied=True),
    "mimo2": Architecture(distinct=True, untied=True),
    "muse-glimmer": Architecture(
        window=4, always=True, distinct=True, entry="embd_norm", untied=True
    ),
    "olmo2": Architecture(window=4, distinct=True, untied=True),
    "plamo3": Architecture(window=8, distinct=True),
    "spark2_5": Architecture(distinct=True),
    "step35": Architecture(distinct=True, exit="h_nextn", untied=True),
    # Positions in some layers only, or experts.
    "afmoe": Architecture(window=4, distinct=True, every=(4,), entry="inp_embd_scaled"),
    "ernie4_5-moe": Architecture(every=(_INTERLEAVED,)),
    "llama4": Architecture(window=4, always=True, distinct=True, every=(4, _INTERLEAVED)),
    "smallthinker": Architecture(window=4, full_first=True, distinct=True, every=(4,), total=(4,)),
    "smollm3": Architecture(every=(4,)),
    # Something is done to the embedding, or llama.cpp takes rows of it for an image.
    **dict.fromkeys(("granite", "granitemoe", "grok", "minicpm"), _SCALED),
    "bloom": Architecture(entry="inp_norm-0"),
    "gemma": Architecture(entry="inp_scaled"),
    "gpt2": Architecture(entry="inpL"),
    "mpt": Architecture(entry="inpL"),
    "starcoder": Architecture(entry="inpL"),
    "cogvlm": Architecture(entry="embd", refuses_rows=True),
    "glm4": Architecture(entry="embd", refuses_rows=True),
    "glm4moe": Architecture(entry="embd", refuses_rows=True),
    # Compressed attention, several hidden states side by side.
    "deepseek2": Architecture(total=(26, 27)),
    "glm-dsa": Architecture(indexer=True),
    "hy_v4": Architecture(
        indexer=True, entry="hc_init", streams="hyper_connection.count", untied=True
    ),
    "deepseek4": Architecture(
        entry="hc_init",
        exit="l_last-%d",
        streams="hyper_connection.count",
        leading="hash_layer_count",
        untied=True,
    ),
    # Run whole, on one machine.
    "arwkv7": Architecture(uncut=_OF_FIRST),
    "rwkv7": Architecture(uncut=_OF_FIRST),
    "talkie": Architecture(uncut="every layer takes the embedding"),
    **dict.fromkeys(
        ("dots3note", "glm5-next"),
        Architecture(uncut="its memory of keys to choose by has not been tried cut"),
    ),
    "baichuan": Architecture(uncut="llama.cpp knows its positions by the number of layers"),
    "chameleon": Architecture(uncut="llama.cpp wants the whole vocabulary in each stage"),
    "gemma3n": Architecture(uncut="every layer takes an embedding of its own"),
    "graniteswitch": Architecture(uncut="its layers depend on the tokens"),
    "hrm_text": Architecture(uncut=_LOOPS),
    "kimi-k3": Architecture(uncut=_RESIDUALS),
    "minimax-01": Architecture(interval=8, uncut="decay depends on a layer's number"),
    "minicpm3": Architecture(uncut="residuals are scaled by the number of layers"),
    "nanbeige": Architecture(uncut=_LOOPS),
    "qwen4exp": Architecture(uncut=_UNNAMED),
    "rwkv6": Architecture(uncut=_UNNAMED),
    "rwkv6qwen2": Architecture(every=("rescale_every_n_layers",), untied=True),
}

# Not a language model that continues a text from its beginning to its end.
NOT_CAUSAL = frozenset(
    (
        *("bert", "clip", "dflash", "dream", "eagle3", "eurobert", "gemma-embedding"),
        *("gemma4-assistant", "jina-bert-v2", "jina-bert-v3", "llada", "llada-moe"),
        *("modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "pockettts", "qwen3tts"),
        *("rnd1", "t5", "t5encoder", "wavtokenizer-dec"),
    )
)

# Language models that can't be served, and why.
REFUSED = {
    "plamo2": "llama.cpp mixes up sequences that it computes at once",
    "minimax-m3": "llama.cpp computes its sparse attention only for one sequence at a time",
}

# Layers may have other numbers of heads than one another; of any other model llama.cpp takes the
# first layer's for all, and ends the process when they are not.
UNEQUAL_HEADS = frozenset(
    (
        *("bailingmoe3", "deci", "gemma4", "granitehybrid", "granite_swa", "jamba", "kimi-linear"),
        *("laguna", "dots3note", "glm5-next"),
        *("lfm2", "lfm2moe", "mimo2", "nemotron_h", "nemotron_h_moe", "openelm", "plamo2"),
        *("plamo3", "spark2_5", "step35"),
    )
)

# Layers may have feed-forward networks of other widths than one another.
UNEQUAL_WIDTHS = frozenset(
    ("deci", "gemma4", "nemotron_h", "nemotron_h_moe", "openelm", "plamo3"),
)
UNEQUAL_EXPERTS = frozenset(("glm5-next", "nemotron_h", "nemotron_h_moe"))

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
    "qwen3_5": "qwen35",
    "qwen3_5_moe": "qwen35moe",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "llama4": "llama4",
    "minimax": "minimax-m2",
    "minimax_m2": "minimax-m2",
}
