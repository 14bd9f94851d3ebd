"""mlx-lm's own functions over `unicluster.load`: real workers, and the plain model's tokens."""

import copy
import gc
import random
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import psutil
import pytest
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    LRUPromptCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.sample_utils import make_logits_processors, make_sampler

import unicluster
from node.mlx.lazy import load_lazy
from node.pipeline import remote_cache
from tests.support.deadlines import scaled
from tests.support.sampled import sampled
from tests.support.tiny import ARCHITECTURES, tiny_config, write_model
from unicluster.errors import (
    InputError,
    NotFoundError,
    StageError,
    UnavailableError,
    UniclusterError,
)

PROMPT = [(7 * i * i + 3) % 200 + 1 for i in range(70)]
NOTICED = 5.0  # seconds until the loss of a machine must be known


@dataclass
class Pair:
    """A model in one piece, and the same over three processes."""

    path: Path
    tokenizer: Any
    plain: Any
    split: Any


# KV cache, rotating, and of MLA.
KINDS = ("llama", "gemma3", "deepseek_v3")


@pytest.fixture(scope="module", params=sampled(ARCHITECTURES, KINDS))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    path = write_model(tmp_path_factory.mktemp(request.param), tiny_config(request.param))
    plain, tokenizer = mlx_lm.load(str(path))[:2]
    split, _ = unicluster.load(str(path), local_nodes=3)
    with split:
        yield Pair(path, tokenizer, plain, split)


def steps(model: Any, prompt: list[int], **options: Any) -> tuple[list[int], list[mx.array]]:
    """Tokens and logprobs of `generate_step`."""
    found = list(generate_step(mx.array(prompt), model, **({"max_tokens": 20} | options)))
    return [token for token, _ in found], [logprobs for _, logprobs in found]


def tokens(model: Any, prompt: list[int], **options: Any) -> list[int]:
    return steps(model, prompt, **options)[0]


@pytest.mark.parametrize("chunk", [16, 2048], ids=["chunks of 16", "one chunk"])
def test_generate_step(pair: Pair, chunk: int) -> None:
    wanted = steps(pair.plain, PROMPT, max_tokens=40, prefill_step_size=chunk)

    got = steps(pair.split, PROMPT, max_tokens=40, prefill_step_size=chunk)

    assert got[0] == wanted[0]
    assert all(mx.array_equal(g, w) for g, w in zip(got[1], wanted[1], strict=True))


def test_a_prompt_of_one_token(pair: Pair) -> None:
    assert tokens(pair.split, [65]) == tokens(pair.plain, [65])


def test_generate(pair: Pair) -> None:
    def text(model: Any) -> Any:
        return mlx_lm.generate(model, pair.tokenizer, "hello there", max_tokens=30)

    assert text(pair.split) == text(pair.plain)


def test_stream_generate_with_sampling_and_penalties(pair: Pair) -> None:
    def sampled(model: Any) -> list[tuple[str, int]]:
        mx.random.seed(7)
        stream = mlx_lm.stream_generate(
            model,
            pair.tokenizer,
            PROMPT[:9],
            max_tokens=30,
            sampler=make_sampler(temp=0.9, top_p=0.9),
            logits_processors=make_logits_processors(repetition_penalty=1.3),
        )
        return [(step.text, step.token) for step in stream]

    assert sampled(pair.split) == sampled(pair.plain)


def test_batches_that_prompts_of_unequal_length_join_and_leave(pair: Pair) -> None:
    def answers(model: Any) -> dict[int, list[int]]:
        batch = BatchGenerator(model, max_tokens=20, prefill_step_size=16)
        first, second, _ = batch.insert([PROMPT[:5], PROMPT[3:33], PROMPT[10:21]])
        found: dict[int, list[int]] = {}
        turn = 0
        while responses := batch.next_generated():
            for response in responses:
                found.setdefault(response.uid, []).append(response.token)
            turn += 1
            if turn == 5:
                batch.insert([PROMPT[2:50], PROMPT[:9]], max_tokens=[7, 25])
            if turn == 9:
                batch.remove([second])
        batch.close()
        assert len(found[first]) == 20
        return found

    assert answers(pair.split) == answers(pair.plain)


