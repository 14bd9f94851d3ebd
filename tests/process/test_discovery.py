"""Real multicast, over loopback, from real other processes where a death matters."""

import asyncio
import contextlib
import secrets
import signal
import sys
from collections.abc import AsyncIterator

import pytest
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from tests.support.deadlines import scaled
from unicluster.cluster import discovery
from unicluster.cluster.discovery import Advertisement, Browser
from unicluster.cluster.records import Kind, service_name_of
from unicluster.errors import InputError

HOST = "127.0.0.1"

# python -c ADVERTISE name port fingerprint host ttl: advertises until its stdin ends.
ADVERTISE = """
import asyncio, sys
from unicluster.cluster import discovery
from unicluster.cluster.discovery import Advertisement
from unicluster.cluster.records import Kind

async def main(name, port, fingerprint, host, ttl):
    discovery.TTL = int(ttl)
    async with Advertisement(Kind.NODE, name, int(port), fingerprint, host=host, usable="7"):
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def cluster() -> str:
    """A fingerprint of its own for each test: tests may run at the same time."""
    return secrets.token_hex(8)


@contextlib.asynccontextmanager
async def advertiser(
    name: str, port: int, fingerprint: str, host: str = HOST, ttl: int = discovery.TTL
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ADVERTISE, name, str(port), fingerprint, host, str(ttl)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(scaled(15)):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_a_browser_sees_machines_come_change_and_go(cluster: str) -> None:
    async with Browser(Kind.NODE, cluster, host=HOST) as browser:
        txt = {"memory": "128", "usable": "96", "chip": "M4 Max", "backend": "metal"}
        async with Advertisement(
            Kind.NODE, "studio", 7001, cluster, host=HOST, version="0.1", protocol="1", **txt
        ) as advertisement:
            assert await browser.wait_for(lambda found: "studio" in found, timeout=scaled(5))
            machine = browser.found["studio"]
            assert machine.addresses == ("127.0.0.1:7001",)
            assert (machine.memory, machine.usable, machine.protocol) == (128, 96, 1)
            assert (machine.chip, machine.backend, machine.version) == ("M4 Max", "metal", "0.1")

            await advertisement.update(usable="64")
            assert await browser.wait_for(
                lambda found: found["studio"].usable == 64, timeout=scaled(3)
            )

        assert await browser.wait_for(lambda found: not found, timeout=scaled(3))


async def test_a_browser_finds_what_was_there_before_it(cluster: str) -> None:
    async with (
        advertiser("one", 7001, cluster),
        advertiser("two", 7002, cluster),
        Browser(Kind.NODE, cluster, host=HOST) as browser,
    ):
        assert await browser.wait_for(lambda found: set(found) == {"one", "two"}, timeout=scaled(5))


async def test_another_cluster_on_the_network_is_ignored(cluster: str) -> None:
    other = secrets.token_hex(8)
    async with (
        Browser(Kind.NODE, cluster, host=HOST) as ours,
        Browser(Kind.NODE, other, host=HOST) as theirs,
        Advertisement(Kind.NODE, "studio", 7001, other, host=HOST),
    ):
        assert await theirs.wait_for(lambda found: "studio" in found, timeout=scaled(5))
        assert ours.found == {}


async def test_front_doors_are_not_machines(cluster: str) -> None:
    async with (
        Browser(Kind.NODE, cluster, host=HOST) as nodes,
        Browser(Kind.CHAT, cluster, host=HOST) as doors,
        Advertisement(Kind.CHAT, "studio", 7001, cluster, host=HOST, model="demo"),
    ):
        assert await doors.wait_for(lambda found: "studio" in found, timeout=scaled(5))
        assert doors.found["studio"].txt["model"] == "demo"
        assert nodes.found == {}


async def test_a_name_is_given_once_in_a_cluster(cluster: str) -> None:
    async with advertiser("studio", 7001, cluster):
        with pytest.raises(InputError, match=r"studio is already .* at 127.0.0.1:7001: choose"):
            async with Advertisement(Kind.NODE, "studio", 7002, cluster, host=HOST):
                pass


async def test_two_clusters_may_use_the_same_name(cluster: str) -> None:
    async with (
        advertiser("studio", 7001, secrets.token_hex(8)),
        Advertisement(Kind.NODE, "studio", 7002, cluster, host=HOST),
        Browser(Kind.NODE, cluster, host=HOST) as browser,
    ):
        assert await browser.wait_for(lambda found: "studio" in found, timeout=scaled(5))
        assert browser.found["studio"].address == "127.0.0.1:7002"


async def test_a_crashed_machine_may_come_back_under_its_name(cluster: str) -> None:
    async with Browser(Kind.NODE, cluster, host=HOST) as browser:
        async with advertiser("studio", 7001, cluster) as process:
            assert await browser.wait_for(lambda found: "studio" in found, timeout=scaled(5))
            process.send_signal(signal.SIGKILL)
            await process.wait()

        async with Advertisement(Kind.NODE, "studio", 7002, cluster, host=HOST):
            assert await browser.wait_for(
                lambda found: found["studio"].address == "127.0.0.1:7002", timeout=scaled(8)
            )


async def test_a_machine_that_dies_without_goodbye_is_forgotten(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "POLL_EVERY", 0.5)
    async with Browser(Kind.NODE, cluster, host=HOST) as browser:
        async with advertiser("studio", 7001, cluster, ttl=2) as process:
            assert await browser.wait_for(lambda found: "studio" in found, timeout=scaled(5))
            process.send_signal(signal.SIGKILL)
            await process.wait()

        assert await browser.wait_for(lambda found: not found, timeout=scaled(8))


async def test_without_a_host_all_addresses_are_told(cluster: str) -> None:
    async with (
        advertiser("studio", 7001, cluster, host=""),
        Browser(Kind.NODE, cluster) as browser,
    ):
        assert await browser.wait_for(lambda found: "studio" in found, timeout=scaled(5))
        addresses = browser.found["studio"].addresses
        assert addresses
        assert all(address.endswith(":7001") for address in addresses)
        assert len(addresses) == 1 or "127.0.0.1:7001" not in addresses


async def test_changed_returns_when_something_does(cluster: str) -> None:
    async with Browser(Kind.NODE, cluster, host=HOST) as browser:
        change = asyncio.create_task(browser.changed())
        async with Advertisement(Kind.NODE, "studio", 7001, cluster, host=HOST):
            await asyncio.wait_for(change, timeout=scaled(5))
            assert "studio" in browser.found


async def test_waiting_in_vain_ends(cluster: str) -> None:
    async with Browser(Kind.NODE, cluster, host=HOST) as browser:
        assert not await browser.wait_for(lambda found: bool(found), timeout=0.1)


def test_a_host_that_is_no_address_is_refused(cluster: str) -> None:
    with pytest.raises(InputError, match="choose another with --host"):
        Browser(Kind.NODE, cluster, host="no such host")


# Records of strangers: anybody on the network can send them.


@contextlib.asynccontextmanager
async def stranger(
    service: str, port: int, server: str = "stranger.local.", **txt: str
) -> AsyncIterator[None]:
    """Somebody who sends any record, in whatever name."""
    info = AsyncServiceInfo(
        Kind.NODE.value, service, port=port, properties=txt, server=server, parsed_addresses=[HOST]
    )
    async with AsyncZeroconf(interfaces=[HOST]) as zeroconf:
        await (await zeroconf.async_register_service(info, cooperating_responders=True))
        yield


@pytest.mark.parametrize(
    ("port", "txt"),
    [
        (0, {}),
        (7, {"chip": "\x1b[2J"}),
        (7, {"memory": "many"}),
        (7, {"name": "somebody-else"}),
        (7, {"name": "x\nERROR forged"}),
    ],
)
async def test_one_bad_record_costs_that_record(
    cluster: str, port: int, txt: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    service = service_name_of(Kind.NODE, "evil", cluster)
    ignored = asyncio.Event()
    caplog.handler.addFilter(lambda record: ignored.set() or True)
    async with (
        Browser(Kind.NODE, cluster, host=HOST) as browser,
        stranger(service, port, **({"name": "evil", "cluster": cluster} | txt)),
        Advertisement(Kind.NODE, "studio", 7001, cluster, host=HOST),
    ):
        assert await browser.wait_for(lambda found: "studio" in found, timeout=10)
        await asyncio.wait_for(ignored.wait(), timeout=10)

    assert set(browser.found) <= {"studio"}
    assert all(record.getMessage().isprintable() for record in caplog.records)


async def test_a_known_name_does_not_hide_the_machine_that_has_it(cluster: str) -> None:
    service = service_name_of(Kind.NODE, "studio", cluster)
    async with (
        Browser(Kind.NODE, cluster, host=HOST) as browser,
        Advertisement(Kind.NODE, "studio", 7001, cluster, host=HOST),
    ):
        assert await browser.wait_for(lambda found: "studio" in found, timeout=10)
        async with stranger(service, 666, name="studio", cluster=cluster):
            assert await browser.wait_for(
                lambda found: len(found["studio"].addresses) == 2, timeout=15
            )
            assert set(browser.found["studio"].addresses) == {f"{HOST}:7001", f"{HOST}:666"}
