"""Blocks of tokens on disk, which prefixes that begin alike share, and writing that waits."""

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.prefixes.blocks import BLOCK_TOKENS, block_names, join, split
from node.prefixes.folder import BLOCK, PREFIXES, STATE
from node.prefixes.format import MAGIC, DamagedError
from node.prefixes.saved import SavedArray, SavedEntry
from node.prefixes.store import PrefixStore
from tests.support.cluster import until
from tests.support.deadlines import scaled
from tests.support.prefixes import counted, files_in, store_in

SECONDS = 30.0
A, B, C = "aa" * 16, "bb" * 16, "cc" * 16
WIDTH = 4
Tokens = np.ndarray[Any, Any]


def conversation(tokens: Tokens) -> list[SavedEntry]:
    """Caches of two layers: one grows with the tokens, and its places say which tokens they are
    of; the other has a state of the last ones alone.
    """
    keys = np.repeat(tokens.astype("<f4")[None, None, :, None], WIDTH, axis=3)
    values = np.asfortranarray(-keys)
    grows = (
        ("0", SavedArray("float32", keys, 2)),
        ("1", SavedArray("float32", values, 2)),
        ("2", str(len(tokens))),
    )
    window = (("0", SavedArray("float32", keys[:, :, -8:])), ("1", str(len(tokens))))
    return [SavedEntry("KVCache", grows), SavedEntry("RotatingKVCache", window)]


def names(tokens: Tokens) -> list[str]:
    return [name.hex() for name in block_names(tokens, "ring")]


def save(store: PrefixStore, name: str, tokens: Tokens, *, idle: bool = False) -> None:
    store.put(name, conversation(tokens), names(tokens), idle=idle)


def saved(directory: Path, name: str, tokens: Tokens) -> PrefixStore:
    store = store_in(directory)
    save(store, name, tokens)
    assert store.settle(scaled(SECONDS))
    return store


def read(store: PrefixStore, name: str) -> list[SavedEntry] | None:
    return store.read(name).result(scaled(SECONDS))


def same(ours: list[SavedEntry] | None, theirs: list[SavedEntry]) -> bool:
    return ours is not None and [plain(entry) for entry in ours] == [plain(e) for e in theirs]


def plain(entry: SavedEntry) -> Any:
    leaves = [
        (key, leaf.dtype, leaf.values.tolist()) if isinstance(leaf, SavedArray) else (key, leaf)
        for key, leaf in entry.leaves
    ]
    return entry.kind, leaves


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 4 * BLOCK_TOKENS), blocks=st.integers(0, 5))
def test_caches_that_are_split_are_joined_whole(tokens: int, blocks: int) -> None:
    entries = conversation(np.arange(tokens))
    parts, rest = split(entries, blocks)
    assert len(parts) == (blocks if blocks * BLOCK_TOKENS <= tokens else 0)
    assert same(join([*parts], rest), entries)


def test_blocks_are_named_by_all_tokens_before_their_end() -> None:
    tokens = np.arange(3 * BLOCK_TOKENS + 5)
    other = tokens.copy()
    other[BLOCK_TOKENS] += 1
    ours, theirs = names(tokens), names(other)
    assert (len(ours), ours[0] == theirs[0]) == (3, True)
    assert not {*ours[1:]} & {*theirs[1:]}
    assert ours != [name.hex() for name in block_names(tokens, "another ring")]


def test_a_grown_conversation_writes_only_its_new_blocks(tmp_path: Path) -> None:
    tokens = np.arange(5 * BLOCK_TOKENS)
    begun = tokens[: 3 * BLOCK_TOKENS + 9]
    saved(tmp_path, A, begun).close()
    before = {file: file.stat().st_ino for file in files_in(tmp_path, BLOCK)}
    one = next(iter(before)).stat().st_size
    bytes_before = counted(tmp_path)
    store = saved(tmp_path, B, tokens)
    after = {file: file.stat().st_ino for file in files_in(tmp_path, BLOCK)}
    assert (len(before), len(after)) == (3, 5)
    assert before.items() <= after.items()
    assert counted(tmp_path) == store.nbytes
    assert store.nbytes - bytes_before < 2 * one + one // 2  # two blocks, and the window
    assert same(read(store, B), conversation(tokens))
    assert same(read(store, A), conversation(begun))


def test_one_that_is_removed_leaves_the_blocks_of_others(tmp_path: Path) -> None:
    tokens = np.arange(3 * BLOCK_TOKENS)
    saved(tmp_path, A, tokens[: 2 * BLOCK_TOKENS]).close()
    store = saved(tmp_path, B, tokens)
    store.erase(A)
    until(lambda: len(files_in(tmp_path, STATE)) == 1, "it is removed")
    assert read(store, A) is None
    assert same(read(store, B), conversation(tokens))


def _damage(block: Path, _: Path) -> None:
    data = block.read_bytes()
    block.write_bytes(data[:-50] + bytes([data[-50] ^ 1]) + data[-49:])


