"""GGUFs that are not what they should be: incomplete, of other tokens, or refused by llama.cpp."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from node.constraints.vocabulary import Vocabulary
from node.engines.ggml_engine import GgmlEngine
from node.generation.request import check_request
from node.generation.sampling import Sampling
from node.ggml.load import THREADS_ENV, check_layers, context_limit, open_gguf, threads
from node.prompts.cancellation import Cancellation
from node.prompts.tokenizing import Tokenizing
from tests.support.tiny import tiny_config, write_model
from tests.support.tiny_gguf import ARCHITECTURES, write_gguf
from unicluster.checkpoints.fingerprint import whole
from unicluster.checkpoints.gguf import Header, read_header
from unicluster.errors import InputError, StageError
from unicluster.v1.chat_pb2 import GenerateRequest, Message
from unicluster.v1.node_pb2 import InspectRequest, StageSpec


def inspect(file: Path) -> None:
    GgmlEngine().inspect(whole(file), InspectRequest())


def renamed(first: Path) -> Path:
    return first.rename(first.with_name("model.gguf"))


def joined(first: Path) -> Path:
    file = first.with_name("model.gguf")
    parts = sorted(first.parent.glob("model-*.gguf"))
    file.write_bytes(b"".join(part.read_bytes() for part in parts))
    return file


def last_alone(first: Path) -> Path:
    return first.with_name(first.name.replace("00001-of", "00003-of")).rename(
        first.with_name("last.gguf")
    )


def exchanged(first: Path) -> Path:
    second, third = (first.with_name(first.name.replace("-00001-", f"-0000{n}-")) for n in (2, 3))
    shutil.move(second, first.with_name("aside"))
    shutil.move(third, second)
    shutil.move(first.with_name("aside"), third)
    return first


def absent(first: Path) -> Path:
    first.with_name(first.name.replace("-00001-", "-00002-")).unlink()
    return first


PARTS: list[tuple[Callable[[Path], Path], str]] = [
    (renamed, "model.gguf: part 1 of 3 of a split GGUF, and here are 1: keep all parts"),
    (joined, "model.gguf: part 1 of 3 of a split GGUF, and here are 1: keep all parts"),
    (last_alone, "last.gguf: part 3 of 3 of a split GGUF, and here are 1: keep all parts"),
    (exchanged, "model-00002-of-00003.gguf: part 3 of 3 of a split GGUF, and here are 3"),
    (absent, "model-00002-of-00003.gguf: missing"),
]


@pytest.mark.parametrize(("change", "said"), PARTS, ids=[c.__name__ for c, _ in PARTS])
def test_parts_that_are_not_all_there_are_refused(
    tmp_path: Path, change: Callable[[Path], Path], said: str
) -> None:
    file = change(write_gguf(tmp_path / "model.gguf", parts=3))

    with pytest.raises(InputError, match=f"{tmp_path}/{said}"):
        inspect(file)


def without(header: Header, name: str) -> Header:
    tensors = {key: value for key, value in header.tensors.items() if key != name}
    return Header(header.metadata, tensors, header.end)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_layer_without_one_of_its_tensors_is_refused(tmp_path: Path, architecture: str) -> None:
    layers = 6 if architecture == "glm-dsa" else 12
    header = read_header(write_gguf(tmp_path / "model.gguf", architecture, layers))
    check_layers(tmp_path, {"model.gguf": header})

    for name in header.tensors:
        # Of some kinds there is one layer alone: nothing says what it should have.
        if name.startswith(("blk.4.", "blk.7.")) and not name.endswith("ssm_a"):
            with pytest.raises(InputError, match=f"/model.gguf: there is no {name} in it"):
                check_layers(tmp_path, {"model.gguf": without(header, name)})


def test_a_layer_without_any_tensor_is_refused(tmp_path: Path) -> None:
    header = read_header(write_gguf(tmp_path / "model.gguf", "llama"))
    tensors = {name: t for name, t in header.tensors.items() if not name.startswith("blk.5.")}

    with pytest.raises(InputError, match=r"there is no blk\.5\."):
        check_layers(tmp_path, {"model.gguf": Header(header.metadata, tensors, header.end)})


def test_llama_cpp_s_own_reason_is_passed_on(tmp_path: Path) -> None:
    """A rule of its own, which no check here knows: as many heads as the rows say."""
    file = write_gguf(tmp_path / "model.gguf")
    data = file.read_bytes()
    key = b"llama.attention.head_count_kv"
    at = data.index(key) + len(key) + 4
    file.write_bytes(data[:at] + b"\x01" + data[at + 1 :])
    spec = StageSpec(first_layer=0, end_layer=6, finishes=True, context=64, users=1)

    with pytest.raises(StageError) as caught:
        GgmlEngine().load(whole(file), spec)

    assert str(caught.value).startswith(f"llama.cpp can't load {file}: ")
    assert "attn_k.weight" in str(caught.value) or "head" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_vocabulary_is_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(tmp_path, tiny_config("llama"), marks=True)
    file = write_gguf(tmp_path / "model.gguf")
    same = GgmlEngine().tokenizer(whole(file))
    assert "of another vocabulary" not in caplog.text

    tokenizer = tmp_path / "tokenizer.json"
    text = tokenizer.read_text()
    letters = "abcdefghij"
    for one, other in zip(letters, reversed(letters), strict=True):
        text = text.replace(f'"{one}":', f'"({other})":')
    for letter in letters:
        text = text.replace(f'"({letter})":', f'"{letter}":')
    tokenizer.write_text(text)
    used = GgmlEngine().tokenizer(whole(file))

    assert f"{file}: the tokenizer beside it is of another vocabulary" in caplog.text
    assert used.encode("abba") == same.encode("abba") == list(b"abba")


def test_a_gguf_without_a_chat_template_says_so(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    data = file.read_bytes()
    file.write_bytes(data.replace(b"tokenizer.chat_template", b"tokenizer.chat_t_mplate"))
    tokenizer = GgmlEngine().tokenizer(whole(file))
    request = GenerateRequest(messages=[Message(role="user", content="hi")])

    assert not tokenizer.has_chat_template
    with pytest.raises(InputError, match="the model has no chat template: send token"):
        check_request(
            *(request, tokenizer, 64, Sampling(), Tokenizing(tokenizer, 64)),
            *(Vocabulary(tokenizer), Cancellation()),
        )


def test_yarn_extends_the_context_of_a_gguf_once(tmp_path: Path) -> None:
    def limit(**metadata: Any) -> int:
        own = {key.replace("__", "."): value for key, value in metadata.items()}
        file = write_gguf(tmp_path / "model.gguf", metadata=own)
        return context_limit(open_gguf(whole(file)))

    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    assert limit() == 4096
    assert limit(**yarn) == 16384
    assert limit(**yarn, rope__scaling__original_context_length=1024) == 4096


@pytest.mark.parametrize("name", ["a[b]", "*?", "it's", "模型 ü", "%s {}"])
def test_a_gguf_of_any_path_is_loaded(tmp_path: Path, name: str) -> None:
    file = write_gguf(tmp_path / name / f"{name}.gguf", parts=3)
    spec = StageSpec(first_layer=0, end_layer=6, finishes=True, context=64, users=1)

    checkpoint = whole(file)
    inspect(file)
    assert GgmlEngine().tokenizer(checkpoint).encode("ab")
    assert GgmlEngine().load(checkpoint, spec).weight_bytes > 0


@pytest.mark.parametrize("stated", ["abc", "-1", "1.5", "99999", "²"])
def test_a_number_of_threads_that_is_none_is_refused(
    stated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(THREADS_ENV, stated)
    with pytest.raises(InputError, match=rf"^{THREADS_ENV}=.*: must be from 0 to "):
        threads()
