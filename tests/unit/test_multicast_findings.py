"""Findings of doctor on multicast and macOS's permission, by tables of what was heard."""

import errno
import ipaddress

import pytest

from node.doctor.finding import Level
from node.doctor.multicast import Heard, judge, local_network
from unicluster.cluster.interfaces import Interface, Rank

ADDRESS = "192.168.1.2"
HERE = {"studio": {ADDRESS, "10.0.0.2"}}


def heard(*names: str, address: str = ADDRESS, problem: int = 0) -> Heard:
    network = ipaddress.ip_network(f"{address}/24", strict=False)
    interface = Interface("en0", 1, address, network, 1000, Rank.DEFAULT_ROUTE)
    error = OSError(problem, "No route to host") if problem else None
    return Heard(interface, frozenset(names), error)


@pytest.mark.parametrize(
    ("what", "level", "message"),
    [
        (heard("studio", "mini"), Level.OK, "heard over en0 (192.168.1.2): mini"),
        (heard("studio"), Level.OK, "this machine only"),
        (heard("mini"), Level.ERROR, "own studio is not heard over en0"),
        (heard(), Level.ERROR, "own studio is not heard over en0"),
        (heard(problem=errno.EHOSTUNREACH), Level.ERROR, "nothing can be sent over en0"),
    ],
)
def test_an_agent_must_be_heard_over_its_interfaces(
    what: Heard, level: Level, message: str
) -> None:
    (finding,) = judge([what], HERE)

    assert finding.level is level
    assert message in finding.message


def test_an_agent_that_listens_elsewhere_need_not_be_heard() -> None:
    assert judge([heard(address="172.16.0.1")], HERE) == []


@pytest.mark.parametrize(
    ("what", "system", "version", "level"),
    [
        (heard(problem=errno.EHOSTUNREACH), "darwin", "15.1", Level.ERROR),
        (heard("studio"), "darwin", "26.0", Level.WARNING),
        (heard(), "darwin", "15.0.1", Level.WARNING),
        (heard("studio", "mini"), "darwin", "15.1", None),
        (heard(problem=errno.EHOSTUNREACH), "darwin", "14.7", None),
        (heard(problem=errno.EHOSTUNREACH), "linux", "", None),
    ],
)
def test_macos_asks_before_a_program_may_use_the_local_network(
    what: Heard, system: str, version: str, level: Level | None
) -> None:
    found = local_network([what], HERE, system, version)

    assert [finding.level for finding in found] == ([level] if level else [])
    assert all("Privacy & Security > Local Network" in finding.remedy for finding in found)
