"""Joining and trust, with real processes: tokens, secrets, and who is turned away."""

import json
import re
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from tests.support.cluster import HOST, LocalCluster, Program, ServeProgram, endless_model, until
from tests.support.deadlines import scaled
from unicluster.cluster.channels import CHANNEL_OPTIONS, connect, connect_sync
from unicluster.trust.cluster import Cluster
from unicluster.trust.identity import Identity
from unicluster.trust.store import Store
from unicluster.v1.chat_pb2 import DescribeChatRequest
from unicluster.v1.chat_pb2_grpc import ChatStub
from unicluster.v1.node_pb2 import DescribeNodeRequest
from unicluster.v1.node_pb2_grpc import NodeStub

MEMORY = 1_100_000  # two such machines hold the tiny model, one does not


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_agents("ann", memory=MEMORY)
        cluster.start_agents("bob", memory=MEMORY)
        yield cluster


@pytest.fixture(scope="module")
def server(
    cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServeProgram]:
    model = endless_model(tmp_path_factory.mktemp("models") / "llama")
    with cluster.serve(model, "--context", "512", "--nodes", "ann,bob") as server:
        yield server


def test_the_first_join_makes_a_cluster_and_says_how_others_join(cluster: LocalCluster) -> None:
    first, second = cluster.agents["ann"].out, cluster.agents["bob"].out

    assert f"UNICLUSTER_TOKEN={cluster.cluster.token} unicluster join\n" in first
    assert f"ann is in cluster {cluster.cluster.fingerprint}: " in first
    assert "UNICLUSTER_TOKEN" not in second


def test_a_machine_may_offer_some_of_its_devices(tmp_path: Path) -> None:
    with LocalCluster(tmp_path) as cluster:
        refused = cluster.run("join", "--port", "0", "--device", "CUDA9")
        assert refused.code == 2
        there = r"unicluster: --device cuda9: this machine has .*CPU \(.+\).*\n"
        assert re.fullmatch(there, refused.err)
        assert Store(cluster.home).load() is None  # whose token nobody would have seen

        agent = cluster.start_agent("bob", "--device", "cpu", memory=MEMORY)
        port = agent.wait_for(r"port (\d+)\.")[1]
        with connect_sync(f"{HOST}:{port}", cluster.cluster.issue("member")) as channel:
            info = NodeStub(channel).Describe(DescribeNodeRequest(), timeout=scaled(10))

    assert {(device.name, device.kind) for device in info.devices} == {("CPU", "cpu")}
    assert {device.engine for device in info.devices} == set(info.engines)
    assert all(device.usable_memory == MEMORY for device in info.devices)


