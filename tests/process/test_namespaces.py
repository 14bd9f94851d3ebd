"""Discovery and connections on networks as they are, each host in a network namespace."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.cluster import ROOT, until
from tests.support.deadlines import scaled
from tests.support.netns import Networks, why_not
from unicluster.trust.cluster import Cluster

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

PORT = "47600"

# One host: TOKEN, what to do, and its arguments. Prints lines of JSON.
PROGRAM = """
import asyncio, json, sys, time
from node.doctor.multicast import judge, listen
from unicluster.cluster import discovery
from unicluster.cluster.channels import bind, make_server
from unicluster.dialing.dialer import Dialer
from unicluster.cluster.discovery import Advertisement, Browser
from unicluster.cluster.interfaces import own_addresses
from unicluster.cluster.records import Kind
from unicluster.errors import UniclusterError
from unicluster.trust.cluster import Cluster

discovery.POLL_EVERY = 0.5
CLUSTER = Cluster.from_token(sys.argv[1])

def say(**what):
    print(json.dumps(what), flush=True)

async def ended():
    await asyncio.to_thread(sys.stdin.read)

async def advertise(name):
    async with Advertisement(Kind.NODE, name, 47600, CLUSTER.fingerprint):
        say(ready=True)
        await ended()

async def deaf(name):
    discovery.multicast_interfaces = lambda: ["127.0.0.1"]
    await advertise(name)

async def serve(name):
    server = make_server()
    bind(server, "", 47600, CLUSTER.issue(name))
    await server.start()
    say(ready=True)
    await ended()
    await server.stop(None)

async def browse():
    async with Browser(Kind.NODE, CLUSTER.fingerprint) as browser:
        while True:
            say(found={each.name: each.addresses for each in browser.found.values()})
            await browser.changed()

async def doctor(name):
    heard = await listen(CLUSTER.fingerprint)
    findings = judge(heard, {name: set(own_addresses())})
    say(heard={each.interface.name: sorted(each.names) for each in heard},
        levels=[each.level.value for each in findings],
        messages=[each.message for each in findings])

async def reach(name, *addresses):
    dialer = Dialer(CLUSTER.issue("asking"))
    for _ in range(2):
        began = time.monotonic()
        try:
            reached = await dialer.reach(addresses, f"machine {name}", name=name)
            say(address=reached.address, name=reached.name, seconds=time.monotonic() - began)
        except UniclusterError as error:
            say(error=str(error))
            return

asyncio.run(globals()[sys.argv[2]](*sys.argv[3:]))
"""


class Lab:
    """Hosts, and programs that run on them as members of one cluster."""

    def __init__(self, *hosts: str) -> None:
        self.net = Networks(*hosts)
        self._token = Cluster.new().token
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Lab":
        self._stack.enter_context(self.net)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(self, host: str, *what: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [*self.net.inside(host), sys.executable, "-c", PROGRAM, self._token, *what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self._stack.callback(self._end, process)
        return process

    def ready(self, host: str, *what: str) -> None:
        """Starts a program and waits until it is ready."""
        assert lines(self.start(host, *what)) == {"ready": True}

    def said(self, host: str, *what: str) -> list[dict[str, Any]]:
        """All that a program says until its end."""
        process = self.start(host, *what)
        out, _ = process.communicate(timeout=scaled(40))
        return [json.loads(line) for line in out.splitlines()]

    @staticmethod
    def _end(process: "subprocess.Popen[str]") -> None:
        process.kill()
        process.communicate()


def lines(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    line: dict[str, Any] = json.loads(process.stdout.readline())
    return line


def wait_until_found(process: "subprocess.Popen[str]", name: str, address: str) -> None:
    """Reads what a browser finds until it is a machine at an address."""
    deadline = time.monotonic() + scaled(30)
    found: list[str] = []
    while address not in found:
        assert time.monotonic() < deadline, f"{name} is at {found}, and not at {address}"
        found = lines(process)["found"].get(name, [])


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab("ann", "bob", "cat") as lab:
        lab.net.switch("lan")
        lab.net.switch("other")
        yield lab


def add_bridges(lab: Lab, host: str, count: int) -> None:
    """As containers and virtual machines leave them, before the port in the kernel's list."""
    for number in range(count):
        bridge = f"zz{number}"
        lab.net.ip(host, "link", "add", bridge, "type", "bridge")
        lab.net.ip(host, "addr", "add", f"172.{16 + number}.0.1/16", "dev", bridge)
        ends = ("type", "veth", "peer", "name", f"c{number}")
        lab.net.ip(host, "link", "add", f"v{number}", *ends)
        lab.net.ip(host, "link", "set", f"v{number}", "up", "master", bridge)
        lab.net.ip(host, "link", "set", f"c{number}", "up")
        lab.net.ip(host, "link", "set", bridge, "up")