def test_a_batch_that_goes_on_from_saved_caches(pair: Pair) -> None:
    def answers(model: Any) -> list[list[int]]:
        caches = [make_prompt_cache(model) for _ in range(2)]
        for cache, prompt in zip(caches, [PROMPT[:12], PROMPT[5:30]], strict=True):
            tokens(model, prompt, prompt_cache=cache, max_tokens=1)
        found = mlx_lm.batch_generate(
            model,
            pair.tokenizer,
            [[3, 4, 5], [6, 7]],
            prompt_caches=caches,
            max_tokens=8,
            return_prompt_caches=True,
        )
        return [tokens(model, [9, 9], prompt_cache=cache) for cache in found.caches]

    assert answers(pair.split) == answers(pair.plain)


@pytest.mark.parametrize("seed", [0, 3], ids=["drafted by itself", "drafted by another"])
def test_speculative_decoding(pair: Pair, tmp_path: Path, seed: int) -> None:
    # mlx-lm can't take tokens off a windowed cache that is full: then it must not fill.
    windowed = "gemma3" in pair.path.name
    prompt, count = (PROMPT[:5], 9) if windowed else (PROMPT, 30)
    config = tiny_config("gemma3" if windowed else "llama") if seed else None
    draft = mlx_lm.load(str(write_model(tmp_path, config, seed)))[0] if config else pair.plain

    def found(model: Any) -> list[tuple[int, bool]]:
        drafted = speculative_generate_step(mx.array(prompt), model, draft, max_tokens=count)
        return [(token, was_drafted) for token, _, was_drafted in drafted]

    assert found(pair.split) == found(pair.plain)
    assert [token for token, _ in found(pair.split)] == tokens(pair.plain, prompt, max_tokens=count)


@pytest.mark.parametrize("frame_bytes", [remote_cache.FRAME_BYTES, 4000])
def test_a_prompt_cache_is_saved_and_loaded(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frame_bytes: int
) -> None:
    """Also one of which each layer is larger than a frame may be."""
    if frame_bytes != remote_cache.FRAME_BYTES:
        monkeypatch.setattr(remote_cache, "FRAME_BYTES", remote_cache.FRAME_OVERHEAD + frame_bytes)
        monkeypatch.setattr(remote_cache, "PART_BYTES", frame_bytes)

    def answers(model: Any, file: str) -> list[int]:
        cache = make_prompt_cache(model)
        found = tokens(model, PROMPT, prompt_cache=cache)
        save_prompt_cache(file, cache)
        return found + tokens(model, [5, 6, 7], prompt_cache=load_prompt_cache(file))

    wanted = answers(pair.plain, str(tmp_path / "plain.safetensors"))
    assert answers(pair.split, str(tmp_path / "split.safetensors")) == wanted


def test_a_prompt_cache_is_trimmed(pair: Pair) -> None:
    def answers(model: Any) -> tuple[list[int], int, list[int]]:
        cache = make_prompt_cache(model)
        before = tokens(model, PROMPT[:8], prompt_cache=cache, max_tokens=4)
        trimmed: Any = trim_prompt_cache(cache, 5)
        return before, trimmed, tokens(model, [5, 6, 7], prompt_cache=cache)

    found = answers(pair.split)

    assert found == answers(pair.plain)
    assert found[1] == 5


def test_a_copy_of_a_cache_goes_its_own_way(pair: Pair) -> None:
    def answers(model: Any) -> list[list[int]]:
        cache = make_prompt_cache(model)
        tokens(model, PROMPT[:20], prompt_cache=cache)
        copied = copy.deepcopy(cache)
        found = [tokens(model, [5, 6, 7], prompt_cache=cache)]
        found.append(tokens(model, [8, 9], prompt_cache=copied))
        return [*found, tokens(model, [1], prompt_cache=cache)]

    assert answers(pair.split) == answers(pair.plain)


def test_lru_prompt_cache(pair: Pair) -> None:
    def answers(model: Any) -> list[Any]:
        store = LRUPromptCache()
        cache = make_prompt_cache(model)
        tokens(model, PROMPT[:10], prompt_cache=cache, max_tokens=1)
        store.insert_cache("m", PROMPT[:10], cache)
        found: list[Any] = []
        for asked in (PROMPT[:14], [*PROMPT[:6], 1, 2], PROMPT[:10], [250, 251]):
            again, rest = store.fetch_nearest_cache("m", asked)
            prompt = rest or asked[-1:]
            found.append((rest, tokens(model, prompt, prompt_cache=again, max_tokens=6)))
        return found

    assert answers(pair.split) == answers(pair.plain)


