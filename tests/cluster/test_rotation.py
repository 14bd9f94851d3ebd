"""The token is rotated while answers stream: none is cut, and the old one is void afterwards."""

import re
import threading
from pathlib import Path

import grpc
import psutil
import pytest

from tests.support.cluster import HOST, LocalCluster, endless_model, until
from unicluster.client.client import Client
from unicluster.cluster.channels import connect_sync
from unicluster.errors import TrustError
from unicluster.trust.identity import Identity
from unicluster.trust.store import Store
from unicluster.v1.node_pb2 import DescribeNodeRequest
from unicluster.v1.node_pb2_grpc import NodeStub


def ports(cluster: LocalCluster) -> list[int]:
    """All that the processes of a home listen at, over TCP."""
    listening = (c for p in cluster.processes() for c in p.net_connections("tcp"))
    return sorted({c.laddr.port for c in listening if c.status == psutil.CONN_LISTEN})


def admits(port: int, identity: Identity) -> bool:
    """Whether a handshake at the port succeeds; the call itself may not be for it."""
    with connect_sync(f"{HOST}:{port}", identity) as channel:
        try:
            NodeStub(channel).Describe(DescribeNodeRequest(), timeout=10)
        except grpc.RpcError as error:
            return error.code() is not grpc.StatusCode.UNAVAILABLE
    return True


@pytest.mark.sweep
def test_rotating_the_token_cuts_no_answer_and_ends_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ring is held all the time; a client that reads its access from the store moves along."""
    model = endless_model(tmp_path / "model")
    ended: list[str] = []
    enough = threading.Event()

    def ask(client: Client) -> None:
        while not enough.is_set():
            ended.append(client.chat("hello", max_tokens=200).finish_reason)

    with LocalCluster(tmp_path / "here") as here, LocalCluster(tmp_path / "there") as there:
        monkeypatch.setenv("UNICLUSTER_HOME", str(here.home))
        here.start_agents("ann", memory=1_100_000)
        old = here.cluster
        there.start_agent("dee", memory=1_100_000, UNICLUSTER_TOKEN=old.token)
        there.wait_for_agents()
        with (
            here.serve(model, "--context", "512", "--nodes", "ann,dee") as server,
            Client(server.address) as client,
            Client(server.address, cluster=old) as stays,
        ):
            stays.chat("hello", max_tokens=1)
            asking = threading.Thread(target=ask, args=(client,))
            asking.start()
            until(lambda: ended, "an answer before")

            asked = here.run("token", "rotate")  # nobody there to answer
            workers = [*here.workers(), *there.workers()]
            begun = here.run("token", "rotate", "--yes")
            new = here.cluster
            moved = Store(there.home).generations()
            both = [Client(server.address, cluster=each) for each in (old, new)]
            during = [each.chat("hello", max_tokens=8).finish_reason for each in both]
            # The door for HTTP is open to this machine alone, and asks for keys.
            open_ports = [p for p in (*ports(here), *ports(there)) if admits(p, new.issue("a"))]
            old_during = [admits(port, old.issue("late")) for port in open_ports]

            finished = here.run("token", "rotate", "--finish")
            before = len(ended)
            until(
                lambda: not any(admits(port, old.issue("late")) for port in open_ports),
                "the old token is refused everywhere",
            )
            new_after = [admits(port, new.issue("member")) for port in open_ports]
            until(lambda: len(ended) > before + 1, "answers after")
            enough.set()
            asking.join(60)
            with pytest.raises(TrustError, match="token was rotated"):
                stays.chat("hello", max_tokens=1)
            same_workers = [*here.workers(), *there.workers()] == workers
            doctor = here.run("doctor").out
            with Client(server.address, cluster=new) as fresh:
                ended.append(fresh.chat("hello", max_tokens=8).finish_reason)
            listed = here.run("nodes").out
            elsewhere = there.run("nodes").out
    print(f"{len(ended)} answers, {len(open_ports)} ports")

    assert asked.code != 0
    assert same_workers
    assert f"authority, of cluster {new.fingerprint}" in doctor
    assert old.fingerprint not in doctor
    for name in ("ann", "dee", "serve at"):
        assert re.search(rf"certificate +{name}.* shows a certificate that is good for", doctor)
    assert begun.code == 0, begun.err
    assert finished.code == 0, finished.err
    assert begun.out.splitlines()[0] == new.token
    assert moved == (new, old)
    assert Store(there.home).generations() == (new,)
    assert during == ["length", "length"]
    assert set(ended) == {"length"}
    assert len(open_ports) >= 4  # two agents, a worker, the server
    assert all(old_during)
    assert all(new_after)
    for lines in (listed, elsewhere):
        assert "ann" in lines
        assert "dee" in lines
