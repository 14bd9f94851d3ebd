"""The hypothetical GGUF of a plan has the bytes of the real one."""

import json
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

from coordinator.models.catalog import Entry, entries, find
from node.ggml.cutting.architectures import KNOWN, OF_MLX
from node.ggml.layout import inspect
from node.inspect.from_config import inspect_config
from tests.support.tiny import tiny_config, write_model
from tests.support.tiny_gguf import from_checkpoint
from unicluster.checkpoints.fingerprint import whole
from unicluster.v1.node_pb2 import InspectRequest


def test_a_hypothetical_gguf_has_the_bytes_of_the_real_one(tmp_path: Path) -> None:
    config = tiny_config("llama")
    path = write_model(tmp_path / "it", config)
    real = inspect(whole(from_checkpoint(path, tmp_path / "it.gguf")), 512, 2)
    request = InspectRequest(model="it", config_json=json.dumps(config), context=512, users=2)

    hypothetical = inspect_config(request).gguf

    for field in ("files", "revision", "quant"):
        for layout in (real, hypothetical):
            layout.ClearField(field)
    real.ClearField("workspace_bytes")  # which only llama.cpp knows
    assert hypothetical == real


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.id)
def test_every_catalogue_model_runs_on_both_engines(entry: Entry) -> None:
    assert OF_MLX[entry.config["model_type"]] in KNOWN


@pytest.mark.parametrize(("name", "step"), [("gemma-4-31b", 6), ("llama-4-scout", 4)])
def test_a_hypothetical_gguf_is_cut_where_a_real_one_is(name: str, step: int) -> None:
    entry = find(name)
    assert entry is not None
    request = InspectRequest(
        model=name, config_json=json.dumps(entry.config), context=8192, users=1, quant="q4"
    )

    gguf = inspect_config(request).gguf

    layers = range(1, len(gguf.layer_bytes))
    assert list(gguf.forbidden_cuts) == [cut for cut in layers if cut % step]
    assert gguf.hidden_size == entry.config["text_config"]["hidden_size"]


def test_windowed_layers_have_whole_caches_in_a_gguf() -> None:
    entry = find("gemma-4-31b")
    assert entry is not None
    text = entry.config["text_config"]
    request = InspectRequest(
        model=entry.id, config_json=json.dumps(entry.config), context=8192, users=1, quant="q4"
    )

    sizes = inspect_config(request).gguf.kv_bytes_per_layer

    windowed = 2 * 2 * 8192 * text["num_key_value_heads"] * text["head_dim"]
    whole = 2 * 2 * 8192 * text["num_global_key_value_heads"] * text["global_head_dim"]
    assert list(sizes[:6]) == [windowed] * 5 + [whole]
