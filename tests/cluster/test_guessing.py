"""`serve` with quantized KV caches, lookup and a draft model, as a person uses them."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from tests.support.cluster import LocalCluster, ServeProgram, endless_model, until
from tests.support.tiny import tiny_config, write_model
from unicluster.chat.repl import summary
from unicluster.client.answers import Answer, Finish, Timings, Usage

# Two machines hold the model and its draft, and one does not.
MEMORY = 3_300_000
WIDE = {"head_dim": 64}
PROMPT = "1 2 3 4 5 6 7 8"
CHUNKS = range(17, 33)  # of its 33 tokens; what is left is the second
MAX_TOKENS = 40
# Until all machines have looked at a model, each in a process of its own.
REFUSED = 180.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_agents("ann", "bob", memory=MEMORY)
        yield cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_model(tmp_path_factory.mktemp("models") / "llama", **WIDE)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config("llama") | {"num_hidden_layers": 1, "hidden_size": 32}
    return write_model(tmp_path_factory.mktemp("models") / "small", config)


def serve(cluster: LocalCluster, model: Path, *options: str) -> ServeProgram:
    return cluster.serve(model, "--context", "256", "--users", "2", *options)  # the last ones win


def ask(server: ServeProgram) -> Answer:
    with server.client() as client:
        return client.chat(PROMPT, temperature=0, max_tokens=MAX_TOKENS)


def alone(path: Path, **options: Any) -> list[int]:
    """The tokens of mlx-lm in this process."""
    model, tokenizer = mlx_lm.load(str(path))[:2]
    chat = [{"role": "user", "content": PROMPT}]
    prompt: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    steps = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=MAX_TOKENS, **options)
    return [step.token for step in steps]


def test_lookup_gives_the_same_answers(cluster: LocalCluster, model: Path) -> None:
    with serve(cluster, model, "--lookup", "--draft-tokens", "4") as server:
        with ThreadPoolExecutor(2) as users:
            answers = list(users.map(lambda _: ask(server), range(2)))

        assert len(server.describe().stages) == 2
        assert server.describe().lanes == 2
        until(lambda: server.describe().live_caches == 0, "caches are free", 10)
    assert [list(answer.token_ids) for answer in answers] == 2 * [alone(model)]


def test_a_draft_is_counted_where_the_head_is(
    cluster: LocalCluster, model: Path, draft: Path
) -> None:
    with serve(cluster, model, "--draft", str(draft)) as server:
        answer = ask(server)

        assert re.search(r"head +(ann|bob), .* of embedding and lm_head, .* of draft", server.out)
        assert list(answer.token_ids) == alone(model)
        assert answer.usage.drafted_tokens > 0


def test_quantized_caches_are_those_of_mlx_lm(cluster: LocalCluster, model: Path) -> None:
    with serve(cluster, model, "--context", "512", "--kv-bits", "8") as server:
        answer = ask(server)

        assert len(server.describe().stages) == 2
    # mlx-lm quantizes after the first chunk. How long that is depends on how fast the machine is.
    told = [alone(model, kv_bits=8, quantized_kv_start=0, prefill_step_size=n) for n in CHUNKS]
    assert list(answer.token_ids) in told


def test_a_draft_with_other_tokens_is_refused_before_anything_loads(
    cluster: LocalCluster, model: Path
) -> None:
    told = serve(cluster, model, "--draft", "demo").result(REFUSED)

    assert told.code == 2
    assert "unicluster: --draft: its tokens are not those of llama" in told.err
    assert "Traceback" not in told.err


def test_caches_that_cannot_be_quantized_are_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    windows = write_model(tmp_path / "gemma3", tiny_config("gemma3"))

    told = serve(cluster, windows, "--kv-bits", "4").result(REFUSED)

    assert told.code == 2
    assert "gemma3 has sliding windows, which mlx-lm can't quantize" in told.err


def test_a_chat_says_how_many_drafted_tokens_were_accepted() -> None:
    usage = Usage(3, 40, drafted_tokens=20, accepted_tokens=15)

    told = summary(Finish("stop", usage, Timings(0.0, 0.12, 1.0, 39.0)))

    assert told == "40 tokens, 39.0 tokens/s, TTFT 0.12 s, 15 of 20 drafted tokens accepted"
