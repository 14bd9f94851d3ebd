"""Strangers on the network, who connect and say nothing."""

import contextlib
import resource
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.cluster import HOST, LocalCluster, until
from unicluster.cluster.channels import HANDSHAKE_SECONDS, connect_sync, split_address
from unicluster.cluster.descriptors import raise_file_limit
from unicluster.v1.node_pb2 import DescribeNodeRequest
from unicluster.v1.node_pb2_grpc import NodeStub

# Many more than the files that a process may have open where nobody raises the limit.
LIMIT = 128
STRANGERS = 600
WITH_LIMIT = ("sh", "-c", f'ulimit -S -n {LIMIT}; exec "$@"', "sh")


@contextlib.contextmanager
def idle_connections(address: str, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            connection = socket.create_connection(split_address(address), timeout=10)
            opened.append(stack.enter_context(connection))
        yield opened


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side has hung up."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@pytest.fixture
def many_files() -> None:
    """This test's own end of the connections takes as many."""
    if raise_file_limit() < 2 * STRANGERS:
        pytest.skip(f"a process may open only {resource.getrlimit(resource.RLIMIT_NOFILE)} files")


def describe(cluster: LocalCluster, address: str) -> str:
    with connect_sync(address, cluster.cluster.issue("member")) as channel:
        return NodeStub(channel).Describe(DescribeNodeRequest(), timeout=30).name


@pytest.mark.usefixtures("many_files")
def test_idle_connections_neither_end_an_agent_nor_keep_members_out(tmp_path: Path) -> None:
    with LocalCluster(tmp_path) as cluster:
        agent = cluster.start_agent("ann", prefix=WITH_LIMIT)
        cluster.wait_for_agents()
        process = psutil.Process(agent.pid)
        before = process.memory_info().rss
        with idle_connections(agent.address, STRANGERS) as strangers:
            assert describe(cluster, agent.address) == "ann"
            assert process.memory_info().rss < 1.5 * before
            # An agent looks at its memory, the network and its peers again and again meanwhile.
            until(
                lambda: all(map(is_closed, strangers)),
                "all who said nothing are hung up on",
                deadline=HANDSHAKE_SECONDS + 60,
            )
        assert describe(cluster, agent.address) == "ann"
        assert agent.running
        assert process.memory_info().rss < 1.5 * before


@pytest.mark.sweep
@pytest.mark.usefixtures("many_files")
def test_idle_connections_to_the_metrics_take_few_threads(tmp_path: Path) -> None:
    with LocalCluster(tmp_path) as cluster:
        cluster.start_agents("ann")
        with cluster.serve("demo", "--context", "64", "--metrics-port", "0") as server:
            address = server.wait_for(r"https://(\S+)/metrics")[1]
            process = psutil.Process(server.pid)
            before = process.num_threads()
            with idle_connections(address, STRANGERS):
                until(lambda: process.num_threads() > before, "some of them are being listened to")
                assert process.num_threads() < before + 64
            until(lambda: process.num_threads() <= before + 1, "their threads end with them")

            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
            with (
                contextlib.suppress(OSError),  # refused at once, or when it asks
                socket.create_connection(split_address(address), timeout=10) as plain,
                tls.wrap_socket(plain) as stranger,
            ):
                stranger.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                assert stranger.recv(100) == b""
            until(lambda: f"metrics refused to {HOST}" in server.err, "it is in the audit log")
