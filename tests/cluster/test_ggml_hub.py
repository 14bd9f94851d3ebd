"""`serve owner/name --quant ...`: GGUFs of a hub repository, over machines with empty caches."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

from node.engines.ggml_engine import GgmlEngine
from node.ggml.load import open_gguf
from node.ggml.tokenizer import GgufTokenizer
from node.inspect.draft_vocabulary import check_draft
from tests.cluster.test_fetching import copies, held_bytes
from tests.process.test_gguf_fetching import REPO, SPLIT, WHOLE, write_repository
from tests.support.cluster import LocalCluster, ServeProgram
from tests.support.hub import Hub
from tests.support.tiny import EOS, tiny_config, write_model, write_tokenizer
from tests.support.tiny_gguf import write_gguf
from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.checkpoints.fingerprint import whole
from unicluster.checkpoints.gguf import FIRST_BYTES
from unicluster.checkpoints.ranges import merged, size
from unicluster.errors import InputError
from unicluster.v1.node_pb2 import InspectRequest

# Three processes start, each of which imports much.
START_DEADLINE = 300.0
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_repository(tmp_path / "repository")


@pytest.fixture
def hub(repository: Path) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add(REPO, repository)
        yield hub


def serve(cluster: LocalCluster, *arguments: str) -> ServeProgram:
    server = cluster.serve(REPO, "--quant", "UD-Q2_K_XL", "--context", "256", *arguments)
    server.wait_for("Ctrl-C unloads", START_DEADLINE)
    return server


def answer(server: ServeProgram) -> tuple[str, dict[str, tuple[int, int]]]:
    """A text, and which layers are where."""
    with server, server.client() as client:
        stages = {s.node: (s.first_layer, s.end_layer) for s in client.describe().stages}
        return client.chat("hello", temperature=0, max_tokens=12).text, stages


def needed(copy: Checkpoint, first: int, end: int) -> dict[str, Any]:
    """By file, the bytes that a stage of these layers needs."""
    gguf = open_gguf(copy)
    found = gguf.of_stage(first, end, end == gguf.layers)
    return {name: merged(ranges) for name, ranges in found.items()}


def join(cluster: LocalCluster, *names: str) -> None:
    """Machines with empty caches, each of which has room for half of the model."""
    for name in names:
        home = str(cluster.folder / f"hf-{name}")
        cluster.start_agent(name, memory="880kB", HF_HOME=home)
    cluster.wait_for_agents()


@pytest.mark.sweep
def test_each_machine_gets_what_it_needs_from_the_hub_or_the_others(
    tmp_path: Path, hub: Hub, repository: Path
) -> None:
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
    with LocalCluster(tmp_path / "cluster", **environment) as cluster:
        join(cluster, "ann", "bob")
        first, stages = answer(serve(cluster))
        sent = {name: hub.sent(name) for name in (*SPLIT, WHOLE)}
        hub.close()
        server = serve(cluster)
        second, again = answer(server)
        join(cluster, "cat")
        third, others = answer(serve(cluster, "--nodes", "ann,cat"))

    assert first == second == third
    assert sorted(stages.values()) == sorted(others.values()) == [(0, 3), (3, 6)]
    # Unless they have changed places, because one turned out to be faster.
    assert ("fetching" in server.out) == (again != stages)
    assert sent[WHOLE] == 0
    for name in SPLIT[1:]:
        # Its header was looked at before.
        assert sent[name] < (repository / name).stat().st_size + 2 * FIRST_BYTES
    (cat,) = copies(cluster, "cat")
    ranges = needed(cat, *others["cat"])
    assert not any(cat.missing(name, wanted) for name, wanted in ranges.items())
    most = sum(map(size, ranges.values())) + len(SPLIT) * FIRST_BYTES
    assert held_bytes(cluster, "cat") <= most


def test_the_tokenizer_is_the_repositorys_or_else_that_of_the_gguf(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    of_gguf = GgmlEngine().tokenizer(whole(file))
    write_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    template = settings.pop("chat_template").replace("assistant", "parrot")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    without_template = GgmlEngine().tokenizer(whole(file))
    (tmp_path / "chat_template.jinja").write_text(template)
    of_repository = GgmlEngine().tokenizer(whole(file))

    assert not isinstance(without_template._tokenizer, GgufTokenizer)
    asked = {"conversation": MESSAGES, "add_generation_prompt": True}
    assert without_template.apply_chat_template(**asked) == of_gguf.apply_chat_template(**asked)
    assert "assistant" in of_gguf.apply_chat_template(**asked, tokenize=False)
    assert "parrot" in of_repository.apply_chat_template(**asked, tokenize=False)
    for tokenizer in (of_gguf, without_template, of_repository):
        assert tokenizer.eos_token_ids == {EOS}


def test_a_draft_has_the_tokens_of_a_gguf(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    draft = write_model(tmp_path / "draft", tiny_config("llama"), marks=True)
    request = InspectRequest(
        drafts_for=str(file), drafts_for_revision=whole(file).manifest.revision
    )

    theirs = GgmlEngine().tokenizer(whole(file)).get_vocab()
    ours = json.loads((draft / "tokenizer.json").read_text())
    ours["added_tokens"] = [t for t in ours["added_tokens"] if t["content"] in theirs]
    (draft / "tokenizer.json").write_text(json.dumps(ours))
    check_draft(request, whole(draft))

    other = write_model(tmp_path / "other", tiny_config("llama"))
    with pytest.raises(InputError, match=r"its tokens are not those of tiny\.gguf"):
        check_draft(request, whole(other))
