"""GGUFs of models with vision: their text is served, cut as whole; images are refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

import unicluster
from coordinator.protocols.openai_chat import read_chat
from node.ggml.layout import inspect
from tests.support.any_gguf import with_tokenizer
from tests.support.engines import THREAD, Split, Tiny, listen
from tests.support.tiny_gguf import save
from unicluster.checkpoints.fingerprint import whole
from unicluster.errors import InputError, UniclusterError

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TEXT = {"type": "text", "text": "What is in the picture?"}


def asked(*parts: dict[str, Any]) -> Any:
    message = {"role": "user", "content": list(parts)}
    return read_chat({"messages": [message], "max_tokens": 12, "temperature": 0}, "it").request


@pytest.mark.parametrize(
    "architecture",
    [
        "qwen2vl",
        pytest.param("qwen3vl", marks=pytest.mark.sweep),
        pytest.param("qwen3vlmoe", marks=pytest.mark.sweep),
    ],
)
async def test_text_is_answered_and_an_image_is_refused(tmp_path: Path, architecture: str) -> None:
    file = str(with_tokenizer(tmp_path, architecture))
    uncut = Tiny(*await THREAD.run(lambda: unicluster.load(file, local_nodes=1)))
    cut = await THREAD.run(lambda: unicluster.load(file, local_nodes=2))
    split = Split(*cut, uncut, architecture)

    with split.model, uncut.model:
        answers = []
        for each in (split, uncut):
            engine = await each.engine()
            answers.append(await listen(await engine.submit(asked(TEXT))))
            engine.close()

    assert answers[0].tokens == answers[1].tokens
    assert answers[0].tokens
    with pytest.raises(InputError, match=r"^messages\[0\]\.content\[1\]\.type: .*image_url.* text"):
        asked(TEXT, IMAGE)


def test_the_part_of_a_model_that_reads_images_is_refused(tmp_path: Path) -> None:
    weights = {"v.patch_embd.weight": np.zeros((64, 32), np.float32)}
    file = save(tmp_path / "mmproj-it.gguf", "clip", {}, weights)

    with pytest.raises(UniclusterError, match="language model"):
        inspect(whole(file), 512, 1)