DAMAGE: dict[str, Any] = {
    "damaged": _damage,
    "another's": lambda block, other: block.write_bytes(other.read_bytes()),
    "cut off": lambda block, _: block.write_bytes(block.read_bytes()[:-1]),
    "gone": lambda block, _: block.unlink(),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_prefix_without_one_of_its_blocks_is_not_there_and_can_be_saved_again(
    how: str, tmp_path: Path
) -> None:
    tokens = np.arange(3 * BLOCK_TOKENS)
    store = saved(tmp_path, A, tokens)
    first, second, _ = (path_of(tmp_path, name) for name in names(tokens))
    DAMAGE[how](second, first)
    assert read(store, A) is None
    assert not second.exists()
    save(store, A, tokens)
    assert store.settle(scaled(SECONDS))
    assert same(read(store, A), conversation(tokens))


def path_of(directory: Path, name: str, suffix: str = BLOCK) -> Path:
    return directory / PREFIXES / "stage" / (name + suffix)


def test_parts_of_other_caches_are_not_joined() -> None:
    parts, rest = split(conversation(np.arange(2 * BLOCK_TOKENS)), 1)
    whole = parts[0]
    other = SavedArray("float32", np.zeros((1, 1, BLOCK_TOKENS, WIDTH + 1), "<f4"), 2)
    for wrong in (
        whole[:1],
        [SavedEntry("another", entry.leaves) for entry in whole],
        [SavedEntry(entry.kind, ()) for entry in whole],
        [SavedEntry(entry.kind, (("0", other), ("1", other))) for entry in whole],
    ):
        with pytest.raises(DamagedError):
            join([wrong], rest)


def test_room_is_made_from_the_ends_of_prefixes(tmp_path: Path) -> None:
    tokens = np.arange(3 * BLOCK_TOKENS)
    limit = saved(tmp_path / "one", A, tokens).nbytes + 100
    store = store_in(tmp_path / "two", limit=limit)
    save(store, A, tokens)
    assert store.settle(scaled(SECONDS))
    another = tokens[::-1][:BLOCK_TOKENS]
    save(store, B, another)
    assert store.settle(scaled(SECONDS))
    there = {file.stem for file in files_in(tmp_path / "two")}
    assert names(tokens)[0] in there  # without which the others would be of no use
    assert not {A, names(tokens)[2]} & there
    assert same(read(store, B), conversation(another))
    assert counted(tmp_path / "two") <= limit


def test_files_of_an_earlier_format_are_removed_and_others_stay(tmp_path: Path) -> None:
    saved(tmp_path, A, np.arange(10)).close()
    (file,) = files_in(tmp_path)
    old, short, newer = (file.with_name(name * 16 + STATE) for name in ("bb", "cc", "dd"))
    old.write_bytes(MAGIC + b"\1\0\0\0" + file.read_bytes()[12:])
    short.write_bytes(MAGIC)
    newer.write_bytes(MAGIC + b"\x7f\0\0\0" + file.read_bytes()[12:])
    again = store_in(tmp_path, "another stage")
    assert files_in(tmp_path) == sorted([file, short, newer])
    assert again.nbytes == counted(tmp_path)


def test_writing_that_may_wait_does_until_no_answer_runs(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.workload.begin()
    save(store, A, np.arange(10), idle=True)
    until(lambda: files_in(tmp_path, ".part") != [], "it is begun")
    assert files_in(tmp_path, STATE) == []
    assert store.waiting > 0
    store.workload.end()
    assert store.settle(scaled(SECONDS))
    assert files_in(tmp_path, STATE) != []


def test_writing_that_waits_goes_on_before_what_can_not(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    with store.workload.running():
        save(store, A, np.arange(10), idle=True)
        save(store, B, np.arange(20))
        assert store.settle(scaled(SECONDS))
        save(store, C, np.arange(30), idle=True)
        assert store.hurry(C)
        assert store.settle(scaled(SECONDS))
        assert not store.hurry(C)
    assert len(files_in(tmp_path, STATE)) == 3


def test_writing_that_waits_is_done_when_the_store_is_closed(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    with store.workload.running():
        save(store, A, np.arange(10), idle=True)
        closing = threading.Thread(target=store.close, daemon=True)
        closing.start()
        closing.join(scaled(SECONDS))
        assert not closing.is_alive()
    assert same(read(store_in(tmp_path), A), conversation(np.arange(10)))


def test_blocks_are_used_after_what_they_are_before(tmp_path: Path) -> None:
    """So room is made from a prefix's end on, however old its first block is."""
    tokens = np.arange(2 * BLOCK_TOKENS)
    store = saved(tmp_path, A, tokens)
    for age, file in enumerate(files_in(tmp_path)):
        os.utime(file, (age, age))
    assert read(store, A) is not None
    blocks = [path_of(tmp_path, name) for name in names(tokens)]
    times = [path.stat().st_mtime_ns for path in (*blocks, path_of(tmp_path, A, STATE))]
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == 3
    assert min(times) > 10**12
