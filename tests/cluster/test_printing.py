"""`unicluster serve` where its standard output fails, and its lines after a recovery."""

import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import HOST, LocalCluster, endless_model, until
from unicluster import Client
from unicluster.errors import UniclusterError

# One such machine does not hold the tiny model, two do.
MEMORY = 1_100_000
MACHINES = ("ann", "bob", "cid")

RUN = "os.execvp(sys.argv[1], sys.argv[1:])"
CLOSED = f"import os, sys; os.close(1); {RUN}"
READER_LEAVES = f"""
import os, sys
reading, writing = os.pipe()
if os.fork() == 0:
    os.dup2(reading, 0)
    os.close(writing)
    os.execvp("head", ["head", "-1"])
os.dup2(writing, 1)
os.close(reading)
{RUN}
"""
# The process holds the reading end itself, so that it stays open, and reads nothing.
NOBODY_READS = f"""
import fcntl, os, sys
reading, writing = os.pipe()
os.set_inheritable(reading, True)
size = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
os.write(writing, b"x" * size)
os.dup2(writing, 1)
{RUN}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_agents(*MACHINES, memory=MEMORY)
        yield cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_model(tmp_path_factory.mktemp("models") / "llama")


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.mark.skipif(sys.platform != "linux", reason="sizes a pipe as Linux does")
@pytest.mark.parametrize(
    "program",
    [CLOSED, READER_LEAVES, NOBODY_READS],
    ids=["closed", "reader leaves", "nobody reads"],
)
def test_a_model_is_served_whatever_becomes_of_standard_output(
    cluster: LocalCluster, model: Path, program: str
) -> None:
    port = free_port()
    options = ("--context", "512", "--grpc-port", str(port))
    server = cluster.serve(model, *options, prefix=(sys.executable, "-c", program))
    with Client(f"{HOST}:{port}", cluster=cluster.cluster) as client:

        def ready() -> bool:
            assert server.running, server.err
            with contextlib.suppress(UniclusterError):
                return client.describe().state == "ready"
            return False

        until(ready, "the model is served")
        last = client.describe().stages[-1].node
        cluster.agents[last].worker.kill()
        until(lambda: not ready(), "the loss is noticed")
        until(ready, "the model is served again")
        answer = client.chat("hello", max_tokens=4)

    ended = server.end()
    assert answer.usage.completion_tokens == 4
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err


@pytest.mark.sweep
def test_after_a_recovery_the_layers_that_moved_are_printed(
    cluster: LocalCluster, model: Path
) -> None:
    with cluster.serve(model, "--context", "512") as server:
        lost = server.describe().stages[-1].node
        cluster.agents[lost].kill()

        layers = r"layers? [\d-]+ from (\w+) to (\w+)"
        moved = server.wait_for(rf"is ready again (?:after \d+ s|within a second); moved: {layers}")

        stages = server.describe().stages
    assert moved[1] == lost
    assert moved[2] in {stage.node for stage in stages}
    assert lost not in {stage.node for stage in stages}