def test_caches_know_their_size(pair: Pair) -> None:
    def known(model: Any) -> list[Any]:
        cache = make_prompt_cache(model)
        fresh = cache[-1].empty(), cache[-1].size()
        tokens(model, PROMPT[:9], prompt_cache=cache, max_tokens=3)
        return [*fresh, cache[-1].empty(), cache[-1].size(), cache[-1].is_trimmable()]

    assert known(pair.split) == known(pair.plain)


def test_what_a_stage_is_asked_is_answered_whatever_is_sent_meanwhile(llama: Path) -> None:
    model, _ = unicluster.load(str(llama), local_nodes=2)

    class Overtaken(deque[Any]):
        """Another thread sends what is recorded, as when a cache was freed, as soon as it is."""

        def append(self, operation: Any) -> None:
            super().append(operation)
            sender = threading.Thread(target=model._flush)
            sender.start()
            sender.join(0.2)  # it may have to wait for us

    with model:
        cache = make_prompt_cache(model)
        model(mx.array([PROMPT]), cache=cache)
        wanted = cache[-1].nbytes
        cache[-1].stage.operations = Overtaken()

        assert cache[-1].nbytes == wanted > 0


def test_after_many_requests_no_cache_is_left_on_any_stage(pair: Pair) -> None:
    """200 of them, of any length, a third taken away before their end."""
    dice = random.Random(5)
    batch = BatchGenerator(pair.split, prefill_step_size=8, completion_batch_size=12)
    waiting = [PROMPT[: dice.randint(1, 24)] for _ in range(200)]
    running: set[int] = set()
    begun = 0

    while waiting or running:
        while waiting and len(running) < 16:
            running |= set(batch.insert([waiting.pop()], max_tokens=[dice.randint(1, 8)]))
            begun += 1
        running -= {r.uid for r in batch.next_generated() if r.finish_reason is not None}
        if running and dice.random() < 0.5:
            leaving = dice.choice(sorted(running))
            batch.remove([leaving])
            running.remove(leaving)
    batch.close()
    del batch
    gc.collect()

    assert begun == 200
    assert pair.split.live_caches() == 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), tiny_config("llama"))


def workers() -> list[psutil.Process]:
    """The stage workers of this process, oldest first."""
    found = [p for p in psutil.Process().children() if "node.worker" in p.cmdline()]
    return sorted(found, key=lambda process: process.create_time())


