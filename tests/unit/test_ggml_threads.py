"""Numbers of threads are tried out while answers are decoded, whose numbers stay the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

import mlx.core as mx

from node.ggml import layers, load
from node.metering.fastest import Fastest
from node.pipeline.pipeline_model import PipelineModel
from tests.support.tiny_gguf import write_gguf
from unicluster.checkpoints.fingerprint import whole

STEPS = 30


def decoded(file: Path) -> Any:
    """Logits of a prompt's last token, and of the tokens after it."""
    gguf = load.open_gguf(whole(file))
    part = load.Part(0, gguf.layers, has_lm_head=True, context=256)
    model = PipelineModel(load.load(gguf, file.parent, file, part).front, None)
    cache = model.make_cache()
    rows = [model(mx.array([list(range(1, 40))]), cache=cache)[0, -1]]
    rows += [model(mx.array([[7 * n % 200]]), cache=cache)[0, -1] for n in range(STEPS)]
    return np.array([np.array(row) for row in rows])


class Noted(Fastest):
    """Also remembers the numbers of threads and of tokens of all steps."""

    steps: list[tuple[int, object]]

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        type(self).steps = []

    def note(self, kind: object, seconds: float) -> None:
        self.steps.append((self.setting, kind))
        super().note(kind, seconds)


def test_answers_do_not_depend_on_the_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    alone = decoded(file)  # as tests are run: with one
    monkeypatch.delenv(load.THREADS_ENV)
    monkeypatch.setattr(load, "cores", lambda: 2)
    monkeypatch.setattr(layers, "Fastest", Noted)

    tried = decoded(file)

    assert np.array_equal(alone, tried)
    assert {threads for threads, _ in Noted.steps} == {1, 2}
    assert {tokens for _, tokens in Noted.steps} == {1}  # a prompt is no trial


def test_a_stated_number_of_threads_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(load.THREADS_ENV, "1")
    monkeypatch.setattr(layers, "Fastest", Noted)
    Noted.steps = []

    decoded(write_gguf(tmp_path / "tiny.gguf"))

    assert not Noted.steps
