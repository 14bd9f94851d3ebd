"""Mistakes of users, and failures before anything is served: one line says so.

Serving over machines that vanish, or that aren't there, is slow because they are waited for.
"""

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.cluster import HOST, LocalCluster, Result, ServeProgram, endless_model, until
from unicluster.system.versions import installed
from unicluster.trust.cluster import Cluster
from unicluster.trust.store import Store

BAD, TOO_BIG, FAILED = 2, 3, 1
STAYING = ("ann", "bob")
VANISHING = ("eve", "fay")
MEMORY = 20_000_000
# Needs two such machines.
BIG = ("--context", "4096", "--users", "4")


def assert_complains(told: Result, code: int, message: str) -> None:
    """It ends with one line that has `message` in it; warnings may come before."""
    *before, last = told.err.splitlines()
    assert last.startswith("unicluster: ")
    assert message in last
    assert all(" WARNING " in line for line in before)
    assert told.code == code


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A machine of a cluster, on which nothing runs."""
    with LocalCluster(tmp_path_factory.mktemp("lonely")) as cluster:
        Store(cluster.home).create()
        yield cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_agents(*STAYING, *VANISHING, memory=MEMORY)
        yield cluster


@pytest.fixture(scope="module")
def server(cluster: LocalCluster, model: Path) -> Iterator[ServeProgram]:
    with cluster.serve(model, "--context", "128", "--nodes", "ann") as server:
        yield server


@pytest.fixture
def taken_port() -> Iterator[str]:
    with socket.create_server((HOST, 0)) as taken:
        yield str(taken.getsockname()[1])


WRONG_WORDS = [
    ("frobnicate", "no such command 'frobnicate'"),
    ("join --name two.words", "'two.words' can't name a machine"),
    ("join --memory lots", "invalid size 'lots': write it like 96GB"),
    ("join --memory 0GB", "--memory 0GB: must be more than nothing"),
    ("join --port 70000", "--port 70000: between 0 and 65534"),
    ("join --port 0 --host 192.0.2.77", "can't listen on 192.0.2.77"),
    ("join --port 0 --host no.such.host.invalid", "no.such.host.invalid is no address"),
    ("join --port 0 --peer nonsense", "'nonsense' is no address: give it as HOST:PORT"),
    ("join --replace", "--replace: needs --token"),
    ("serve llama-9000-mega", "no model 'llama-9000-mega'"),
    ("serve /no/such/directory", "no directory /no/such/directory"),
    ("serve {file}", "is a file: give the model's directory"),
    ("serve {folder}", "has no config.json: it is not a model's directory"),
    ("serve demo --quant q5", "no quantization 'q5'"),
    ("serve demo --context many", "invalid value for '--context': 'many' is not a valid integer"),
    ("serve demo --context 1", "--context 1: at least 2 tokens"),
    ("serve demo --users 0", "--users 0: at least 1"),
    ("serve demo --lanes -1", "--lanes -1: at least 1, or 0 for one a machine"),
    ("serve demo --lanes 2 --lookup", "each answer has a lane of its own"),
    ("serve demo --kv-bits 5", "invalid value for '--kv-bits': '5' is not one of"),
    ("serve demo --speculate lookup --lookup", "--speculate: not with --draft or --lookup"),
    ("serve demo --speculate lookup --draft-tokens 4", "--draft-tokens: not with --speculate"),
    ("serve demo --draft demo --lookup", "--draft and --lookup: give one of them"),
    ("serve demo --draft llama-9000-mega", "no model 'llama-9000-mega'"),
    ("serve demo --draft-tokens 4", "--draft-tokens: only with --draft or --lookup"),
    ("serve demo --lookup --draft-tokens 16", "--draft-tokens 16: between 1 and 15"),
    ("serve demo --nodes ,", "--nodes ,: names no machine"),
    ("serve demo --grpc-port 70000", "--grpc-port 70000: between 0 and 65535"),
    ("serve demo --peer nonsense", "'nonsense' is no address: give it as HOST:PORT"),
    ("chat --server nonsense hello", "'nonsense' is no address: give it as HOST:PORT"),
    (
        "chat --temperature warm hello",
        "'--temperature': 'warm' is not a valid float",
    ),
    ("chat --max-tokens -3 hello", "max_tokens can't be -3"),
    ("chat --deadline 0 hello", "deadline can't be 0.0"),
    ("chat  ", "the prompt is empty"),
]


@pytest.mark.parametrize(("words", "message"), WRONG_WORDS, ids=[w for w, _ in WRONG_WORDS])
def test_what_makes_no_sense_is_said_at_once(
    lonely: LocalCluster, tmp_path: Path, words: str, message: str
) -> None:
    (file := tmp_path / "file").touch()
    arguments = words.format(file=file, folder=tmp_path).split(" ")

    assert_complains(lonely.run(*arguments), BAD, message)


def test_an_unreadable_directory(tmp_path: Path, lonely: LocalCluster, model: Path) -> None:
    locked = shutil.copytree(model, tmp_path / "locked")
    locked.chmod(0)
    try:
        told = lonely.run("serve", str(locked), prefix=without_privileges())
    finally:
        locked.chmod(0o700)

    assert_complains(told, BAD, f"can't read {locked}/config.json: Permission denied")


def without_privileges() -> list[str]:
    """Prefix of a command that makes root obey the modes of files, too."""
    if os.geteuid() != 0:
        return []
    dropped = "-dac_override,-dac_read_search"
    prefix = ["setpriv", "--inh-caps", dropped, "--bounding-set", dropped]
    if shutil.which("setpriv") is None or subprocess.run([*prefix, "true"]).returncode != 0:
        pytest.skip("root reads everything, and setpriv is not here to change that")
    return prefix


def test_serving_in_no_cluster(tmp_path: Path) -> None:
    with LocalCluster(tmp_path) as nowhere:
        told = nowhere.run("serve", "demo")
    assert_complains(told, FAILED, "this machine is in no cluster: run `unicluster join`")
    assert not nowhere.home.exists()


def test_machines_that_are_not_there(lonely: LocalCluster, cluster: LocalCluster) -> None:
    """All at once, because each command looks for them for some seconds."""
    nobody = "no machine of this cluster answers: run `unicluster join` on each, or name one"
    programs = [
        (lonely.serve("demo"), nobody),
        (lonely.start("nodes"), nobody),
        (
            cluster.serve("demo", "--nodes", "ann,zoe"),
            "no machine named zoe in this cluster; found",
        ),
    ]
    for program, message in programs:
        assert_complains(program.result(), FAILED, message)


def test_chatting_with_nobody(lonely: LocalCluster, taken_port: str) -> None:
    told = lonely.run("chat", "--server", f"{HOST}:1", "hello")
    assert_complains(told, FAILED, f"{HOST}:1 refuses connections: is it still running?")


def test_a_mistyped_token(tmp_path: Path) -> None:
    token = Cluster.new().token
    with LocalCluster(tmp_path) as nowhere:
        told = nowhere.run("join", "--token", token[:-1] + ("a" if token[-1] != "a" else "b"))
    assert_complains(told, FAILED, "the join token is mistyped or cut off: copy it from")
    assert token[:-1] not in told.err
    assert not nowhere.home.exists()


def test_something_else_than_a_token(tmp_path: Path) -> None:
    with LocalCluster(tmp_path) as nowhere:
        told = nowhere.run("join", "--token", "swordfish")
    assert_complains(told, FAILED, "that is no join token (they begin with uc1-)")
    assert not nowhere.home.exists()


def test_the_token_of_another_cluster(lonely: LocalCluster) -> None:
    before = (lonely.home / "cluster.token").read_text()
    told = lonely.run("join", "--token", Cluster.new().token)
    assert_complains(told, FAILED, f"this machine is in the cluster {lonely.cluster.fingerprint}")
    assert (lonely.home / "cluster.token").read_text() == before


def test_a_port_that_is_taken(tmp_path: Path, taken_port: str) -> None:
    with LocalCluster(tmp_path) as nowhere:
        told = nowhere.run("join", "--host", HOST, "--port", taken_port)
    assert_complains(told, BAD, f"port {taken_port} on {HOST} is taken: choose another with --port")
    assert not nowhere.home.exists()  # no cluster that nobody was told the token of


def test_a_port_for_chat_that_is_taken(lonely: LocalCluster, taken_port: str) -> None:
    told = lonely.run("serve", "demo", "--host", HOST, "--grpc-port", taken_port)
    assert_complains(told, BAD, f"port {taken_port} on {HOST} is taken: choose another with --grpc")


def test_a_name_that_is_taken(cluster: LocalCluster) -> None:
    told = cluster.run("join", "--name", "ann", "--host", HOST, "--port", "0")
    assert_complains(told, BAD, f"named ann is already in this cluster at {HOST}:")
    assert cluster.agents["ann"].running


@pytest.mark.parametrize("host", [HOST, "::1"])
def test_a_name_that_another_machine_has(cluster: LocalCluster, tmp_path: Path, host: str) -> None:
    """Heard of by multicast, and beyond its reach."""
    ann = cluster.agents["ann"].address
    peer = ["--peer", ann] if host != HOST else []
    with LocalCluster(tmp_path / "other") as other:
        Store(other.home).join(cluster.cluster.token)

        told = other.run("join", "--name", "ann", "--host", host, "--port", "0", *peer)

    assert_complains(told, BAD, f"a machine named ann is already in this cluster at {ann}")
    assert "choose another --name" in told.err
    if peer:
        assert "and another one calls from [::1]:" in told.err


def cut_off(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1000)


def garble(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.write(struct.pack("<Q", 100) + b"garbage!" * 100)


def remove(file: Path) -> None:
    file.unlink()


def rename_architecture(file: Path) -> None:
    config = file.with_name("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "perceptron"}))


def break_config(file: Path) -> None:
    file.with_name("config.json").write_text("{")


def empty_tokenizer(file: Path) -> None:
    file.with_name("tokenizer.json").write_text("")


def warm_defaults(file: Path) -> None:
    file.with_name("generation_config.json").write_text('{"temperature": "warm"}')


def hot_defaults(file: Path) -> None:
    file.with_name("generation_config.json").write_text('{"temperature": 1000}')


def shorten(file: Path) -> None:
    config = file.with_name("config.json")
    changed = json.loads(config.read_text()) | {"max_position_embeddings": 64}
    config.write_text(json.dumps(changed))


DAMAGE = [
    (cut_off, "{}/model.safetensors: damaged safetensors"),
    (garble, "{}/model.safetensors: damaged safetensors"),
    (remove, "{}: no model*.safetensors in it"),
    (rename_architecture, f"{{}}: {installed('mlx-lm')} has no model type perceptron: "),
    (break_config, "{}/config.json: "),
    (empty_tokenizer, "{}/tokenizer.json: damaged: it is empty"),
    (warm_defaults, "{}/generation_config.json: damaged: temperature is 'warm', and no number"),
    (hot_defaults, "generation_config.json: temperature: must be between 0 and 2, got 1000"),
    (shorten, "context: 128 tokens, and {} is made for at most 64"),
]


def test_a_damaged_model(cluster: LocalCluster, model: Path, tmp_path: Path) -> None:
    """All of them at once, because each command spends its time waiting for a machine."""
    programs = []
    for damage, message in DAMAGE:
        path = shutil.copytree(model, tmp_path / damage.__name__)
        damage(path / "model.safetensors")
        programs.append((cluster.serve(path, "--nodes", "ann", "--context", "128"), path, message))

    for program, path, message in programs:
        assert_complains(program.result(), BAD, message.format(path))


def test_a_model_that_does_not_fit(cluster: LocalCluster, model: Path) -> None:
    told = cluster.serve(model, "--context", "4096", "--users", "64", "--nodes", "ann,bob").result()

    assert_complains(told, TOO_BIG, "llama with context 4096 for 64 users needs 4")
    assert "MB are missing, in whole layers. One more machine with" in told.err
    assert "would do" in told.err
    assert "loading" not in told.out


@pytest.mark.parametrize(
    ("name", "strike"),
    list(zip(VANISHING, [signal.SIGKILL, signal.SIGSTOP], strict=True)),
    ids=["dies", "sleeps"],
)
def test_a_machine_that_vanishes_while_loading(
    cluster: LocalCluster, model: Path, name: str, strike: signal.Signals
) -> None:
    """Serving waits for it, or for others, and says so: a machine may come back."""
    agent = cluster.agents.pop(name)
    options = (*BIG, "--nodes", f"{name},bob", "--orphan-grace", "1")
    server = cluster.serve(model, *options)
    # A worker takes a second or two to import MLX before it loads.
    machine = [psutil.Process(agent.pid), until(lambda: agent.workers, "loading begins")[0]]
    for process in machine:
        process.send_signal(strike)

    server.wait_for(rf"does not answer yet: machine {name} \(.*\. It is planned again when")
    assert server.running
    told = server.end()

    for process in machine:
        if process.is_running():
            process.resume()
    assert told.code == 0
    until(lambda: not machine[1].is_running(), "its worker is gone")
    until(lambda: not cluster.agents["bob"].workers, "what it loaded is gone")


def test_a_worker_that_dies_while_loading(cluster: LocalCluster, model: Path) -> None:
    server = cluster.serve(model, *BIG, "--nodes", "ann,bob")
    before = {worker.pid for worker in cluster.agents["bob"].workers}
    until(lambda: new(cluster.agents["bob"].workers, before), "loading begins")[0].kill()

    killed = r"machine bob: ended by signal 9 \(SIGKILL\)"
    server.wait_for(rf"does not answer yet: {killed}. It is planned again when")
    with server:
        assert server.describe().state == "ready"


def new(workers: list[psutil.Process], before: set[int]) -> list[psutil.Process]:
    return [worker for worker in workers if worker.pid not in before]


REFUSED = [
    (["word" + 100 * " word"], BAD, "messages: the prompt has 5"),
    (["hello", "--max-tokens", "1000"], BAD, "max_tokens: the context has room for"),
    (["hello", "--max-tokens", "0"], BAD, "max_tokens: must be at least 1, got 0"),
    (["hello", "--temperature", "-1"], BAD, "temperature: "),
    (["hello", "--temperature", "nan"], BAD, "temperature: "),
    (["hello", "--top-p", "2"], BAD, "top_p: "),
    (["hello", "--min-p", "-0.5"], BAD, "min_p: "),
    (["hello", "--repetition-penalty", "-1"], BAD, "repetition_penalty: "),
    (["hello", "--stop", ""], BAD, "stop: must not contain an empty string"),
    (["hello", "--model", "gpt-oss"], BAD, "model: 'gpt-oss' is not served, 'llama' is"),
]


@pytest.mark.parametrize(
    ("words", "code", "message"), REFUSED, ids=[" ".join(r[0])[:40] for r in REFUSED]
)
def test_a_question_that_makes_no_sense(
    cluster: LocalCluster, server: ServeProgram, words: list[str], code: int, message: str
) -> None:
    told = cluster.run("chat", "--server", server.address, *words)
    assert_complains(told, code, message)
    assert told.out == ""


def test_a_client_of_another_cluster(lonely: LocalCluster, server: ServeProgram) -> None:
    told = lonely.run("chat", "--server", server.address, "hello")
    assert_complains(told, FAILED, f"{server.address} has no certificate of this cluster")


def test_nothing_is_left_of_all_that(cluster: LocalCluster, server: ServeProgram) -> None:
    (machine,) = {stage.node for stage in server.describe().stages}
    assert [w.ppid() for w in cluster.workers()] == [cluster.agents[machine].pid]
