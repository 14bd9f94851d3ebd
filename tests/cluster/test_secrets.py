"""Tokens and passwords reach commands by files, pipes and the environment, and `ps` shows none."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.cluster import HOST, LocalCluster, endless_model
from unicluster.trust.cluster import Cluster
from unicluster.trust.store import Store

PASSWORD = "hunter2-never-shown"  # noqa: S105  # of nothing


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[LocalCluster]:
    """A machine that has not joined yet."""
    with LocalCluster(tmp_path / "elsewhere") as machine:
        yield machine


def command_lines() -> str:
    """All that `ps` shows to any user of this machine."""
    return "\n".join(" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))


def fed(file: Path) -> list[str]:
    """A prefix for a command that reads `file` on its standard input."""
    return ["sh", "-c", f'exec "$@" < {file}', "sh"]


def test_ps_shows_no_token_and_no_password_of_a_running_cluster(tmp_path: Path) -> None:
    token = Cluster.new().token
    file = tmp_path / "token"
    file.write_text(token)
    model = endless_model(tmp_path / "model")
    broker = f"mqtts://ann:{PASSWORD}@{HOST}:1/lab"
    with LocalCluster(tmp_path / "cluster", UNICLUSTER_MQTT=broker) as cluster:
        ann = cluster.start_agent("ann", UNICLUSTER_TOKEN=token)
        ann.wait_for("Ctrl-C leaves")
        bob = cluster.start_agent("bob", "--token-file", str(file))
        bob.wait_for("Ctrl-C leaves")
        with cluster.serve(model, "--context", "512", "--nodes", "ann,bob") as server:
            lines = command_lines()
            workers = [dict(worker.environ()) for worker in cluster.workers()]
            logs = "".join(p.out + p.err for p in (ann, bob, server))

    assert cluster.cluster.token == token
    assert "node.worker" in lines
    assert workers
    for shown in (lines, logs, repr(workers)):
        assert token[4:] not in shown
        assert PASSWORD not in shown


@pytest.mark.parametrize("way", ["environment", "file", "standard input"])
def test_a_machine_joins_by_each_of_the_ways_without_a_warning(
    elsewhere: LocalCluster, tmp_path: Path, way: str
) -> None:
    cluster = Cluster.new()
    file = tmp_path / "token"
    file.write_text(cluster.token + "\n")

    if way == "environment":
        agent = elsewhere.start_agent("cat", UNICLUSTER_TOKEN=cluster.token)
    elif way == "file":
        agent = elsewhere.start_agent("cat", "--token-file", str(file))
    else:
        agent = elsewhere.start_agent("cat", "--token", "-", prefix=fed(file))

    agent.wait_for(f"cat is in cluster {cluster.fingerprint}")
    assert Store(elsewhere.home).require() == cluster
    assert "WARNING" not in agent.err


def test_a_token_as_an_argument_works_and_warns(elsewhere: LocalCluster) -> None:
    cluster = Cluster.new()

    agent = elsewhere.start_agent("cat", "--token", cluster.token)

    agent.wait_for(f"cat is in cluster {cluster.fingerprint}")
    assert "--token TOKEN shows in ps" in agent.err
    assert cluster.token[4:] not in agent.err


def test_two_tokens_at_once_and_no_file(elsewhere: LocalCluster, tmp_path: Path) -> None:
    both = elsewhere.run("join", "--token", "-", "--token-file", str(tmp_path))
    missing = elsewhere.run("join", "--token-file", str(tmp_path / "none"))

    assert (both.code, missing.code) == (2, 2)
    assert "--token, --token-file: give only one of them" in both.err
    assert re.search("--token-file .*none: No such file or directory", missing.err)


def test_a_password_as_an_argument_warns() -> None:
    program = (
        "import click, sys\n"
        "from unicluster.command_line import Command\n"
        "from unicluster.telemetry.broker_url import chosen_broker, mqtt_option\n"
        "command = Command(lambda mqtt: print(chosen_broker(mqtt)) or 0,"
        " sections={'Telemetry': [mqtt_option()]})\n"
        "command.main(sys.argv[1:])\n"
    )
    url = f"mqtts://ann:{PASSWORD}@broker"

    ran = subprocess.run(
        [sys.executable, "-c", program, "--mqtt", url], capture_output=True, text=True, timeout=60
    )

    assert "--mqtt with a password shows in ps" in ran.stderr
    assert PASSWORD not in ran.stdout + ran.stderr


def test_a_machine_that_only_logged_in_chats_and_does_nothing_else(
    elsewhere: LocalCluster, tmp_path: Path
) -> None:
    with LocalCluster(tmp_path / "cluster") as cluster:
        cluster.start_agents("ann")
        token = cluster.run("token", "client").out.strip()
        file = tmp_path / "client"
        file.write_text(token)

        logged_in = elsewhere.run("login", prefix=fed(file))
        with cluster.serve("demo", "--nodes", "ann") as server:
            answer = elsewhere.run("chat", "--server", server.address, "What is 2 + 3?")
            status = elsewhere.run("status", "--server", server.address)
            drained = elsewhere.run("drain", cluster.agents["ann"].address)

    assert f"Logged in to cluster {cluster.cluster.fingerprint}" in logged_in.out
    assert (logged_in.code, answer.code, status.code) == (0, 0, 0), answer.err + status.err
    assert answer.out.strip()
    assert "ann" in status.out
    assert drained.code != 0
    assert Store(elsewhere.home).load() is None
    assert token[5:] not in logged_in.out + logged_in.err