@pytest.mark.parametrize(
    ("victim", "blow"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_the_loss_of_a_machine_is_named_in_seconds(
    llama: Path, victim: int, blow: signal.Signals
) -> None:
    """Slow when frozen: then only the missing answer to a ping tells, seconds later."""
    others = workers()
    model, tokenizer = unicluster.load(str(llama), local_nodes=3)
    with model:
        stream = mlx_lm.stream_generate(model, tokenizer, PROMPT[:9], max_tokens=100_000)
        for _ in range(5):
            next(stream)

        workers()[len(others) + victim - 1].send_signal(blow)
        lost = time.monotonic()
        with pytest.raises(UnavailableError, match=f"^machine local-{victim} "):
            list(stream)

        assert time.monotonic() - lost < scaled(NOTICED)
        with pytest.raises(UnavailableError, match=f"^machine local-{victim} "):  # from now on
            tokens(model, PROMPT[:9])
    assert workers() == others


def test_close_leaves_no_process_behind(llama: Path) -> None:
    others = workers()
    model, _ = unicluster.load(str(llama), local_nodes=4)
    assert len(workers()) == len(others) + 3

    model.close()

    assert workers() == others
    model.close()  # once more is no harm
    with pytest.raises(UnavailableError, match="the ring was closed"):
        tokens(model, PROMPT)


def test_the_end_of_the_process_ends_its_workers(llama: Path) -> None:
    """Without `close`."""
    program = f"""
import psutil, unicluster
model, _ = unicluster.load({str(llama)!r}, local_nodes=2)
print(*(p.pid for p in psutil.Process().children()))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=scaled(60)
    )

    assert (ran.returncode, ran.stderr) == (0, "")
    psutil.wait_procs(
        [psutil.Process(int(p)) for p in ran.stdout.split() if psutil.pid_exists(int(p))],
        timeout=scaled(10),
    )
    assert not any(psutil.pid_exists(int(pid)) for pid in ran.stdout.split())


def test_one_node_is_the_plain_model(llama: Path) -> None:
    others = workers()
    plain = mlx_lm.load(str(llama))[0]

    model, _ = unicluster.load(str(llama), local_nodes=1)

    assert workers() == others
    assert tokens(model, PROMPT) == tokens(plain, PROMPT)
    model.close()


def test_frames_larger_than_grpc_takes_by_default(tmp_path: Path) -> None:
    """300 tokens of 16 KiB each way: 4.9 MB in one frame."""
    wide = {"hidden_size": 4096, "num_hidden_layers": 3, "intermediate_size": 16}
    slim = {"num_attention_heads": 1, "num_key_value_heads": 1}
    path = write_model(tmp_path, tiny_config("llama") | wide | slim)
    plain = mlx_lm.load(str(path))[0]
    prompt = [i % 250 for i in range(300)]

    model, _ = unicluster.load(str(path), local_nodes=3)

    with model:
        logits = model(mx.array([prompt]))
        assert mx.array_equal(mx.array(logits), plain(mx.array([prompt])))
        assert tokens(model, prompt, max_tokens=3) == tokens(plain, prompt, max_tokens=3)


def test_quantized_on_load(llama: Path) -> None:
    plain = load_lazy(llama, "q4").model

    model, _ = unicluster.load(str(llama), local_nodes=3, quant="q4")

    with model:
        assert tokens(model, PROMPT) == tokens(plain, PROMPT)


@pytest.mark.parametrize(
    "options",
    [{}, {"local_nodes": 2, "nodes": ["studio"]}],
    ids=["neither", "both"],
)
def test_load_wants_local_nodes_or_nodes(llama: Path, options: dict[str, Any]) -> None:
    assert_refused(
        "give either local_nodes=N or nodes=", lambda: unicluster.load(str(llama), **options)
    )


@pytest.mark.parametrize("count", [0, -1, 7])
def test_load_refuses_more_stages_than_layers(llama: Path, count: int) -> None:
    assert_refused(
        "local_nodes: between 1 and 6, the layers of",
        lambda: unicluster.load(str(llama), local_nodes=count),
    )


def test_load_refuses_an_unknown_model() -> None:
    assert_refused(
        "no model 'nosuchmodel'",
        lambda: unicluster.load("nosuchmodel", local_nodes=2),
        NotFoundError,
    )


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"abc", "model.safetensors: damaged safetensors"),
        ("model.safetensors", b"\x08" + bytes(7) + b"no JSON!", "model.safetensors: damaged"),
        ("config.json", b"{", "config.json: "),
        ("config.json", b"{}", "config.json: has no model_type"),
        ("config.json", None, "has no config.json"),
    ],
    ids=["cut off", "bad header", "no JSON", "no model type", "missing"],
)
def test_load_refuses_a_damaged_model(
    tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    path = write_model(tmp_path, tiny_config("llama"))
    if content is None:
        (path / file).unlink()
    else:
        (path / file).write_bytes(content)

    assert_refused(message, lambda: unicluster.load(str(path), local_nodes=3))


def test_load_says_why_a_worker_failed_and_ends_the_others(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nowhere")  # no Python starts any more

    assert_refused(
        "^local-1: exited with code 1: .*",
        lambda: unicluster.load(str(llama), local_nodes=3),
        StageError,
    )


def test_load_refuses_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert_refused("nowhere", lambda: unicluster.load(str(tmp_path / "nowhere"), local_nodes=2))


def assert_refused(
    message: str, load: Callable[[], Any], kind: type[UniclusterError] = InputError
) -> None:
    others = workers()
    with pytest.raises(kind, match=message) as caught:
        load()
    assert "\n" not in str(caught.value)
    assert workers() == others
