import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from node.mlx.lazy import load_lazy, load_parts, nbytes
from tests.support.tiny import tiny_config, write_model
from unicluster.errors import InputError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_model(tmp_path, tiny_config("llama"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_model(tmp_path, tiny_config("llama"), shards=3)


def change_config(**values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | values))

    return change


def rewrite(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        (path / file).write_bytes(change((path / file).read_bytes()))

    return apply


def remove(file: str) -> Callable[[Path], None]:
    return lambda path: (path / file).unlink()


def change_weights(change: Callable[[dict[str, mx.array]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = str(path / "model.safetensors")
        weights: Any = mx.load(file)
        mx.eval(weights)
        change(weights)
        mx.save_safetensors(file, weights, {"format": "mlx"})

    return apply


NAME = "model.layers.4.mlp.up_proj.weight"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
DAMAGED = "model.safetensors: damaged safetensors: "
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut off": (rewrite(WEIGHTS, lambda old: old[:-100]), DAMAGED + r"\d+ bytes instead of \d+"),
    "grown": (rewrite(WEIGHTS, lambda old: old + b"x"), DAMAGED + r"\d+ bytes instead of \d+"),
    "cut off in its header": (rewrite(WEIGHTS, lambda old: old[:200]), DAMAGED + "the header is"),
    "header no text": (rewrite(WEIGHTS, lambda old: old[:8] + b"\xff" * 4 + old[12:]), DAMAGED),
    "header a list": (rewrite(WEIGHTS, lambda old: b"\x02" + bytes(7) + b"[]"), DAMAGED),
    "huge header": (rewrite(WEIGHTS, lambda old: b"\xff" * 8 + old[8:]), DAMAGED),
    "three bytes": (rewrite(WEIGHTS, lambda old: b"abc"), DAMAGED),
    "empty": (rewrite(WEIGHTS, lambda old: b""), DAMAGED),
    "no weights": (remove(WEIGHTS), r"no model\*.safetensors in it"),
    "a weight missing": (change_weights(lambda weights: weights.pop(NAME)), NAME),
    "a weight too many": (change_weights(lambda weights: weights.update(x=mx.ones(1))), "x"),
    "a weight of another shape": (
        change_weights(lambda weights: weights.update({NAME: mx.ones((2, 2))})),
        NAME,
    ),
    "no config": (remove(CONFIG), "no config.json in it"),
    "config no JSON": (rewrite(CONFIG, lambda old: b"{"), "config.json: "),
    "config no text": (rewrite(CONFIG, lambda old: b"\xff\xfe"), "config.json: "),
    "config a list": (rewrite(CONFIG, lambda old: b"[]"), "config.json: "),
    "no model type": (rewrite(CONFIG, lambda old: b"{}"), "config.json: has no model_type"),
    "unknown model type": (change_config(model_type="nosuch"), "nosuch"),
    "other sizes": (change_config(hidden_size=128), "shape"),
    "a size that is no number": (change_config(hidden_size="wide"), "."),
    "a type that is no text": (
        change_config(model_type=3),
        "damaged: model_type is 3, and no text",
    ),
    "config empty": (rewrite(CONFIG, lambda old: b""), "config.json: damaged: it is empty"),
    "config of zeros": (
        rewrite(CONFIG, lambda old: bytes(len(old))),
        "damaged: it has nothing",
    ),
    "config deep": (rewrite(CONFIG, lambda old: b"[" * 10**6), "damaged: it is nested too deeply"),
    "a size of nothing": (change_config(num_attention_heads=0, head_dim=None), "."),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_in_one_line(path: Path, damage: str) -> None:
    spoil, message = DAMAGE[damage]
    spoil(path)

    with pytest.raises(InputError, match=message) as caught:
        load_lazy(path)

    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.unlink()

    with pytest.raises(InputError, match=f"{shard}: missing, though the index names it"):
        load_lazy(sharded)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_named(sharded: Path, content: str) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(content)

    with pytest.raises(InputError, match=f"{index}: damaged"):
        load_lazy(sharded)


SMALL = {
    "tokenizer.json": ["", "{", "[]", "{}", '{"model": 3}', "\0" * 100],
    "tokenizer_config.json": ["", "null", '{"chat_template": 3}'],
    "generation_config.json": [
        "",
        "[]",
        '{"temperature": "warm"}',
        '{"top_k": [1]}',
        '{"top_p": true}',
        '{"do_sample": "yes"}',
        '{"eos_token_id": "</s>"}',
        '{"eos_token_id": [1, null]}',
    ],
    "special_tokens_map.json": ["[", "3"],
    "tokenizer.model": ["", "\0" * 5000],
    "vocab.tiktoken": [""],
    "chat_template.jinja": [""],
}


@pytest.mark.parametrize(("name", "content"), [(n, c) for n in SMALL for c in SMALL[n]])
def test_a_damaged_small_file_is_named(path: Path, name: str, content: str) -> None:
    (path / name).write_text(content)

    with pytest.raises(InputError, match=f"{path / name}: damaged: .*; copy it again$") as caught:
        load_lazy(path)

    assert "\n" not in str(caught.value)


def test_small_files_that_are_right_are_taken(path: Path) -> None:
    (path / "generation_config.json").write_text(
        '{"temperature": null, "top_k": 3, "do_sample": false, "eos_token_id": [1, 2], "x": {}}'
    )
    (path / "other.json").write_text("{")  # nobody reads it

    assert load_lazy(path).model_type == "llama"


ODD = (
    "a[b]",
    "*",
    "what?",
    "it's a dir",
    '"quoted" $HOME',
    "模型 ü",
    "[!x]",
    "{a,b}",
    "%s {}",
    "#-~",
)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("parent", [False, True])
def test_any_name_of_a_directory(tmp_path: Path, name: str, parent: bool) -> None:
    odd = tmp_path / name / ("model" if parent else "")
    odd.mkdir(parents=True)
    write_model(odd, tiny_config("llama"))

    lazy = load_lazy(odd)

    assert (lazy.model_type, lazy.path) == ("llama", odd)
    (odd / CONFIG).write_text("{")
    with pytest.raises(InputError) as caught:
        load_lazy(odd)
    assert str(caught.value).startswith(f"{odd}/config.json: ")


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def in_float8(weights: dict[str, mx.array]) -> None:
    """The weights of linear layers as bytes, with a scale for each block beside them."""
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        weights[name] = mx.zeros(weights[name].shape, mx.uint8)
        weights[f"{name}_scale_inv"] = mx.ones((1, 1))


def without_scales(weights: dict[str, mx.array]) -> None:
    in_float8(weights)
    for name in [name for name in weights if name.endswith("_scale_inv")]:
        del weights[name]


@pytest.mark.parametrize("change", [in_float8, without_scales])
def test_weights_in_float8_that_can_t_be_read_are_called_so(path: Path, change: Any) -> None:
    change_weights(change)(path)
    change_config(quantization_config=FP8)(path)

    with pytest.raises(InputError) as caught:
        load_lazy(path)

    assert str(caught.value) == (
        f"{path}: its weights are quantized as fp8, which mlx-lm can't read for llama: use its "
        "bfloat16 weights, or a conversion for MLX"
    )


def test_other_formats_that_can_t_be_read_are_called_so(path: Path) -> None:
    change_weights(in_float8)(path)
    (path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')

    with pytest.raises(InputError, match="its weights are quantized as modelopt, which mlx-lm"):
        load_lazy(path)


def test_a_file_in_place_of_a_directory(path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: no such directory"):
        load_lazy(path / "config.json")


def test_nothing_is_read_until_a_part_is_loaded(sharded: Path) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    lazy = load_lazy(sharded)
    assert mx.get_active_memory() - before < 2**12

    layer = lazy.model.layers[3]
    assert list(load_parts([layer])) == [nbytes(layer)]

    assert mx.get_active_memory() - before >= nbytes(layer)


@pytest.mark.parametrize("quant", ["q2", "q3", "q4", "q6", "q8"])
def test_quantized_on_load(path: Path, quant: str, capsys: pytest.CaptureFixture[str]) -> None:
    lazy = load_lazy(path, quant)

    assert lazy.quant == quant
    assert lazy.model.layers[0].mlp.up_proj.bits == int(quant[1:])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("quant", ["", "none", "float32"])
def test_as_stored(path: Path, quant: str) -> None:
    assert load_lazy(path, quant).quant == "float32"


def test_an_unknown_quantization(path: Path) -> None:
    with pytest.raises(InputError, match="no quantization 'q5': it is one of q2, q3, q4, q6, q8"):
        load_lazy(path, "q5")


def quantized(path: Path) -> Path:
    """The checkpoint again, as mlx-lm stores it in 4 bits."""
    from mlx_lm.utils import save_model

    lazy = load_lazy(path, "q4")
    save_model(path, lazy.model)
    change_config(quantization={"group_size": 64, "bits": 4})(path)
    for old in path.glob("model.safetensors.index.json"):
        old.unlink()
    return path


@pytest.mark.parametrize("quant", ["", "q4"])
def test_a_checkpoint_in_4_bits_is_taken_as_it_is(path: Path, quant: str) -> None:
    assert load_lazy(quantized(path), quant).quant == "q4"


def test_a_checkpoint_in_4_bits_is_not_quantized_again(path: Path) -> None:
    with pytest.raises(InputError, match="its weights are already q4; --quant q8 would need"):
        load_lazy(quantized(path), "q8")
