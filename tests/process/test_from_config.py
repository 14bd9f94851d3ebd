"""Sizes from config.json alone: against real checkpoints, published counts, and filled caches."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.pages import published
from coordinator.models import sizes
from coordinator.models.catalog import entries
from coordinator.models.inspect_child import layouts
from node.engines.mlx_layout import inspect
from node.inspect.from_config import build, inspect_config
from tests.support import zoo
from tests.support.tiny import ARCHITECTURES, tiny_config, write_model
from unicluster.checkpoints.fingerprint import whole_directory
from unicluster.errors import InputError
from unicluster.v1.node_pb2 import InspectRequest, ModelLayout


def of_config(config: dict[str, Any], **fields: Any) -> ModelLayout:
    return inspect_config(InspectRequest(model="it", config_json=json.dumps(config), **fields))


@pytest.mark.parametrize("quant", ["", "q4", "q8"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_config_weighs_what_its_checkpoint_does(name: str, quant: str, tmp_path: Path) -> None:
    config = tiny_config(name)
    stored = inspect(whole_directory(write_model(tmp_path, config)), quant, context=300, users=2)
    stored.ClearField("files")
    stored.ClearField("revision")

    found = of_config(config, quant=quant, context=300, users=2)
    found.ClearField("gguf")

    assert found == stored


def test_a_gguf_is_thought_of_where_one_could_be_cut() -> None:
    tied = of_config(tiny_config("gemma3"), quant="q8", context=300)

    assert tied.gguf.tail_bytes > tied.gguf.embed_bytes > 0  # the lm_head is the embedding again
    assert set(tied.gguf.kv_bytes_per_layer) == {max(tied.kv_bytes_per_layer)}  # windows or not
    assert (tied.gguf.quant, tied.gguf.engine) == ("q8_0", "ggml")
    assert not of_config(zoo.config("lfm2"), quant="q4").HasField("gguf")
    assert not of_config(tiny_config("llama") | {"head_dim": 32}, kv_bits=8, context=300).HasField(
        "gguf"
    )


def test_a_checkpoint_quantized_by_layers_weighs_what_its_config_says() -> None:
    quantization = {
        "group_size": 64,
        "bits": 4,
        "model.layers.0.self_attn.q_proj": {"group_size": 32, "bits": 8},
    }
    plain = of_config(tiny_config("llama") | {"quantization": {"group_size": 64, "bits": 4}})

    mixed = of_config(tiny_config("llama") | {"quantization": quantization})

    # 64 x 64 weights at 4 bits more, and twice as many pairs of a scale and a bias.
    assert mixed.layer_bytes[0] - plain.layer_bytes[0] == 64 * 64 // 2 + 64 * 2 * 4
    assert mixed.layer_bytes[1:] == plain.layer_bytes[1:]
    assert mixed.quant == "q4"


def test_weights_are_what_the_config_says_they_are() -> None:
    half = of_config(tiny_config("llama") | {"torch_dtype": "bfloat16"})

    assert half.quant == "bfloat16"
    assert 2 * sum(half.layer_bytes) == sum(of_config(tiny_config("llama")).layer_bytes)


def test_a_quantized_checkpoint_is_not_quantized_again() -> None:
    config = tiny_config("llama") | {"quantization": {"group_size": 64, "bits": 4}}

    with pytest.raises(InputError, match="its weights are already q4, not q2"):
        of_config(config, quant="q2")


def test_one_row_of_an_untied_embedding_is_read() -> None:
    untied = of_config(tiny_config("llama"))
    tied = of_config(tiny_config("llama") | {"tie_word_embeddings": True})

    row = untied.embed_bytes // 264
    assert untied.head_active_bytes == untied.head_bytes - untied.embed_bytes + row
    assert tied.head_active_bytes == tied.head_bytes == tied.embed_bytes + row  # and the norm


def test_a_model_that_mlx_lm_does_not_know_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"it: mlx-lm can't build this config: .*nonsuch"):
        build({"model_type": "nonsuch"}, name="it")


def test_layers_of_deepseek_are_far_from_equal() -> None:
    """Dividing the total by 61 would be wrong by a factor of twenty for the first three."""
    config = next(e for e in entries() if e.id == "deepseek-r1").config

    found = of_config(config, quant="q4")

    assert [round(size / 1e6) for size in found.layer_bytes] == [328] * 3 + [6476] * 58
    assert sum(found.layer_active_parameters) == pytest.approx(35.7e9, rel=0.01)


def test_the_committed_sizes_are_those_of_the_configurations() -> None:
    some = [e for e in entries() if e.id in ("gemma-3-4b", "gpt-oss-120b", "llama-4-scout")]

    assert sizes.computed(some) == {e.id: sizes.stored()[e.id] for e in some}


@pytest.mark.parametrize("model", published()["parameters"]["models"])
def test_parameters_are_those_published(model: str) -> None:
    """To 0.001 %, where the published count is of the same arrays."""
    told = published()["parameters"]["models"][model]
    if "besides" in told and "besides_count" not in told:
        pytest.skip(f"published {told['besides']}")

    ours = sizes.stored()[model]["parameters"]

    assert ours == pytest.approx(told["count"] - told.get("besides_count", 0), rel=1e-5)


def test_files_are_as_long_as_published() -> None:
    """DeepSeek-V3.1 and R1 in 4 bits: 378 GB on the hub, as exo's model cards say."""
    assert sizes.stored()["deepseek-v3.1"]["bytes"]["q4"] == pytest.approx(378e9, rel=0.0011)
    assert sizes.stored()["deepseek-v3.1"]["bytes"]["q8"] == pytest.approx(713e9, rel=0.001)


def test_a_child_process_answers_several_at_once(tmp_path: Path) -> None:
    path = write_model(tmp_path, tiny_config("qwen3_moe"))
    config = json.dumps(tiny_config("llama"))

    answers = layouts(
        [InspectRequest(model=str(path)), InspectRequest(model="it", config_json=config)]
    )

    assert [answer.model_type for answer in answers] == ["qwen3_moe", "llama"]


def test_what_the_child_says_is_wrong_is_passed_on() -> None:
    with pytest.raises(InputError, match="it: its config has no model_type"):
        layouts([InspectRequest(model="it", config_json="{}")])
