"""`unicluster status`: what is served in the cluster, and how busy it is."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.text import Text

from coordinator.terminal.status import status_table
from coordinator.terminal.watch import watching
from unicluster.chat.command import NOTHING
from unicluster.client.client import AsyncClient
from unicluster.client.metrics import Metrics
from unicluster.cluster.discovery import Browser
from unicluster.cluster.idle import idle
from unicluster.cluster.records import Kind, ServiceRecord
from unicluster.command_line import Command, Option, server_option
from unicluster.dialing.dialer import Dialer
from unicluster.errors import UnavailableError, UniclusterError
from unicluster.terminal.console import Console
from unicluster.terminal.waiting import doing
from unicluster.trust.cluster import ClientAccess
from unicluster.trust.identity import default_name
from unicluster.trust.keyring import Keyring
from unicluster.trust.store import Store

# Rates are of the time between two readings.
REFRESH_SECONDS = 1.0
FIRST_SECONDS = 0.5
SEARCH_SECONDS = 6.0
ANSWER_SECONDS = 5.0

# By address of who serves.
Readings = dict[str, Metrics | UniclusterError]


def run(watch: bool, as_json: bool, server: str | None) -> int:
    return asyncio.run(_status(server or "", watch, as_json))


async def _status(server: str, watch: bool, as_json: bool) -> int:
    access = Store().require_access()
    console = Console()
    async with contextlib.AsyncExitStack() as stack:
        with doing("Looking for what is served"):
            addresses = await _search(access, server, stack)
        with doing("Measuring"):
            servers = _Servers(access, addresses)
            stack.push_async_callback(servers.close)
            await servers.read()
            await asyncio.sleep(FIRST_SECONDS)
            readings = await servers.read()
        if not watch:
            _raise_if_none(readings)
            _print_json(readings) if as_json else console.print(_render(readings))
            return 0
        show = stack.enter_context(watching(console)) if not as_json else None
        while True:
            _print_json(readings) if show is None else show(_render(readings))
            await asyncio.sleep(REFRESH_SECONDS)
            readings = await servers.read()


Addresses = Callable[[], Awaitable[Sequence[str]]]


async def _search(access: ClientAccess, server: str, stack: contextlib.AsyncExitStack) -> Addresses:
    """Returns a function for the addresses of all servers, valid until the stack is closed."""

    async def named() -> Sequence[str]:
        return [server]

    async def found() -> Sequence[str]:
        others = [m for m in browser.found.values() if local not in m.addresses]
        addresses = await asyncio.gather(*(reached(each) for each in others))
        return sorted([*([local] if local else []), *addresses])

    async def reached(record: ServiceRecord) -> str:
        """Where a server answers; the address that it has first where none does."""
        with contextlib.suppress(UniclusterError):
            who = f"the server {record.name}"
            return (await dialer.reach(record.addresses, who)).address
        return record.address

    if server:
        return named
    dialer = Dialer(Keyring.of_client(access, default_name()))
    browser = await stack.enter_async_context(Browser(Kind.CHAT, access.fingerprint))
    async with AsyncClient(cluster=access) as client:
        local = await client.find_here()
    if not local and await idle(Store().load()):
        raise UnavailableError(NOTHING)
    if not local and not await browser.wait_for(bool, SEARCH_SECONDS):
        raise UnavailableError(NOTHING)
    return found


class _Servers:
    """Clients of all servers, with the last reading of each."""

    def __init__(self, access: ClientAccess, addresses: Addresses) -> None:
        self._access = access
        self._addresses = addresses
        self._clients: dict[str, AsyncClient] = {}
        self._last: dict[str, Metrics] = {}

    async def read(self) -> Readings:
        """Asks all at once."""
        addresses = await self._addresses()
        answers = await asyncio.gather(*(self._ask(address) for address in addresses))
        return dict(zip(addresses, answers, strict=True))

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()

    async def _ask(self, address: str) -> Metrics | UniclusterError:
        if address not in self._clients:
            self._clients[address] = AsyncClient(
                address, cluster=self._access, timeout=ANSWER_SECONDS
            )
        try:
            now = await self._clients[address].measure()
        except UniclusterError as error:
            return error
        before = self._last.get(address, now)
        self._last[address] = now
        return now.since(before)


def _raise_if_none(readings: Readings) -> None:
    errors = [reading for reading in readings.values() if isinstance(reading, UniclusterError)]
    if len(errors) == len(readings):
        raise errors[0] if errors else UnavailableError(NOTHING)


def _render(readings: Readings) -> RenderableType:
    shown: list[RenderableType] = []
    for address, reading in readings.items():
        shown += [""] if shown else []
        if isinstance(reading, UniclusterError):
            shown.append(Text(str(reading), "red"))
        else:
            shown.append(status_table(reading, address))
    return Group(*(shown or [NOTHING]))


def _print_json(readings: Readings) -> None:
    for address, reading in readings.items():
        fields = (
            {"error": str(reading)} if isinstance(reading, UniclusterError) else asdict(reading)
        )
        print(json.dumps({"address": address, **fields}), flush=True)


command = Command(
    run,
    sections={
        "Output": [
            Option("--watch", "keep it up to date", is_flag=True),
            Option(
                "--json",
                "all figures: a line of JSON for each server",
                name="as_json",
                is_flag=True,
            ),
            server_option("default: all are found by mDNS"),
        ],
    },
    examples=["unicluster status --watch", "unicluster status --json"],
)
