"""Layouts of configurations are computed once, and again when anything they depend on changes."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from coordinator.models import layout_cache
from unicluster.errors import InputError
from unicluster.v1.node_pb2 import InspectRequest, ModelLayout


class Computing:
    """Counts what is computed."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, requests: Sequence[InspectRequest]) -> list[ModelLayout]:
        self.asked += [request.model for request in requests]
        return [ModelLayout(model_type=r.model, layer_bytes=[r.context or 1]) for r in requests]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNICLUSTER_HOME", str(tmp_path))
    return tmp_path


def config(model: str, **fields: int) -> InspectRequest:
    return InspectRequest(model=model, config_json="{}", **fields)


def test_a_layout_is_computed_once() -> None:
    computing = Computing()
    requests = [config("a"), config("b"), config("a", context=4)]

    first = layout_cache.layouts(requests, computing)
    again = layout_cache.layouts([*requests, config("c")], computing)

    assert computing.asked == ["a", "b", "a", "c"]
    assert again[:3] == first
    assert [layout.model_type for layout in again] == ["a", "b", "a", "c"]


def test_a_model_that_may_change_is_computed_each_time() -> None:
    computing = Computing()
    for _ in range(2):
        layout_cache.layouts([InspectRequest(model="/a/directory"), config("a")], computing)

    assert computing.asked == ["/a/directory", "a", "/a/directory"]


def test_other_code_computes_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    computing = Computing()
    layout_cache.layouts([config("a")], computing)
    monkeypatch.setattr(layout_cache, "__version__", "99")
    layout_cache.layouts([config("a")], computing)

    assert computing.asked == ["a", "a"]


def test_damaged_files_are_computed_again_and_a_refusal_is_not_cached(home: Path) -> None:
    computing = Computing()
    layout_cache.layouts([config("a")], computing)
    (file,) = (home / layout_cache.FOLDER).iterdir()
    for damage in (b"", b"\xff" * 40, file.read_bytes()[:-1]):
        file.write_bytes(damage)
        layout_cache.layouts([config("a")], computing)
    assert computing.asked == ["a"] * 4

    def refuse(requests: Sequence[InspectRequest]) -> list[ModelLayout]:
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        layout_cache.layouts([config("z")], refuse)
    assert layout_cache.layouts([config("z")], computing)


def test_a_folder_that_cannot_be_written_only_costs_time(home: Path) -> None:
    (home / layout_cache.FOLDER).write_text("no folder")
    computing = Computing()

    assert [layout_cache.layouts([config("a")], computing) for _ in range(2)]
    assert computing.asked == ["a", "a"]


def test_only_so_many_are_cached(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_cache, "MOST_FILES", 3)
    for number in range(6):
        layout_cache.layouts([config(str(number))], Computing())

    assert len(list((home / layout_cache.FOLDER).iterdir())) == 3