def test_hosts_of_many_bridges_see_each_other(lab: Lab) -> None:
    """And doctor hears each over the real interface."""
    for number, host in enumerate(("ann", "bob"), start=1):
        add_bridges(lab, host, 25)
        lab.net.plug(host, "uplink", "lan", f"10.83.1.{number}/24")
        lab.net.ip(host, "route", "add", "default", "via", "10.83.1.9")
    browser = lab.start("bob", "browse")
    lab.ready("ann", "advertise", "studio")

    wait_until_found(browser, "studio", f"10.83.1.1:{PORT}")

    (said,) = lab.said("ann", "doctor", "studio")
    assert said["heard"] == {"uplink": ["studio"]}
    assert said["levels"] == ["ok"]


def test_doctor_is_not_content_with_hearing_itself_elsewhere(lab: Lab) -> None:
    lab.net.plug("ann", "uplink", "lan", "10.83.1.1/24")
    lab.net.ip("ann", "route", "add", "default", "via", "10.83.1.9")
    lab.ready("ann", "deaf", "studio")

    (said,) = lab.said("ann", "doctor", "studio")

    assert said["heard"] == {"uplink": []}
    assert said["levels"] == ["error"]
    assert "own studio is not heard over uplink (10.83.1.1)" in said["messages"][0]


def test_a_network_of_ipv6_addresses_of_the_link_alone(lab: Lab) -> None:
    lab.net.plug("ann", "eth0", "lan", "fe80::a/64")
    lab.net.plug("bob", "eth7", "lan", "fe80::b/64")
    browser = lab.start("bob", "browse")
    lab.ready("ann", "advertise", "studio")

    wait_until_found(browser, "studio", f"[fe80::a%eth7]:{PORT}")

    lab.ready("bob", "serve", "bob")
    (said, _) = lab.said("ann", "reach", "bob", f"[fe80::b]:{PORT}")
    assert said["address"] == f"[fe80::b%eth0]:{PORT}"


def test_a_machine_wakes_with_another_address(lab: Lab) -> None:
    """And on a port that was not there before."""
    lab.net.plug("bob", "eth0", "lan", "10.83.1.2/24", "10.83.5.2/24")
    browser = lab.start("bob", "browse")
    lab.ready("ann", "advertise", "studio")
    lab.net.plug("ann", "eth0", "lan", "10.83.1.1/24")
    wait_until_found(browser, "studio", f"10.83.1.1:{PORT}")

    lab.net.ip("ann", "addr", "del", "10.83.1.1/24", "dev", "eth0")
    lab.net.ip("ann", "addr", "add", "10.83.5.1/24", "dev", "eth0")

    wait_until_found(browser, "studio", f"10.83.5.1:{PORT}")


def test_of_two_links_the_dead_one_costs_a_moment_once(lab: Lab) -> None:
    for number, host in enumerate(("ann", "bob"), start=1):
        lab.net.plug(host, "eth0", "lan", f"169.254.7.{number}/16")
        lab.net.plug(host, "eth1", "other", f"10.83.2.{number}/24")
    lab.net.pull("bob", "eth0")
    lab.ready("bob", "serve", "bob")

    first, again = lab.said("ann", "reach", "bob", f"169.254.7.2:{PORT}", f"10.83.2.2:{PORT}")

    assert first["address"] == again["address"] == f"10.83.2.2:{PORT}"
    assert first["seconds"] < scaled(2)
    assert again["seconds"] < first["seconds"]


def test_a_vpn_that_is_down_is_no_way(lab: Lab) -> None:
    lab.net.plug("ann", "eth1", "other", "10.83.2.1/24")
    lab.net.plug("bob", "eth1", "other", "10.83.2.2/24")
    lab.net.plug("ann", "tun9", "lan", "10.8.0.1/24")
    lab.ready("bob", "serve", "bob")

    first, _ = lab.said("ann", "reach", "bob", f"10.8.0.2:{PORT}", f"10.83.2.2:{PORT}")

    assert first["address"] == f"10.83.2.2:{PORT}"


def test_the_same_private_range_at_two_sites(lab: Lab) -> None:
    """The address of bob at its own site is cat's here, whom TLS names."""
    lab.net.plug("ann", "eth0", "lan", "192.168.7.1/24")
    lab.net.plug("cat", "eth0", "lan", "192.168.7.2/24")
    lab.net.switch("site")
    lab.net.plug("bob", "eth0", "site", "192.168.7.2/24")
    lab.net.plug("ann", "eth1", "other", "10.83.2.1/24")
    lab.net.plug("bob", "eth1", "other", "10.83.2.2/24")
    for host in ("bob", "cat"):
        lab.ready(host, "serve", host)
    both = (f"192.168.7.2:{PORT}", f"10.83.2.2:{PORT}")

    assert lab.said("ann", "reach", "bob", *both)[0]["address"] == both[1]
    assert lab.said("ann", "reach", "cat", *both)[0]["address"] == both[0]
    (refused,) = lab.said("ann", "reach", "dee", *both)
    assert f"{both[0]} answers as cat" in refused["error"]
    assert f"{both[1]} answers as bob" in refused["error"]


def test_nothing_of_the_namespaces_is_left() -> None:
    with Networks("ann") as net:
        of_this_process = net.inside("ann")[3].rpartition("-")[0]
        assert of_this_process in _namespaces()

    until(lambda: of_this_process not in _namespaces(), "the namespaces are gone")


def _namespaces() -> str:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=30)
    return listed.stdout
