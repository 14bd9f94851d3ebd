"""`unicluster doctor`: judgements by table, and the command against real agents."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from node.doctor.finding import Level
from node.doctor.host import SOCKET_FILTER, examine, swap
from node.doctor.network import Answer, examine_one, multicast
from tests.support.cluster import LocalCluster
from unicluster import OLDEST_PROTOCOL, PROTOCOL, __version__
from unicluster.cluster.versions import mismatch
from unicluster.v1.node_pb2 import NodeInfo

GIB = 1 << 30


def answer(name: str = "bob", ahead: float = 0.0, trip: float = 0.0002, **info: object) -> Answer:
    fields = {"version": __version__, "protocol": PROTOCOL, "clock": 1.0, "name": name} | info
    return Answer(NodeInfo(**fields), "127.0.0.1:47600", trip, ahead)  # type: ignore[arg-type]


def levels(answer: Answer) -> dict[str, Level]:
    return {finding.subject: finding.level for finding in examine_one(answer)}


@pytest.mark.parametrize(
    ("ahead", "level"), [(2, None), (-300, Level.WARNING), (90_000, Level.ERROR)]
)
def test_a_clock_that_is_wrong_is_told_of(ahead: float, level: Level | None) -> None:
    assert levels(answer(ahead=ahead)).get("clock") is level


def test_a_slow_link_is_told_of() -> None:
    assert levels(answer(trip=0.02))["link"] is Level.WARNING
    assert levels(answer(trip=0.0003))["link"] is Level.OK


def test_a_version_too_new_says_which_machine_to_upgrade() -> None:
    newer = answer(protocol=PROTOCOL + 1, oldest_protocol=PROTOCOL + 1, version="9.0")

    (finding,) = (f for f in examine_one(newer) if f.subject == "version")

    assert finding.level is Level.ERROR
    assert finding.message.endswith("upgrade this machine")


@pytest.mark.parametrize(
    ("protocol", "oldest", "upgrade"),
    [
        (PROTOCOL, 0, None),
        (PROTOCOL + 1, PROTOCOL, None),  # newer, but it still knows how we speak
        (PROTOCOL + 1, PROTOCOL + 1, "upgrade this machine"),
        (OLDEST_PROTOCOL - 1, 0, "upgrade bob"),
    ],
)
def test_neighbouring_versions_work_together_or_say_why_not(
    protocol: int, oldest: int, upgrade: str | None
) -> None:
    wrong = mismatch("bob", "1.0", protocol, oldest)

    assert wrong is None if upgrade is None else wrong is not None and wrong.endswith(upgrade)


def test_a_machine_that_answers_unheard_means_blocked_multicast() -> None:
    finding = multicast(["ann"], {"a": answer("ann"), "b": answer("bob")})

    assert finding.level is Level.WARNING
    assert finding.message.startswith("bob answers but is not heard")


def test_swap_in_use_is_told_of() -> None:
    assert swap(0, 64 * GIB).level is Level.OK
    assert swap(8 * GIB, 64 * GIB).level is Level.WARNING


def test_a_mac_that_sleeps_and_wires_little_is_told_how_to_do_better() -> None:
    answers = {
        ("sysctl", "-n", "hw.memsize"): str(512 * GIB),
        ("sysctl", "-n", "iogpu.wired_limit_mb"): "0",
        ("pmset", "-g", "custom"): "AC Power:\n sleep                1\n disksleep  10\n",
        (SOCKET_FILTER, "--getglobalstate"): "Firewall is enabled. (State = 1)",
    }

    def run(command: Sequence[str]) -> str | None:
        return answers.get(tuple(command))

    found = {f.subject: f for f in examine(run=run, system="darwin")}

    assert "iogpu.wired_limit_mb=516096" in found["memory"].remedy
    assert found["sleep"].remedy == "sudo pmset -a sleep 0"
    assert "--unblockapp" in found["firewall"].remedy


def test_a_closed_firewalld_is_told_how_to_open(tmp_path: Path) -> None:
    def run(command: Sequence[str]) -> str | None:
        if command[:2] == ["systemctl", "is-active"]:
            return "active\n"
        return "ssh\n" if command[0] == "firewall-cmd" else None

    found = {f.subject: f for f in examine(tmp_path, run, "linux")}

    assert found["firewall"].level is Level.ERROR
    assert "--add-port=47600/tcp" in found["firewall"].remedy


def test_the_command_finds_nothing_wrong_with_a_healthy_pair(tmp_path: Path) -> None:
    with LocalCluster(tmp_path) as cluster:
        cluster.start_agents("ann", "bob")

        result = cluster.run("doctor", "--host", "127.0.0.1")

    assert "heard ann, bob" in result.out
    assert "✗" not in result.out
    assert result.code == 0


def test_the_command_names_a_machine_that_does_not_answer(tmp_path: Path) -> None:
    with LocalCluster(tmp_path) as cluster:
        cluster.start_agents("ann")

        result = cluster.run("doctor", "--host", "127.0.0.1", "--peer", "127.0.0.1:9")

    assert result.code == 1
    assert "agent 127.0.0.1:9 refuses connections" in result.out
    assert "does its firewall let TCP 9 and 10 in" in result.out


def test_without_a_cluster_it_says_how_to_get_into_one(tmp_path: Path) -> None:
    with LocalCluster(tmp_path) as cluster:
        result = cluster.run("doctor")

    assert result.code == 1
    assert "run `unicluster join`" in result.out
