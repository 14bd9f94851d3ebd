"""The hypothetical GGUF of a plan has the bytes of the real one."""

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


def test_a_hypothetical_gguf_has_the_bytes_of_the_real_one(tmp_path: Path) -> None:
    config = tiny_config("llama")
    path = write_model(tmp_path / "it", config)
    real = inspect(whole(from_checkpoint(path, tmp_path / "it.gguf")), 512, 2)
    request = InspectRequest(model="it", config_json=json.dumps(config), context=512, users=2)

    hypothetical = inspect_config(request).gguf

    for field in ("files", "revision", "quant"):
        for layout in (real, hypothetical):
            layout.ClearField(field)
    assert hypothetical == real
