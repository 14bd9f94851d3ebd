"""Machines of versions that don't work together say which one to upgrade."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.cluster import HOST, LocalCluster
from tests.support.deadlines import scaled
from unicluster.trust.store import Store

# `unicluster`, as a later version would speak.
FUTURE = """
import unicluster
unicluster.PROTOCOL = unicluster.OLDEST_PROTOCOL = 9
unicluster.__version__ = "9.0"
from unicluster.cli import main
main()
"""


@contextlib.contextmanager
def agent_of_the_future(cluster: LocalCluster) -> Iterator[str]:
    """Yields its address."""
    options = ("join", "--name", "tomorrow", "--host", HOST, "--port", "0", "--memory", "1GB")
    with subprocess.Popen(
        [sys.executable, "-c", FUTURE, *options],
        env=cluster.env,
        stdout=subprocess.PIPE,
        text=True,
    ) as agent:
        assert agent.stdout is not None
        try:
            greeting = agent.stdout.readline()
            match = re.search(r"port (\d+)", greeting)
            assert match is not None
            yield f"{HOST}:{match[1]}"
        finally:
            agent.terminate()
            agent.communicate(timeout=scaled(30))


def test_a_newer_machine_is_left_out_and_this_one_told_to_upgrade(tmp_path: Path) -> None:
    Store(tmp_path / "home").create()
    with LocalCluster(tmp_path) as cluster, agent_of_the_future(cluster) as address:
        result = cluster.run("nodes", "--peer", address)

    assert result.code != 0
    assert "machine tomorrow runs unicluster 9.0 (protocol 9), this machine" in result.err
    assert "upgrade this machine" in result.err
