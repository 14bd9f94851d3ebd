"""Settings on their way to where they act: nothing is lost, nothing is copied by hand."""

import json
import sys
from pathlib import Path

import pytest

from node.engines.choose import choose
from node.generation.config import PREFILL_BYTES, PREFILL_TOKENS, GenerationConfig
from node.speculation.drafting import MAX_DRAFTED, Lookup, Speculation
from node.worker.config import WorkerConfig
from unicluster.checkpoints.checkpoint import Checkpoint, File, Manifest
from unicluster.errors import InputError
from unicluster.v1.node_pb2 import Draft, StageSpec

SPEC = StageSpec(
    model="/models/it",
    end_layer=4,
    users=2,
    kv_bits=8,
    hub_files=["model.safetensors"],
    draft=Draft(model="small", quant="q4"),
)


def config(**fields: bool) -> WorkerConfig:
    return WorkerConfig(SPEC, "studio", "127.0.0.1", 1, {"cert": "it"}, ("a:1", "b:2"), **fields)


def test_a_worker_reads_the_configuration_that_was_written() -> None:
    line = config(prebuilt=False).to_line()

    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert WorkerConfig.from_line(line) == config(prebuilt=False)


def test_alone_all_that_is_missing_comes_from_the_hub() -> None:
    assert config().hub_files == ["model.safetensors"]
    assert config(alone=True).hub_files is None


def test_a_generation_config_follows_from_the_spec_and_the_model(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 5}))

    made = GenerationConfig.of(SPEC, tmp_path, 8, None)

    assert made.spec is SPEC
    assert (made.model_name, made.defaults) == (tmp_path.name, {"top_k": 5})
    assert (made.prefill_step, made.most_waiting) == (PREFILL_TOKENS, 8)


def test_chunks_of_wide_models_fit_a_frame(tmp_path: Path) -> None:
    def step(hidden_bytes: int) -> int:
        return GenerationConfig.of(SPEC, tmp_path, hidden_bytes, None).prefill_step

    assert step(PREFILL_BYTES // 100) == 100
    assert step(2 * PREFILL_BYTES) == 1


def test_drafting_as_the_spec_asks_for_it() -> None:
    assert Speculation.of(StageSpec(), None, 10) is None
    assert Speculation.of(StageSpec(lookup=True), None, 10) == Speculation(
        Lookup, MAX_DRAFTED, free=True
    )
    piped = Speculation.of(StageSpec(lookup=True, piped=True), None, 10)
    assert piped == Speculation(Lookup, MAX_DRAFTED, piped=True, free=True)
    auto = Speculation.of(StageSpec(auto_speculation=True), None, 10)
    assert auto == Speculation(Lookup, MAX_DRAFTED, piped=True, free=True, auto=True)
    by_model = Speculation.of(StageSpec(draft_tokens=3), object(), 10)
    assert by_model is not None
    assert by_model.most == 3


def checkpoint(*names: str) -> Checkpoint:
    return Checkpoint(
        Path("/models"), Manifest("/models/it", "0" * 40, {name: File(1) for name in names})
    )


def test_the_files_of_a_checkpoint_choose_its_engine() -> None:
    assert choose(checkpoint("config.json", "model.safetensors")).name == "mlx"
    assert choose(checkpoint("it.gguf", "tokenizer.json")).name == "ggml"


def test_an_engine_that_is_asked_for_is_taken_or_refused() -> None:
    assert choose(checkpoint("model.safetensors"), "mlx").name == "mlx"
    with pytest.raises(InputError, match=r"it: no engine 'abacus': it is mlx or ggml"):
        choose(checkpoint("model.safetensors"), "abacus")


def test_a_gguf_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "node.engines.ggml_engine", None)

    with pytest.raises(InputError, match=r"it: llama\.cpp is not installed: pip install"):
        choose(checkpoint("it.gguf"))
