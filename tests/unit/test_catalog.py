"""Names as people type them, and what they lead to."""

from pathlib import Path

import pytest

from coordinator.models.catalog import QUANTS, Source, checked_engine, entries, resolve
from unicluster.errors import InputError, NotFoundError


def a_model(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_a_catalogue_name_means_its_four_bit_mlx_repository() -> None:
    found = resolve("deepseek-r1")
    assert found == Source("mlx-community/DeepSeek-R1-4bit", "", "deepseek-r1 q4")


def test_a_quantization_without_a_repository_is_applied_on_load() -> None:
    assert resolve("deepseek-r1", "q2") == Source("deepseek-ai/DeepSeek-R1", "q2", "deepseek-r1 q2")


def test_none_means_the_original_weights() -> None:
    assert resolve("qwen3-14b", "none") == Source("Qwen/Qwen3-14B", "", "qwen3-14b")


@pytest.mark.parametrize(
    "name", ["Llama-3.1-405B", "llama3.1:405b", "llama 405b", "Llama-3.1-405B-Instruct"]
)
def test_names_may_be_written_as_people_do(name: str) -> None:
    assert resolve(name).display == "llama-3.1-405b q4"


def test_every_name_means_one_model() -> None:
    for entry in entries():
        for name in entry.names:
            for quant in QUANTS:
                assert resolve(name, quant).display.split()[0] == entry.id


def test_the_demo_is_taken_as_it_is() -> None:
    assert resolve("demo") == Source("demo", "", "demo")


def test_owner_and_name_is_a_hub_repository() -> None:
    found = resolve("mlx-community/Qwen3-4B-4bit", "q4")
    assert found == Source("mlx-community/Qwen3-4B-4bit", "q4", "mlx-community/Qwen3-4B-4bit q4")


def test_a_directory_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model(tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    for name in ("models/mine", "./models/mine", str(model)):
        assert resolve(name, "q4") == Source(str(model), "q4", "mine q4")


def test_a_bare_name_may_be_a_directory_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = a_model(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert resolve("mine").model == str(model)


def test_a_catalogue_name_wins_over_a_directory_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_model(tmp_path / "glm-5")
    monkeypatch.chdir(tmp_path)
    assert resolve("glm-5").model == "mlx-community/GLM-5-4bit"
    assert resolve("./glm-5").model == str(tmp_path / "glm-5")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere-at-all", "a/b/c"])
def test_a_path_to_nothing_is_not_taken_for_a_repository(name: str) -> None:
    with pytest.raises(InputError, match="no directory "):
        resolve(name)


def test_a_directory_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        resolve(str(tmp_path))


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(InputError, match="is a file"):
        resolve(str(file))


def test_a_directory_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    # A name too long for the file system fails for every user, root included.
    with pytest.raises(InputError, match=r"can't read .*: File name too long"):
        resolve(str(tmp_path / ("x" * 300)))


def test_a_misspelt_name_gets_the_closest_ones() -> None:
    with pytest.raises(NotFoundError, match=r"no model 'deepseek-r2': did you mean deepseek-r1"):
        resolve("deepseek-r2")


def test_an_unknown_name_says_what_is_accepted() -> None:
    with pytest.raises(NotFoundError, match="a directory, or a hub repository owner/name"):
        resolve("zzzzzz")


def test_no_name_is_refused() -> None:
    with pytest.raises(InputError, match="no model named"):
        resolve(" ")


def test_an_unknown_quantization_names_the_known() -> None:
    with pytest.raises(InputError, match="no quantization 'q5': it is one of q2, q3"):
        resolve("deepseek-r1", "q5")


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("me/Big-R1-GGUF", "UD-Q2_K_XL"),
        ("me/Big-R1-GGUF:ud-q2_k_xl", None),
        ("me/Big-R1-GGUF:UD-Q2_K_XL", "ud-Q2_k_xl"),
    ],
)
def test_a_quantization_of_ggufs_names_those_of_a_repository(name: str, quant: str | None) -> None:
    found = resolve(name, quant)
    assert found == Source("me/Big-R1-GGUF:ud-q2_k_xl", "", "me/Big-R1-GGUF ud-q2_k_xl")
    assert checked_engine(found, "ggml") == found
    with pytest.raises(InputError, match=r"--engine mlx: .* is a GGUF, which ggml computes"):
        checked_engine(found, "mlx")


@pytest.mark.parametrize("name", ["demo", "deepseek-r1", "."])
def test_a_quantization_of_ggufs_needs_their_repository(name: str) -> None:
    with pytest.raises(InputError, match=r"'q4_k_m': .* such as owner/name:q4_k_m"):
        resolve(name, "q4_k_m")


@pytest.mark.parametrize(
    ("name", "quant", "reason"),
    [
        ("me/big", "best", "no quantization 'best'"),
        ("me/big:latest", None, "me/big:latest: latest is no quantization of a GGUF"),
        ("me/big:q4_0", "q8_0", "--quant q8_0: me/big:q4_0 says q4_0 already"),
        ("me/big.gguf", "q4_0", r"me/big\.gguf is a GGUF, whose weights stay as they are"),
    ],
)
def test_quantizations_that_cannot_be(name: str, quant: str | None, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        resolve(name, quant)
