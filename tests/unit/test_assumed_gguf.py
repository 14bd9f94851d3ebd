"""The GGUF that a plan thinks of weighs what the real one does."""

import json
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

from node.ggml.layout import inspect
from node.inspect.from_config import inspect_config
from tests.support.tiny import tiny_config, write_model
from tests.support.tiny_gguf import from_checkpoint
from unicluster.checkpoints.fingerprint import whole
from unicluster.v1.node_pb2 import InspectRequest


def test_a_gguf_thought_of_weighs_what_the_real_one_does(tmp_path: Path) -> None:
    config = tiny_config("llama")
    path = write_model(tmp_path / "it", config)
    real = inspect(whole(from_checkpoint(path, tmp_path / "it.gguf")), 512, 2)
    request = InspectRequest(model="it", config_json=json.dumps(config), context=512, users=2)

    thought_of = inspect_config(request).gguf

    for field in ("files", "revision", "quant"):
        for layout in (real, thought_of):
            layout.ClearField(field)
    assert thought_of == real
