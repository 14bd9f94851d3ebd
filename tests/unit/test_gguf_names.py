"""Which files of a repository of GGUFs are meant, in repositories as people make them."""

import pytest

from unicluster.checkpoints.checkpoint import File, Manifest, is_gguf
from unicluster.checkpoints.gguf_names import (
    check_named,
    chosen,
    is_quant,
    parts,
    quant_of,
    quants,
    split_id,
)
from unicluster.errors import InputError, NotFoundError

SPLIT = [f"UD-Q2_K_XL/Big-R1-UD-Q2_K_XL-{part:05}-of-00003.gguf" for part in (1, 2, 3)]
FILES = [
    "README.md",
    "config.json",
    "imatrix_unsloth.gguf",
    "mmproj-F16.gguf",
    "Big-R1-Q4_K_M.gguf",
    "Big-R1-UD-Q4_K_M.gguf",
    "Big-R1-Q2_K.gguf",
    *SPLIT,
]


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("Qwen3-8B-Q4_K_M.gguf", "q4_k_m"),
        ("Llama-3-70B.i1-IQ2_XXS.gguf", "iq2_xxs"),
        ("llama-2-7b.Q4_0.gguf", "q4_0"),
        ("qwen2.5-7b-instruct-q4_k_m-00001-of-00002.gguf", "q4_k_m"),
        ("UD-TQ1_0/R1-UD-TQ1_0.gguf", "ud-tq1_0"),
        ("gpt-oss-120b-mxfp4-00001-of-00003.gguf", "mxfp4"),
        ("Coder-MXFP4_MOE.gguf", "mxfp4_moe"),
        ("BF16/Kimi-K2-BF16-00001-of-00045.gguf", "bf16"),
        ("gemma-3-4b-it-f16.gguf", "f16"),
        ("Phi-3-mini-4k-instruct-q4.gguf", "q4"),
        ("ggml-model-i2_s.gguf", "i2_s"),
        ("stheno-Q4_K_M-imat.gguf", "q4_k_m"),
        ("Q8_0/model-00001-of-00002.gguf", "q8_0"),
        ("model.gguf", ""),
        ("gemma-3-4b-it.mmproj-f16.gguf", ""),
        ("imatrix-q8_0.gguf", ""),
        ("Qwen3-8B.imatrix.gguf", ""),
        ("Qwen3-8B-Q4_K_M.safetensors", ""),
    ],
)
def test_a_files_name_tells_its_quantization(name: str, quant: str) -> None:
    assert quant_of(name) == quant
    assert not quant or is_quant(quant)


@pytest.mark.parametrize(
    ("quant", "wanted"),
    [
        ("q4_k_m", ["Big-R1-Q4_K_M.gguf"]),
        ("ud-q4_k_m", ["Big-R1-UD-Q4_K_M.gguf"]),
        ("q2_k", ["Big-R1-Q2_K.gguf"]),
        ("ud-q2_k_xl", SPLIT),
    ],
)
def test_a_quantization_is_a_whole_word(quant: str, wanted: list[str]) -> None:
    assert chosen(f"me/big:{quant}", FILES) == wanted


def test_a_quantization_that_is_not_there_gets_those_that_are() -> None:
    with pytest.raises(NotFoundError) as caught:
        chosen("me/big:iq1_s", FILES)
    assert str(caught.value) == (
        "me/big: there is no GGUF of iq1_s in it: it has q2_k, q4_k_m, ud-q2_k_xl, ud-q4_k_m"
    )


def test_a_part_that_is_missing_is_named() -> None:
    with pytest.raises(NotFoundError, match=r"of a split GGUF there is no .*-00002-of-00003"):
        chosen("me/big:ud-q2_k_xl", [SPLIT[0], SPLIT[2]])


def test_several_models_of_one_quantization_are_named() -> None:
    files = [*FILES, "Small-R1-Q4_K_M.gguf"]
    with pytest.raises(InputError, match=r"Big-R1-Q4_K_M\.gguf and Small-R1-Q4_K_M\.gguf"):
        chosen("me/big:q4_k_m", files)


def test_a_repository_of_ggufs_needs_a_quantization() -> None:
    with pytest.raises(InputError, match="such as me/big:q2_k; it has q2_k, q4_k_m, ud-q2_k_xl"):
        check_named("me/big", FILES)
    with pytest.raises(InputError, match="whose names have no quantization"):
        check_named("me/big", ["model.gguf"])
    check_named("me/big", ["config.json"])


def test_a_model_by_repository_and_quantization() -> None:
    assert split_id("me/Big-R1:ud-q2_k_xl") == ("me/Big-R1", "ud-q2_k_xl")
    assert is_gguf("me/Big-R1:ud-q2_k_xl")
    for other in ("demo", "me/Big-R1", "/models/big:q4_0", "llama3.1:405b"):
        assert split_id(other) == (other, "")
        assert not is_gguf(other)


def test_the_parts_of_a_file() -> None:
    assert parts(SPLIT[1]) == SPLIT
    assert parts("one.gguf") == ["one.gguf"]
    assert parts("odd-00004-of-00003.gguf") == ["odd-00004-of-00003.gguf"]
    assert quants(SPLIT) == ["ud-q2_k_xl"]


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../../x", "a//x", "./x", "a\\..\\x", "", "x\0"]
)
def test_a_path_that_leads_out_is_refused(name: str) -> None:
    revision = "1" * 40
    Manifest("me/big", revision, {SPLIT[0]: File(1)})
    with pytest.raises(InputError, match="invalid name of a model's file"):
        Manifest("me/big", revision, {name: File(1)})