def test_other_machines_join_with_the_token_and_keep_it(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    token = cluster.cluster.token
    with LocalCluster(tmp_path / "new") as new, LocalCluster(tmp_path / "moved") as moved:
        Store(moved.home).create()
        new.start_agent("cat", "--token", token)
        moved.start_agent("dee", "--replace", "--token", token)
        new.wait_for_agents()
        moved.wait_for_agents()

        listed = cluster.run("nodes").out

        assert "cat " in listed
        assert "dee " in listed
        # From now on no flags are needed.
        assert new.run("token", "show").out.strip() == token
        assert moved.run("token", "show").out.strip() == token


def test_rotating_the_token_makes_another_one(tmp_path: Path) -> None:
    with LocalCluster(tmp_path) as machine:
        old = Store(machine.home).create()

        told = machine.run("token", "rotate", "--yes")

        new = machine.cluster
        assert Store(machine.home).generations() == (new, old)
        assert new.fingerprint != old.fingerprint
        assert told.out.splitlines()[0] == new.token
        assert f"UNICLUSTER_TOKEN={new.token} unicluster join --replace" in told.out
        assert machine.run("token", "show").out.strip() == new.token


def test_showing_a_token_that_is_not_there(tmp_path: Path) -> None:
    with LocalCluster(tmp_path) as machine:
        told = machine.run("token", "show")
    assert told.code == 1
    assert told.err.startswith("unicluster: this machine is in no cluster: run `unicluster join`")


def test_an_agent_without_mlx_joins_and_says_what_to_install(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    for name in ("mlx", "mlx_lm"):
        (hidden / name).mkdir(parents=True)
        (hidden / name / "__init__.py").write_text("raise ImportError('no MLX on this machine')\n")
    with LocalCluster(tmp_path / "cluster") as cluster:
        path = f"{hidden}:{cluster.env['PYTHONPATH']}"
        agent = cluster.start_agent("ann", PYTHONPATH=path)
        agent.wait_for(r"MLX is not installed, .*: pip install 'unicluster\[c\w+\]'")
        refused = cluster.serve("demo", "--nodes", "ann").result()
        assert refused.code == 1
        assert re.search(r"machine ann has no MLX: .* pip install 'unicluster\[", refused.err)


def test_an_engine_that_is_not_installed_is_not_offered(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden" / "llama_cpp"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('no llama.cpp on this machine')\n")
    with LocalCluster(tmp_path / "cluster") as cluster:
        path = f"{hidden.parent}:{cluster.env['PYTHONPATH']}"
        agent = cluster.start_agent("ann", "--engine", "ggml", PYTHONPATH=path)
        result = agent.result()

    assert result.code == 2
    assert re.fullmatch(r"unicluster: --engine ggml: it is not installed .*\n", result.err)


def test_the_token_is_for_its_owner_only(cluster: LocalCluster) -> None:
    assert stat.S_IMODE((cluster.home / "cluster.token").stat().st_mode) == 0o600
    assert stat.S_IMODE(cluster.home.stat().st_mode) == 0o700


def test_no_secret_is_in_a_log_or_on_a_command_line(
    cluster: LocalCluster, server: ServeProgram
) -> None:
    token = cluster.cluster.token
    programs: list[Program] = [*cluster.agents.values(), server]
    told = [program.out + program.err for program in programs]
    shown = [
        told[0].replace(f"UNICLUSTER_TOKEN={token}", ""),
        *told[1:],
    ]  # for the person who joins first

    secrets = re.compile(re.escape(token[4:]) + "|PRIVATE KEY|BEGIN CERT")

    assert cluster.workers()
    assert not any(secrets.search(text) for text in shown)
    for process in cluster.processes():
        assert not secrets.search(" ".join(process.cmdline()))
        assert not secrets.search(json.dumps(process.environ()))


def strangers(cluster: Cluster) -> dict[str, grpc.ChannelCredentials]:
    """Strangers: of no cluster, of another one, and former members of this one."""
    other = Cluster.new().issue("mallory")
    late = cluster.issue("late", valid_seconds=-60)
    return {
        "it shows no certificate": grpc.ssl_channel_credentials(cluster.ca_pem.encode()),
        "its certificate is not of this cluster": Identity(
            "mallory", other.key_pem, other.cert_pem, cluster.ca_pem
        ).channel_credentials(),
        "its certificate has expired": late.channel_credentials(),
        "it belongs to another cluster": other.channel_credentials(),
    }


@pytest.mark.parametrize("door", ["agent", "worker", "chat"])
def test_strangers_get_nothing(cluster: LocalCluster, server: ServeProgram, door: str) -> None:
    agent = cluster.agents["bob"]
    worker_ports = [c.laddr.port for c in agent.worker.net_connections() if c.status == "LISTEN"]
    address = {
        "agent": agent.address,
        "worker": f"{HOST}:{worker_ports[0]}",
        "chat": server.address,
    }[door]

    for reason, credentials in strangers(cluster.cluster).items():
        with grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS) as channel:
            with pytest.raises(grpc.RpcError) as refusal:
                NodeStub(channel).Describe(DescribeNodeRequest(), timeout=scaled(10))
            assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE, reason


def test_debugging_shows_why_strangers_are_refused(tmp_path: Path) -> None:
    with LocalCluster(tmp_path) as quiet_network:
        agent = quiet_network.start_agent("ann", "--debug")
        quiet_network.wait_for_agents()
        expired = strangers(quiet_network.cluster)["its certificate has expired"]
        with (
            grpc.secure_channel(agent.address, expired, options=CHANNEL_OPTIONS) as channel,
            pytest.raises(grpc.RpcError),
        ):
            NodeStub(channel).Describe(DescribeNodeRequest(), timeout=scaled(10))

        until(lambda: "certificate has expired" in agent.err, "gRPC says so")


def test_the_last_words_of_a_crash_come_through(tmp_path: Path) -> None:
    with LocalCluster(tmp_path) as cluster:
        agent = cluster.start_agent("ann")
        cluster.wait_for_agents()
        psutil.Process(agent.pid).send_signal(signal.SIGSEGV)

        until(lambda: "Segmentation fault" in agent.err, "Python says where it was")


async def test_members_are_let_in(cluster: LocalCluster, server: ServeProgram) -> None:
    me = cluster.cluster.issue("me")
    async with connect(cluster.agents["ann"].address, me) as channel:
        assert (
            await NodeStub(channel).Describe(DescribeNodeRequest(), timeout=scaled(10))
        ).name == "ann"
    async with connect(server.address, me) as channel:
        assert (
            await ChatStub(channel).Describe(DescribeChatRequest(), timeout=scaled(10))
        ).live_caches == 0
