"""Looks at every request before anything else does: its form, its Host, and its page."""

import ipaddress
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from coordinator.protocols.errors import HttpError

VERSIONS = ("1.0", "1.1")
LOCAL = frozenset({"localhost", "ip6-localhost"})


class Guard:
    """Passes on what may be answered, and answers the rest itself with `refuse`.

    hosts: names of this machine, besides addresses and localhost. A page of another name that
    resolves to here (DNS rebinding) is refused by its Host. origins: pages, as in
    "https://chat.example", whose scripts may read answers; others are refused by their Origin.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Collection[str],
        origins: Collection[str],
        refuse: Callable[[Request, HttpError], Response],
    ) -> None:
        self._app = app
        self._hosts = LOCAL | {host.lower() for host in hosts}
        self._origins = frozenset(origins)
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # websockets: nothing here speaks them
        request = Request(scope)
        try:
            self._check(request)
        except HttpError as error:
            await self._refuse(request, error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, request: Request) -> None:
        _check_framing(request)
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or not self._is_here(hosts[0]):
            raise HttpError(
                421,
                "the Host of this request is not a name of this machine: use its address, or "
                "name it with --http-name",
                code="unknown_host",
            )
        origin = request.headers.get("origin")
        if origin is None or origin in self._origins:
            return
        if origin != f"{request.url.scheme}://{hosts[0]}":
            raise HttpError(
                403,
                "pages of other sites may not ask here: allow one with --http-origin",
                code="origin_refused",
            )

    def _is_here(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _check_framing(request: Request) -> None:
    """Raises HttpError where a proxy in front may see another request than the door does."""
    close = {"Connection": "close"}
    if request.scope.get("http_version") not in VERSIONS:
        raise HttpError(505, "this door speaks HTTP/1.1", code="http_version", headers=close)
    if "content-length" in request.headers and "transfer-encoding" in request.headers:
        message = "a request has a Content-Length or a Transfer-Encoding, not both"
        raise HttpError(400, message, headers=close)
