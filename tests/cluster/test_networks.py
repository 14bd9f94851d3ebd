"""Clusters over two links, one of which is dead, and over IPv6 addresses of the link alone."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import LocalCluster, until
from tests.support.netns import Networks, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

FAST, SLOW = "10.83.1.2", "10.83.2.2"  # of bob
# Two machines hold the demo model, one does not.
MEMORY = "10MB"
ASKED = ("chat", "What is the capital of France?")


@pytest.fixture
def net() -> Iterator[Networks]:
    with Networks("ann", "bob") as net:
        net.switch("fast")
        net.switch("slow")
        yield net


@pytest.fixture
def cluster(net: Networks, tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path / "cluster") as cluster:
        yield cluster


def join(cluster: LocalCluster, net: Networks) -> None:
    for name in ("ann", "bob"):
        cluster.start_agent(name, host="", memory=MEMORY, prefix=net.inside(name))
        cluster.wait_for_agents()


def addresses(cluster: LocalCluster, net: Networks) -> str:
    """The machines' addresses that are used, as ann sees them."""
    return cluster.run("nodes", prefix=net.inside("ann")).out


def worker_of_bob(cluster: LocalCluster, net: Networks) -> str:
    shown = cluster.run("status", "--json", prefix=net.inside("ann")).out
    stages = json.loads(shown)["info"]["stages"]
    return next((str(each["address"]) for each in stages if each["node"] == "bob"), "")


@pytest.mark.sweep
def test_a_link_goes_down_in_mid_life(net: Networks, cluster: LocalCluster) -> None:
    for number, name in enumerate(("ann", "bob"), start=1):
        net.plug(name, "eth0", "fast", f"10.83.1.{number}/24")
        net.plug(name, "eth1", "slow", f"10.83.2.{number}/24")
        # The better link of two that the kernel calls equally fast.
        net.ip(name, "route", "add", "default", "via", "10.83.1.9")
    net.pull("bob", "eth0")
    join(cluster, net)
    assert f"{SLOW}:" in addresses(cluster, net)

    net.mend("bob", "eth0", "fast")
    until(lambda: f"{FAST}:" in addresses(cluster, net), "the better link is used")
    serving = cluster.serve("demo", "--context", "256", "--host", "", prefix=net.inside("ann"))
    with serving:
        assert worker_of_bob(cluster, net).startswith(f"{FAST}:")
        assert cluster.run(*ASKED, prefix=net.inside("ann")).code == 0

        net.pull("bob", "eth0")

        serving.wait_for("is ready again")
        assert worker_of_bob(cluster, net).startswith(f"{SLOW}:")
        answer = cluster.run(*ASKED, prefix=net.inside("bob"))
    assert answer.code == 0
    assert answer.out.strip()


@pytest.mark.sweep
def test_a_cluster_without_any_ipv4(net: Networks, cluster: LocalCluster) -> None:
    net.plug("ann", "eth0", "fast", "fe80::a/64")
    net.plug("bob", "eth7", "fast", "fe80::b/64")
    join(cluster, net)

    with cluster.serve("demo", "--context", "256", "--host", "", prefix=net.inside("ann")):
        # Or at the other one of his addresses there, which the kernel makes.
        assert re.match(r"\[fe80::[0-9a-f:]+%eth0\]:\d+$", worker_of_bob(cluster, net))
        answer = cluster.run(*ASKED, prefix=net.inside("bob"))

    assert answer.code == 0
    assert answer.out.strip()
