"""Prefixes on disk, from an engine that answers to the files and back after a restart."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from node.generation.engine import GenerationEngine
from node.pipeline.disk_prefixes import DiskPrefixes
from node.prefixes.blocks import BLOCK_TOKENS
from node.prefixes.folder import BLOCK, PART, STATE, TOKENS
from node.prefixes.saved import SavedArray
from tests.support import zoo
from tests.support.cluster import until
from tests.support.deadlines import scaled
from tests.support.engines import DEADLINE, THREAD, Completion, Tiny, listen
from tests.support.prefixes import counted, files_in, index_in
from tests.support.tiny import tiny_config, write_model
from unicluster.v1.chat_pb2 import GenerateRequest

PROMPT = [7 + n % 200 for n in range(120)]
ROOM = {"context": 512, "kv_bytes": 1 << 30}

Load = Callable[[str], Awaitable[Tiny]]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    loaded: dict[str, Tiny] = {}

    async def load(model_type: str) -> Tiny:
        if model_type not in loaded:
            path = tmp_path_factory.mktemp(model_type)
            kind, _, wide = model_type.partition(" ")
            write_model(path, tiny_config(kind) | ({"head_dim": 32} if wide else {}))
            loaded[model_type] = await Tiny.load(path)
        return loaded[model_type]

    return load


async def ask(engine: GenerationEngine, tokens: list[int], **fields: Any) -> Completion:
    request = GenerateRequest(token_ids=tokens, **({"max_tokens": 8} | fields))
    return await listen(await engine.submit(request))


async def saved(engine: GenerationEngine) -> int:
    """Has everything written, as before the end of a deployment, and ends the engine."""
    count = await engine.save_prefixes(scaled(DEADLINE))
    engine.close()
    return count


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "gemma3"])
async def test_a_second_turn_after_a_restart_goes_on_from_disk(
    model_type: str, load: Load, tmp_path: Path
) -> None:
    tiny = await load(model_type)
    engine = await tiny.engine(**ROOM, prefixes=index_in(tmp_path))
    first = await ask(engine, PROMPT)
    assert await saved(engine) == 1
    turn = [*PROMPT, *first.tokens, *PROMPT[:20]]
    again = await tiny.engine(**ROOM, prefixes=index_in(tmp_path))
    second = await ask(again, turn)
    measured = again.measure()
    again.close()
    assert second.tokens == (await tiny.alone(turn, 8)).tokens
    cached = second.finish.usage.cached_tokens if second.finish else 0
    assert cached >= len(PROMPT)
    assert (measured.disk_hits, measured.disk_tokens) == (1, cached)
    assert again.disk_bytes == counted(tmp_path) > 0
    assert len(files_in(tmp_path)) == 2


async def test_states_of_recurrent_layers_come_back_whole(load: Load, tmp_path: Path) -> None:
    tiny = await load("llama")
    odd = Tiny(await THREAD.run(lambda: zoo.build("qwen3_next")), tiny.tokenizer)
    prompt = [n % zoo.VOCAB for n in PROMPT]
    engine = await odd.engine(**ROOM, prefixes=index_in(tmp_path))
    first = await ask(engine, prompt)
    await saved(engine)
    again = await odd.engine(**ROOM, prefixes=index_in(tmp_path))
    turn = [*prompt, *first.tokens, *prompt[:9]]
    second = await ask(again, turn)
    other = await ask(again, [*prompt[:-1], 3, 4])
    again.close()
    assert second.tokens == (await odd.alone(turn, 8)).tokens
    assert [t.finish.usage.cached_tokens for t in (second, other) if t.finish] == [
        len(prompt) + len(first.tokens),
        0,
    ]


@pytest.mark.parametrize("kv_bits", [0, 8])
async def test_answers_go_to_disk_when_none_runs_and_only_what_they_added(
    kv_bits: int, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.pipeline.idle_saving.IDLE_SECONDS", 0.0)
    tiny = await load("llama wide")
    room = ROOM | {"context": 1024, "kv_bits": kv_bits}
    engine = await tiny.engine(**room, prefixes=index_in(tmp_path))
    prompt = [7 + n % 199 for n in range(BLOCK_TOKENS + 20)]
    first = await ask(engine, prompt)
    await asyncio.to_thread(until, lambda: len(files_in(tmp_path, TOKENS)) == 1, "it is written")
    (before,) = files_in(tmp_path, BLOCK)
    written = before.stat().st_ino
    turn = [*prompt, *first.tokens, *prompt]
    second = await ask(engine, turn)
    # The first turn is of no use beside the second one, and is removed when that is written.
    await asyncio.to_thread(until, lambda: one_longer(tmp_path, len(turn)), "it is covered")
    assert len(files_in(tmp_path, BLOCK)) == 2
    assert before.stat().st_ino == written
    # Nothing is saved or ended: as after a loss of power.
    again = await tiny.engine(**room, prefixes=index_in(tmp_path))
    third = await ask(again, [*turn, *second.tokens, 5])
    for each in (engine, again):
        each.close()
    cached = third.finish.usage.cached_tokens if third.finish else 0
    assert cached > len(turn)


def one_longer(directory: Path, tokens: int) -> bool:
    """Whether one prefix alone is on disk, of more than so many tokens."""
    index = index_in(directory)
    found = [dict(entries[0].leaves)["tokens"] for _, entries in index.store.tokens()]
    index.store.close()
    sizes = [leaf.values.size for leaf in found if isinstance(leaf, SavedArray)]
    return len(sizes) == 1 and sizes[0] > tokens


async def test_no_answer_waits_for_what_is_written_meanwhile(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.pipeline.idle_saving.IDLE_SECONDS", 0.0)
    tiny = await load("llama")
    index = index_in(tmp_path)
    engine = await tiny.engine(**ROOM, prefixes=index)
    index.store.workload.begin()  # as of another answer, on another lane or head
    await ask(engine, PROMPT)
    await asyncio.to_thread(until, lambda: files_in(tmp_path, PART) != [], "it is begun")
    second = await ask(engine, [n + 1 for n in PROMPT])
    assert second.finish is not None
    assert files_in(tmp_path, STATE) == []
    index.store.workload.end()
    await asyncio.to_thread(until, lambda: len(files_in(tmp_path, TOKENS)) == 2, "all are written")
    engine.close()
    assert not index.store.workload._running


async def test_a_prefix_that_still_waits_to_be_written_is_not_forgotten(
    load: Load, tmp_path: Path
) -> None:
    tiny = await load("llama")
    index = index_in(tmp_path)
    tokens = np.array(PROMPT, np.uint32)

    def waits() -> DiskPrefixes:
        cache = make_prompt_cache(tiny.model)
        mx.eval(tiny.model(mx.array(PROMPT)[None], cache=cache))
        disk = DiskPrefixes(tiny.model, index, 0.0)
        disk.save(tokens, cache, trimmable=True, idle=True)
        return disk

    def recalled(disk: DiskPrefixes) -> list[Any] | None:
        found = disk.find(tokens, 0)
        assert found is not None  # or it was forgotten
        return disk.recall(*found)

    index.store.workload.begin()
    disk = await THREAD.run(waits)
    assert await THREAD.run(lambda: recalled(disk)) is None
    index.store.workload.end()
    assert await THREAD.run(lambda: disk.settle(scaled(DEADLINE)))
    cache = await THREAD.run(lambda: recalled(disk))
    index.store.close()
    assert cache is not None
    assert cache[0].offset == len(PROMPT) - 1  # one is left to be computed
