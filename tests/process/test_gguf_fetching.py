"""GGUFs of a hub repository: the ones that are meant, first their headers, then they themselves.

What is fetched is not computed with, so nothing of llama.cpp is needed.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.cluster.test_fetching import fetch
from tests.support.hub import Hub
from tests.support.tiny_gguf import write_gguf
from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.checkpoints.gguf import FIRST_BYTES, read_header

REPO = "org/tiny"
SMALL, BIG = f"{REPO}:q4_0", f"{REPO}:ud-q2_k_xl"
SPLIT = [f"UD-Q2_K_XL/Tiny-UD-Q2_K_XL-{part:05}-of-00003.gguf" for part in (1, 2, 3)]
WHOLE = "Tiny-Q4_0.gguf"


def write_repository(path: Path) -> Path:
    """Two quantizations, one of them split and in a folder, and nothing else. The names lie:
    both are the same model in float32."""
    write_gguf(path / WHOLE)
    write_gguf(path / "UD-Q2_K_XL" / "Tiny-UD-Q2_K_XL.gguf", parts=3)
    (path / "README.md").write_text("Tiny, but random.")
    (path / "mmproj-F16.gguf").write_bytes(b"GGUF of something else")
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_repository(tmp_path / "repository")


@pytest.fixture
def hub(repository: Path) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add(REPO, repository)
        yield hub


def copy_of(home: Path, model: str) -> Checkpoint:
    (root,) = home.glob(f"hub/models--org--tiny/unicluster/*-{model.partition(':')[2]}")
    found = Checkpoint.open(root)
    assert found is not None
    return found


def test_a_description_is_the_headers_of_what_was_asked_for(
    hub: Hub, repository: Path, tmp_path: Path
) -> None:
    ran = fetch(hub, tmp_path / "hf", BIG, "description")

    assert ran.returncode == 0, ran.stderr
    copy = copy_of(tmp_path / "hf", BIG)
    assert list(copy.manifest.files) == SPLIT
    for name in SPLIT:
        header = read_header(repository / name)
        # The first part is nothing but a header.
        assert copy.available(name) == ((0, header.end),)
        assert read_header(copy.root / name).tensors == header.tensors
    assert hub.sent(WHOLE) == 0


def test_a_header_longer_than_the_first_look(hub: Hub, repository: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(repository / WHOLE), "llama")
    writer.add_description("x" * 2 * FIRST_BYTES)
    writer.add_tensor("w", np.zeros(8 * FIRST_BYTES, np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    hub.add(REPO, repository)

    ran = fetch(hub, tmp_path / "hf", SMALL, "description")

    assert ran.returncode == 0, ran.stderr
    ((start, end),) = copy_of(tmp_path / "hf", SMALL).available(WHOLE)
    assert (start, end) == (0, read_header(repository / WHOLE).end)
    assert hub.sent(WHOLE) <= 6 * FIRST_BYTES


def test_two_quantizations_lie_side_by_side(hub: Hub, repository: Path, tmp_path: Path) -> None:
    for model in (BIG, SMALL):
        ran = fetch(hub, tmp_path / "hf", model)
        assert ran.returncode == 0, ran.stderr
    asked = len(hub.requests)
    for model in (BIG, SMALL):
        ran = fetch(hub, tmp_path / "hf", model, HF_HUB_OFFLINE="1")
        assert ran.returncode == 0, ran.stderr

    assert len(hub.requests) == asked
    (snapshot,) = (tmp_path / "hf/hub/models--org--tiny/snapshots").iterdir()
    for name in (*SPLIT, WHOLE):
        assert (snapshot / name).read_bytes() == (repository / name).read_bytes()


def test_a_damaged_part_is_fetched_again(hub: Hub, repository: Path, tmp_path: Path) -> None:
    assert fetch(hub, tmp_path / "hf", BIG, "description").returncode == 0
    hub.corrupt(SPLIT[1])
    hub.drop_after(SPLIT[2], 100_000)

    ran = fetch(hub, tmp_path / "hf", BIG)

    assert ran.returncode == 0, ran.stderr
    copy = copy_of(tmp_path / "hf", BIG)
    for name in SPLIT:
        assert (copy.root / name).read_bytes() == (repository / name).read_bytes()


def test_what_another_program_fetched_is_used(hub: Hub, repository: Path, tmp_path: Path) -> None:
    """As llama.cpp does it: only the one quantization, and nothing of the repository besides."""
    folder = tmp_path / "hf/hub/models--org--tiny"
    shutil.copytree(
        repository / "UD-Q2_K_XL",
        folder / "snapshots/0123456789abcdef0123456789abcdef01234567/UD-Q2_K_XL",
    )
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0123456789abcdef0123456789abcdef01234567")

    used = fetch(hub, tmp_path / "hf", BIG, HF_HUB_OFFLINE="1")
    missing = fetch(hub, tmp_path / "hf", SMALL, HF_HUB_OFFLINE="1")

    assert used.returncode == 0, used.stderr
    assert "not in this machine's cache, and HF_HUB_OFFLINE is set" in missing.stderr


REFUSALS: dict[str, tuple[str, Callable[[Hub, Path], object], str]] = {
    "no such quantization": (
        f"{REPO}:q8_0",
        lambda hub, path: None,
        "org/tiny: there is no GGUF of q8_0 in it: it has q4_0, ud-q2_k_xl",
    ),
    "no quantization": (
        REPO,
        lambda hub, path: None,
        "org/tiny: its weights are GGUFs: name one, such as org/tiny:q4_0; it has q4_0, ud-q2_k_xl",
    ),
    "a part is missing": (
        BIG,
        lambda hub, path: (path / SPLIT[1]).unlink(),
        f"org/tiny: of a split GGUF there is no {SPLIT[1]}",
    ),
    "no GGUF": (
        SMALL,
        lambda hub, path: (path / WHOLE).write_bytes(b"PK and so on"),
        f"{SMALL}: {WHOLE} on the hub: damaged GGUF: it is no GGUF file",
    ),
    "cut off": (
        SMALL,
        lambda hub, path: (path / WHOLE).write_bytes((path / WHOLE).read_bytes()[:3000]),
        f"{SMALL}: {WHOLE} on the hub: damaged GGUF: it is cut off",
    ),
    "gated": (
        SMALL,
        lambda hub, path: hub.gate(REPO),
        f"{SMALL}: gated; accept its terms on the hub and set HF_TOKEN",
    ),
}


@pytest.mark.parametrize(("model", "change", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_the_reason_of_a_refusal(
    model: str,
    change: Callable[[Hub, Path], object],
    reason: str,
    hub: Hub,
    repository: Path,
    tmp_path: Path,
) -> None:
    change(hub, repository)
    hub.add(REPO, repository)

    ran = fetch(hub, tmp_path / "hf", model)

    assert ran.returncode != 0
    assert ran.stderr.splitlines()[-1].startswith(reason)
    assert "Traceback" not in ran.stderr


def test_the_hub_is_asked_by_a_file_that_there_is(hub: Hub, tmp_path: Path) -> None:
    """Whether a machine may fetch: there is no config.json to try it with."""
    hub.token = "hf_x"  # noqa: S105

    with_token = fetch(hub, tmp_path / "hf", BIG, "check", HF_TOKEN="hf_x")  # noqa: S106
    without = fetch(hub, tmp_path / "hf", BIG, "check")
    hub.gate(REPO)
    gated = fetch(hub, tmp_path / "hf", BIG, "check", HF_TOKEN="hf_x")  # noqa: S106

    assert with_token.returncode == 0, with_token.stderr
    assert "no such repository on the hub, or HF_TOKEN does not open it" in without.stderr
    assert "gated; accept its terms" in gated.stderr
