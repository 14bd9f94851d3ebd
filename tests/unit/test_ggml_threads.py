"""Numbers of threads are tried out while answers are decoded, whose numbers stay the same."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

import mlx.core as mx

from node.ggml import load, threads
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
    monkeypatch.setattr(threads, "shared_cores", lambda: None)  # other stages may run here
    monkeypatch.setattr(threads, "Fastest", Noted)

    tried = decoded(file)

    assert np.array_equal(alone, tried)
    assert {threads for threads, _ in Noted.steps} == {1, 2}
    assert {tokens for _, tokens in Noted.steps} == {1}  # a prompt is no trial


class Sharing:
    """Other stages of the machine: threads of those that compute now."""

    def __init__(self, now: list[int]) -> None:
        self.now = now

    def computing_now(self) -> list[int]:
        return self.now

    def computing(self, threads: int) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()


@pytest.mark.parametrize(
    ("now", "decode"), [([], 8), ([8], 4), ([4], 4), ([8, 8], 2), ([1] * 40, 1)]
)
def test_stages_that_decode_at_the_same_time_share_the_cores(
    now: list[int], decode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "shared_cores", lambda: Sharing(now))
    shared = threads.Threads(8)

    with shared.step(1) as decoding, shared.step(64) as prefilling:
        pass

    assert (decoding, prefilling, shared.latest) == (decode, 8, decode)


def test_steps_that_share_the_cores_are_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    others = Sharing([1])
    monkeypatch.setattr(threads, "shared_cores", lambda: others)
    monkeypatch.setattr(threads, "Fastest", Noted)
    shared = threads.Threads(2)

    def step() -> int:
        with shared.step(1) as used:
            return used

    assert [step() for _ in range(50)] == [1] * 50
    assert not Noted.steps
    others.now = []
    assert step() == 2
    assert len(Noted.steps) == 1


def test_a_stated_number_of_threads_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(load.THREADS_ENV, "1")
    monkeypatch.setattr(threads, "Fastest", Noted)
    Noted.steps = []

    decoded(write_gguf(tmp_path / "tiny.gguf"))

    assert not Noted.steps
