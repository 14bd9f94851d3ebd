"""The order of this machine's addresses, and of another one's, by tables of interfaces."""

import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from unicluster.cluster import interfaces as under_test
from unicluster.cluster.interfaces import (
    MOST_LINKS,
    Interface,
    Rank,
    best_first,
    multicast_interfaces,
    own_addresses,
)

Having = Callable[..., None]


@pytest.fixture
def having(monkeypatch: pytest.MonkeyPatch) -> Having:
    """Gives this machine other interfaces: (name, address/prefix, rank, Mbit/s)."""

    def have(*rows: tuple[str, str, Rank, int]) -> None:
        names = list(dict.fromkeys(row[0] for row in rows))
        listed = [
            Interface(
                name,
                names.index(name) + 1,
                str(ipaddress.ip_interface(address).ip),
                ipaddress.ip_interface(address).network,
                speed,
                rank,
            )
            for name, address, rank, speed in rows
        ]
        monkeypatch.setattr(under_test, "interfaces", lambda: listed)

    return have


def test_an_address_on_the_fastest_network_of_both_comes_first(having: Having) -> None:
    having(
        ("eth0", "192.168.1.2/24", Rank.DEFAULT_ROUTE, 1000),
        ("eth1", "10.0.0.2/24", Rank.PORT, 10000),
    )

    assert best_first(["203.0.113.9", "192.168.1.3", "10.0.0.3"])[-1] == "203.0.113.9"


def test_a_link_that_leads_out_comes_before_a_vpn(having: Having) -> None:
    having(
        ("tun0", "10.8.0.2/24", Rank.OTHER, 100000),
        ("eth0", "192.168.1.2/24", Rank.DEFAULT_ROUTE, 1000),
    )

    assert best_first(["10.8.0.3", "192.168.1.3"]) == ["192.168.1.3", "10.8.0.3"]


def test_an_ipv6_address_of_the_link_is_tried_on_each_link(having: Having) -> None:
    having(
        ("en5", "fe80::5/64", Rank.PORT, 40000),
        ("en0", "fe80::1/64", Rank.DEFAULT_ROUTE, 1000),
        ("virbr0", "fe80::9/64", Rank.INNER, 0),
    )

    assert best_first(["fe80::42"]) == ["fe80::42%en0", "fe80::42%en5"]


def test_a_link_that_mdns_counted_gets_its_name(having: Having) -> None:
    having(("en5", "fe80::5/64", Rank.PORT, 40000), ("en6", "fe80::6/64", Rank.PORT, 40000))

    assert best_first(["fe80::42%2"]) == ["fe80::42%en6"]


def test_bridges_of_containers_are_nobodys_way_in(having: Having) -> None:
    having(
        ("eth0", "192.168.1.2/24", Rank.DEFAULT_ROUTE, 1000),
        *((f"br{n}", f"172.{16 + n}.0.1/16", Rank.INNER, 10000) for n in range(10)),
    )

    assert own_addresses() == ["192.168.1.2"]


def test_few_ipv6_addresses_of_links_are_told(having: Having) -> None:
    having(*((f"eth{n}", f"fe80::{n + 1}/64", Rank.PORT, 1000) for n in range(30)))

    assert len(own_addresses()) == MOST_LINKS
    assert len(best_first(["fe80::42"])) == MOST_LINKS


def test_multicast_goes_over_what_matters_where_not_all_fits(
    having: Having, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "limit").write_text("3\n")
    monkeypatch.setattr(under_test, "MEMBERSHIPS", tmp_path / "limit")
    monkeypatch.setattr(under_test.sys, "platform", "linux")
    having(
        ("eth0", "192.168.1.2/24", Rank.DEFAULT_ROUTE, 1000),
        ("eth0", "192.168.2.2/24", Rank.DEFAULT_ROUTE, 1000),
        ("eth1", "10.0.0.2/24", Rank.PORT, 10000),
        ("lo", "127.0.0.1/8", Rank.LOOPBACK, 0),
        *((f"br{n}", f"172.{16 + n}.0.1/16", Rank.INNER, 10000) for n in range(10)),
    )

    assert multicast_interfaces() == ["192.168.1.2", "10.0.0.2", "127.0.0.1"]


@pytest.mark.parametrize(
    ("name", "files", "rank"),
    [
        ("enp3s0", ["device"], Rank.PORT),
        ("vmbr0", ["bridge", "lower_enp9s0"], Rank.PORT),  # a bridge over a port
        ("bond0", ["lower_vmbr0"], Rank.PORT),
        ("cluster9", ["bridge", "lower_veth1"], Rank.INNER),
        ("br-0a1b2c", [], Rank.INNER),
        ("wg0", [], Rank.OTHER),
        ("lo", [], Rank.LOOPBACK),
    ],
)
def test_what_an_interface_is_by_the_kernel_s_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: list[str], rank: Rank
) -> None:
    for path in ("enp9s0/device", "vmbr0/lower_enp9s0", *(f"{name}/{file}" for file in files)):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(under_test, "SYSFS", tmp_path)
    monkeypatch.setattr(under_test.sys, "platform", "linux")

    assert under_test._rank(name, leads_out=False) is rank


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("en0", Rank.PORT),
        ("bridge0", Rank.PORT),  # of the Thunderbolt ports
        ("bridge100", Rank.INNER),
        ("awdl0", Rank.INNER),
        ("utun4", Rank.OTHER),
        ("lo0", Rank.LOOPBACK),
    ],
)
def test_what_an_interface_of_a_mac_is(
    monkeypatch: pytest.MonkeyPatch, name: str, rank: Rank
) -> None:
    monkeypatch.setattr(under_test.sys, "platform", "darwin")

    assert under_test._rank(name, leads_out=False) is rank


def test_the_way_out_of_a_vpn_is_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    assert under_test._rank("eth7", leads_out=True) is Rank.DEFAULT_ROUTE
    assert under_test._rank("tun0", leads_out=True) is Rank.OTHER


def test_this_machine_has_addresses() -> None:
    for each in under_test.interfaces():
        assert socket.if_nametoindex(each.name) == each.index
        assert each.ip in each.network
