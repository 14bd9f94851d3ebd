"""The main job, with real processes: agents join, a model is served over them, clients chat.

Starting takes its time: each agent and each worker is a Python process that imports gRPC or
MLX, and before a name is taken on the network its owner gets two seconds to object.
"""

import asyncio
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from tests.support.cluster import LocalCluster, ServeProgram, endless_model, until
from tests.support.deadlines import scaled
from tests.support.sampled import sampled
from tests.support.tiny import ARCHITECTURES
from unicluster.client.answers import Answer, Delta
from unicluster.errors import NotFoundError, UnavailableError

MACHINES = ("ann", "bob", "cat")
# Of what each machine offers, three hold each of the tiny models at these contexts and for two
# users, and two do not.
MEMORY = 1_100_000
CONTEXT = dict.fromkeys(ARCHITECTURES, 512) | {"gemma3": 1024}
PROMPTS = ["hello", "What is " + "very " * 30 + "long?", "1 2 3"]
MAX_TOKENS = 40
LONG = 400  # tokens: a few seconds


@dataclass
class Served:
    """A model that the cluster serves, and its files for mlx-lm alone."""

    server: ServeProgram
    path: Path

    def alone(self, prompt: str) -> tuple[str, list[int]]:
        """The text and tokens of mlx-lm in this process."""
        model, tokenizer = mlx_lm.load(str(self.path))[:2]
        chat = [{"role": "user", "content": prompt}]
        tokens: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        steps = list(mlx_lm.stream_generate(model, tokenizer, tokens, max_tokens=MAX_TOKENS))
        return "".join(step.text for step in steps), [step.token for step in steps]

    def chat(self, prompt: str, **options: Any) -> Answer:
        with self.server.client() as client:
            return client.chat(prompt, temperature=0, **{"max_tokens": MAX_TOKENS} | options)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_agents(*MACHINES, memory=MEMORY)
        yield cluster


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest,
    cluster: LocalCluster,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """One architecture served; tests with the same one share it."""
    model_type = request.param
    path = endless_model(tmp_path_factory.mktemp("models") / model_type, model_type)
    options = ("--context", str(CONTEXT[model_type]), "--users", "2")
    with cluster.serve(path, *options, "--nodes", ",".join(MACHINES)) as server:
        yield Served(server, path)
    assert server.result().code == 0
    cluster.wait_for_no_workers()
    assert all(agent.running for agent in cluster.agents.values())


llama = pytest.mark.parametrize("served", ["llama"], indirect=True)


def test_nodes_lists_the_machines(cluster: LocalCluster) -> None:
    told = cluster.run("nodes")

    assert told.code == 0
    for name, agent in cluster.agents.items():
        assert name in told.out
        assert agent.address in told.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_that_is_told_to_end_while_loading_leaves_nothing(
    cluster: LocalCluster, tmp_path: Path, number: signal.Signals
) -> None:
    model = endless_model(tmp_path / "llama")
    server = cluster.serve(model, "--context", "512", "--users", "2")
    until(cluster.workers, "a worker has started")

    told = server.end(number)

    assert told.code == 0
    assert "Traceback" not in told.err
    cluster.wait_for_no_workers()
    assert all(agent.running for agent in cluster.agents.values())


@pytest.mark.sweep
def test_without_multicast_one_peer_leads_to_all(cluster: LocalCluster, tmp_path: Path) -> None:
    """Over IPv6 loopback, which carries no multicast to those on IPv4, and on Linux none at all."""
    model = endless_model(tmp_path / "llama")
    peer = ("--peer", cluster.agents["ann"].address)
    far = [cluster.start_agent(n, *peer, memory=MEMORY, host="::1") for n in ("dee", "eve")]
    cluster.wait_for_agents()

    where = ("--host", "::1", *peer, "--nodes", "ann,dee,eve")
    with cluster.serve(model, "--context", "512", "--users", "2", *where) as server:
        served = Served(server, model)
        answer = served.chat("hello")

        assert {stage.node for stage in server.describe().stages} == {"ann", "dee", "eve"}
        assert (answer.text, list(answer.token_ids)) == served.alone("hello")

    for agent in far:
        assert agent.end().code == 0
        del cluster.agents[agent.name]


# llama last, with all tests that share it: one of them costs the cluster a machine.
SERVED = (*ARCHITECTURES[1:], "llama")


@pytest.mark.parametrize("served", sampled(SERVED, ("gemma3", "llama")), indirect=True)
def test_a_cut_model_answers_as_one_process_would(served: Served) -> None:
    stages = served.server.describe().stages

    answers = [served.chat(prompt) for prompt in PROMPTS]

    assert len({stage.node for stage in stages}) == 3
    assert [(a.text, list(a.token_ids)) for a in answers] == [served.alone(p) for p in PROMPTS]


@llama
def test_many_users_at_once_get_the_answers_they_would_get_alone(served: Served) -> None:
    alone = [served.chat(prompt) for prompt in PROMPTS]

    with ThreadPoolExecutor(6) as users:
        together = list(users.map(served.chat, PROMPTS * 2))

    assert [a.token_ids for a in together] == [a.token_ids for a in alone * 2]


@llama
def test_a_prompt_that_begins_as_one_before_is_prefilled_only_from_there(served: Served) -> None:
    story = "Once upon a time there was a fox who lived beside a river. "
    first = served.chat(story + "What was it?")

    second = served.chat(story + "Where did it live?")

    assert first.usage.cached_tokens < second.usage.cached_tokens
    assert second.usage.cached_tokens >= len(story)
    assert (second.text, list(second.token_ids)) == served.alone(story + "Where did it live?")


@llama
async def test_an_answer_that_is_given_up_frees_its_caches(served: Served) -> None:
    async with served.server.async_client() as client:
        events = client.stream("hello", temperature=0, max_tokens=LONG)
        assert isinstance(await anext(events), Delta)
        assert (await client.describe()).live_caches > 0

        await events.aclose()

        async with asyncio.timeout(scaled(10)):
            while (await client.describe()).live_caches:
                pass


@llama
def test_an_answer_beyond_its_deadline_ends_and_frees_its_caches(served: Served) -> None:
    with pytest.raises(UnavailableError, match="did not answer in time"):
        served.chat("hello", max_tokens=LONG, deadline=0.2)
    until(lambda: served.server.describe().live_caches == 0, "caches are free", 10)


@llama
def test_another_model_than_the_one_served_is_not_found(served: Served) -> None:
    with pytest.raises(NotFoundError, match="model: 'gpt-oss' is not served, 'llama' is"):
        served.chat("hello", model="gpt-oss")


@llama
def test_chat_at_the_command_line_prints_the_answer_and_nothing_else(
    cluster: LocalCluster, served: Served
) -> None:
    sampling = ("--temperature", "0", "--max-tokens", str(MAX_TOKENS))

    # Without --server: it is found by mDNS.
    told = cluster.run("chat", "hello", *sampling)

    assert (told.code, told.err) == (0, "")
    assert told.out.strip() == served.chat("hello").text.strip()


@llama
def test_a_machine_that_leaves_takes_its_worker_along(
    cluster: LocalCluster, served: Served
) -> None:
    leaving = cluster.agents.pop("cat")
    worker = leaving.worker

    told = leaving.end()

    assert told.code == 0
    assert "cat has left the cluster." in told.out
    until(lambda: not worker.is_running(), "its worker is gone", 5)
    # It said goodbye: nobody has to find out that it is gone.
    assert "cat" not in cluster.run("nodes").out
