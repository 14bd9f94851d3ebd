"""A Hugging Face hub on loopback, so that the real code of huggingface_hub runs in tests.

    with Hub() as hub:
        hub.add("org/name", directory)
        hub.drop_after("model.safetensors", 1000)
        hf_hub_download("org/name", "model.safetensors", endpoint=hub.endpoint, cache_dir=cache)
        assert hub.downloads() == {"model.safetensors": [(0, 1000), (1000, 4096)]}

As at the real one, *.safetensors and *.gguf are in large file storage: their address answers a
redirect to a CDN, which is another origin and refuses requests that carry a token.
"""

import hashlib
import json
import re
import socket
import sys
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

_REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_API = re.compile(rf"/api/models/{_REPO}(?:/(?P<view>revision|tree)/(?P<revision>[^/]+))?")
_FILE = re.compile(rf"(?P<cdn>/cdn)?/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Request:
    method: str
    path: str
    repo: str | None = None
    file: str | None = None
    range: tuple[int, int] | None = None  # the bytes asked for, end excluded
    status: int = 0
    bytes_sent: int = 0  # of the file; what describes or refuses it does not count


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    etag: str
    listing: dict[str, Any]  # with "lfs" for what is in large file storage


@dataclass(frozen=True)
class _Repo:
    commit: str
    files: dict[str, _File]


@dataclass
class _Fault:
    kind: str
    name: str
    times: int
    value: int = 0  # a status, or how many bytes of an answer leave
    method: str | None = None


@dataclass
class Hub:
    """Serves from its making to `close`; its attributes may be set at any time."""

    token: str | None = None  # makes every repo private to those who have it
    throttle: float | None = None  # bytes per second, all answers together
    requests: list[Request] = field(default_factory=list)  # in the order of arrival

    def __post_init__(self) -> None:
        self.repos: dict[str, _Repo] = {}
        self.gated: set[str] = set()
        self._faults: list[_Fault] = []
        self._lock, self._closed, self._line_free = Lock(), Event(), 0.0
        self._servers = [_Server(self), _Server(self)]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections, those in mid-file and those that clients keep alive included."""
        self._closed.set()
        for server in self._servers:
            server.stop()

    def add(self, repo: str, directory: Path) -> str:
        """Serve the files of `directory` as the main branch of `repo`; returns its commit."""
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
        names = [path.relative_to(directory).as_posix() for path in paths]
        files = {name: _describe(name, path) for name, path in zip(names, paths, strict=True)}
        commit = _git_blob("".join(f"{file.etag} {name}" for name, file in files.items()).encode())
        self.repos[repo] = _Repo(commit, files)
        return commit

    def gate(self, repo: str) -> None:
        """Nobody gets the files of `repo`; as at the real hub, their list stays public."""
        self.gated.add(repo)

    def drop_after(self, file: str, n_bytes: int, times: int = 1) -> None:
        """Close the connection `n_bytes` into an answer that has more."""
        self._faults.append(_Fault("drop", file, times, n_bytes, "GET"))

    def corrupt(self, file: str, times: int = 1) -> None:
        """Invert the last byte of an answer."""
        self._faults.append(_Fault("corrupt", file, times, method="GET"))

    def fail(self, file: str, status: int = 503, times: int = 1, method: str | None = None) -> None:
        """Answer `status` to requests for `file`, or with the name of a repo, to those about it.

        A download asks by HEAD before it GETs, so `method` says which of the two fails.
        """
        self._faults.append(_Fault("fail", file, times, status, method))

    def sent(self, file: str) -> int:
        """Bytes of `file` that left, repeated ones included."""
        return sum(request.bytes_sent for request in self.requests if request.file == file)

    def downloads(self) -> dict[str, list[tuple[int, int]]]:
        """By file, the byte ranges (ends excluded) that left, in the order of their requests."""
        ranges: dict[str, list[tuple[int, int]]] = {}
        for request in self.requests:
            if request.file and request.bytes_sent:
                start = request.range[0] if request.range else 0
                ranges.setdefault(request.file, []).append((start, start + request.bytes_sent))
        return ranges

    def take(self, kind: str, request: Request, size: int = 1) -> _Fault | None:
        """Use up a fault that meets this request; a drop spares answers of no more than it lets."""
        with self._lock:
            for fault in self._faults:
                named = fault.name == (request.file or request.repo)
                meant = named and kind == fault.kind and fault.method in (None, request.method)
                if meant and fault.times and not (kind == "drop" and size <= fault.value):
                    fault.times -= 1
                    return fault
        return None

    def pace(self, size: int) -> None:
        """Wait until the line is free for `size` bytes."""
        if self.throttle:
            with self._lock:
                self._line_free = max(self._line_free, time.monotonic()) + size / self.throttle
                wait = self._line_free - time.monotonic()
            if self._closed.wait(wait):
                raise ConnectionAbortedError


def _describe(name: str, path: Path) -> _File:
    """With the fields of both model_info and the file tree, which differ in names only."""
    size = path.stat().st_size
    listing: dict[str, Any] = {"type": "file", "path": name, "rfilename": name, "size": size}
    if path.suffix in (".safetensors", ".gguf"):
        with path.open("rb") as file:
            etag = hashlib.file_digest(file, "sha256").hexdigest()
        version = "https://git-lfs.github.com/spec/v1"
        content = f"version {version}\noid sha256:{etag}\nsize {size}\n".encode()
        lfs = {"sha256": etag, "oid": etag, "size": size, "pointerSize": len(content)}
        blob_id, listing["lfs"] = _git_blob(content), lfs
    else:
        etag = blob_id = _git_blob(path.read_bytes())
    return _File(path, size, f'"{etag}"', listing | {"oid": blob_id, "blobId": blob_id})


def _git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content), usedforsecurity=False).hexdigest()


def _range(header: str, size: int) -> tuple[int, int] | None:
    """The single range that was asked for; like RFC 9110 lets a server, others are ignored."""
    match = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", header)
    if not match:
        return None
    first, last, suffix = match.groups()
    if suffix:
        return max(size - int(suffix), 0), size
    return int(first), min(int(last) + 1, size) if last else size


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # server_close waits for these only

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self._connections: set[socket.socket] = set()
        self._thread = Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # its client was first
                continue
        self.server_close()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def close_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients may go at any time
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        match = _API.fullmatch(path) or _FILE.fullmatch(path)
        parts = {k: unquote(v) for k, v in match.groupdict().items() if v} if match else {}
        self.asked = Request(self.command, self.path, parts.get("repo"), parts.get("file"))
        self.server.hub.requests.append(self.asked)
        if fault := self.server.hub.take("fail", self.asked):
            self._refuse(fault.value, "", "The hub has a bad day")
        elif match:
            self._answer(**parts)
        else:
            self._refuse(404, "", "Sorry, we can't find the page you are looking for.")

    def _answer(
        self, repo: str, revision: str = "main", view: str = "", file: str = "", cdn: str = ""
    ) -> None:
        """Checks things in the order of the real hub, and refuses in its words."""
        hub, sign_in = self.server.hub, self.headers.get("Authorization")
        if cdn and sign_in:
            return self._refuse(400, "", "Only one auth mechanism allowed")
        if not cdn and hub.token and sign_in not in (None, f"Bearer {hub.token}"):
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if not cdn and not sign_in and (hub.token or repo not in hub.repos):
            # Without the code, the client takes a 401 for a missing repo over https only.
            return self._refuse(401, "RepoNotFound", "Invalid username or password.")
        if repo not in hub.repos:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        commit, files = hub.repos[repo].commit, hub.repos[repo].files
        if revision not in ("main", commit):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if view == "tree":
            return self._reply(200, [entry.listing for entry in files.values()])
        if not file:
            siblings = [entry.listing for entry in files.values()]
            if "blobs=" not in self.path:
                siblings = [{"rfilename": name} for name in files]
            gated = "manual" if repo in hub.gated else False
            info = {"id": repo, "sha": commit, "gated": gated, "siblings": siblings}
            return self._reply(200, info)
        if repo in hub.gated:
            who = "you are not in the authorized list" if sign_in else "you must be authenticated"
            message = f"Access to model {repo} is restricted and {who}."
            return self._refuse(403 if sign_in else 401, "GatedRepo", message)
        if file not in files:
            known = {"X-Repo-Commit": commit}  # so that the client may remember
            return self._refuse(404, "EntryNotFound", "Entry not found", **known)
        return self._send_file(files[file], commit, f"{hub.cdn}/cdn{self.path}" if not cdn else "")

    def _send_file(self, file: _File, commit: str, elsewhere: str) -> None:
        """By a redirect to `elsewhere` where it is in large file storage."""
        headers = {"ETag": file.etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if "lfs" in file.listing and elsewhere:
            linked = {"X-Linked-ETag": file.etag, "X-Linked-Size": str(file.size)}
            return self._begin(302, headers | linked | {"Location": elsewhere}, 0)
        if self.command == "HEAD":
            return self._begin(200, headers, file.size)
        self.asked.range = _range(self.headers.get("Range", ""), file.size)
        if not self.asked.range:
            self._begin(200, headers, file.size)
            return self._send_bytes(file.path, 0, file.size)
        start, end = self.asked.range
        if start >= end:
            return self._begin(416, {"Content-Range": f"bytes */{file.size}"}, 0)
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
        self._begin(206, headers, end - start)
        return self._send_bytes(file.path, start, end - start)

    def _send_bytes(self, path: Path, start: int, size: int) -> None:
        hub = self.server.hub
        corrupt, drop = (hub.take(kind, self.asked, size) for kind in ("corrupt", "drop"))
        left = drop.value if drop else size
        chunk_size = 256 * 1024 if not hub.throttle else max(1, int(hub.throttle / 50))
        with path.open("rb") as source:
            source.seek(start)
            while left and (chunk := source.read(min(left, chunk_size))):
                left -= len(chunk)
                if corrupt and not left:
                    chunk = chunk[:-1] + bytes([chunk[-1] ^ 0xFF])
                hub.pace(len(chunk))
                self.asked.bytes_sent += len(chunk)  # before: who has it may look at once
                self.wfile.write(chunk)
        self.close_connection = self.close_connection or self.asked.bytes_sent < size

    def _refuse(self, status: int, code: str, message: str, **headers: str) -> None:
        codes = {"X-Error-Code": code} if code else {}
        self._reply(status, {"error": message}, **codes, **headers, **{"X-Error-Message": message})

    def _reply(self, status: int, content: object, **headers: str) -> None:
        body = json.dumps(content).encode()
        self._begin(status, headers, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _begin(self, status: int, headers: dict[str, str], length: int) -> None:
        self.asked.status = status
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Hub.requests has it all."""
