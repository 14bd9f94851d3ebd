"""Keys of the HTTP doors: in the state file, at the door, and in the command."""

import asyncio
import datetime
import logging
import re
import sqlite3
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from coordinator.api.certificate import tls_of
from coordinator.api.doorman import Doorman
from coordinator.commands import key
from coordinator.commands.key import duration
from coordinator.protocols.errors import HttpError
from coordinator.state import database
from coordinator.state.database import Database
from coordinator.state.keys import Keys, Limits
from tests.support import cluster
from tests.support.deadlines import scaled
from tests.support.http_door import Door, http_door
from unicluster.errors import InputError, NotFoundError
from unicluster.v1.chat_pb2 import Delta, Finish, GenerateEvent, GenerateRequest, Usage

CHAT = "/v1/chat/completions"


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keys]:
    state = Database(tmp_path / "state")
    yield Keys(state)
    state.close()


def test_a_key_is_found_by_its_secret_alone(keys: Keys, tmp_path: Path) -> None:
    limits = Limits(2, 1000, ("demo", "llama"), time.time() + 60)
    made, secret = keys.create("webui", limits)

    assert keys.find(secret) == made
    assert keys.find(f"{secret}x") is None
    assert keys.find("") is None
    assert keys.all() == [made]
    assert keys.any()
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes()


def test_a_revoked_key_is_known_as_such_and_its_name_is_free_again(keys: Keys) -> None:
    made, secret = keys.create("webui", Limits())
    with pytest.raises(InputError, match="'webui' exists"):
        keys.create("webui", Limits())
    keys.revoke("webui")
    again, _ = keys.create("webui", Limits())
    keys.revoke(again.id)

    found = keys.find(secret)
    assert found is not None
    assert (found.id, found.state(time.time())) == (made.id, "revoked")
    assert not keys.any()
    with pytest.raises(NotFoundError, match="no key 'webui'"):
        keys.revoke("webui")


@pytest.mark.parametrize("name", ["", " ", "a" * 65, "a\nb", "\x1b[31m"])
def test_names_are_printable_and_short(keys: Keys, name: str) -> None:
    with pytest.raises(InputError, match="can't name a key"):
        keys.create(name, Limits())


def test_the_state_file_is_private_and_shared_by_processes(tmp_path: Path) -> None:
    path = tmp_path / "home" / "state"
    ours, theirs = Database(path), Database(path)
    _, secret = Keys(ours).create("a", Limits())

    assert Keys(theirs).find(secret) is not None
    assert ours.rows("PRAGMA journal_mode")[0][0] == "wal"
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0
    ours.close()
    theirs.close()


def test_a_state_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    newer, damaged, folder = tmp_path / "newer", tmp_path / "damaged", tmp_path / "folder"
    with sqlite3.connect(newer) as made:
        made.execute("PRAGMA user_version = 999")
    made.close()
    damaged.write_bytes(b"not a database at all" * 100)
    folder.mkdir()
    for path, message in ((newer, "newer"), (damaged, "not a database"), (folder, "unable")):
        with pytest.raises(InputError, match=message) as caught:
            Database(path)
        assert str(path) in str(caught.value)


def test_an_older_state_file_is_migrated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    old = Database(path)
    _, secret = Keys(old).create("a", Limits())
    old.close()
    wider = (*database.MIGRATIONS, "ALTER TABLE keys ADD COLUMN colour TEXT; SELECT 1")
    monkeypatch.setattr(database, "MIGRATIONS", wider)
    for _ in range(2):
        new = Database(path)
        assert new.rows("PRAGMA user_version")[0][0] == len(wider)
        assert new.rows("SELECT colour FROM keys")[0][0] is None
        assert Keys(new).find(secret) is not None
        new.close()
    broken = (*wider, "ALTER TABLE keys ADD COLUMN size TEXT; nonsense")
    monkeypatch.setattr(database, "MIGRATIONS", broken)
    with pytest.raises(InputError, match="nonsense"):
        Database(path)
    monkeypatch.setattr(database, "MIGRATIONS", wider)
    Database(path).close()  # nothing of the broken one has stayed


def finish(prompt: int) -> GenerateEvent:
    return GenerateEvent(finish=Finish(usage=Usage(prompt_tokens=prompt)))


def test_tokens_of_a_minute_are_limited(keys: Keys) -> None:
    now = [1000.0]
    doorman = Doorman(keys, is_open=False, clock=lambda: now[0])
    made, _ = keys.create("a", Limits(tokens_per_minute=100))
    request = [GenerateRequest(prompt="a" * 80)]  # guessed to be 20 tokens
    with doorman.admitted(made, request) as meter:
        meter.count(0, GenerateEvent(delta=Delta(token_ids=[1] * 40)))
        meter.count(0, finish(30))
    now[0] += 30
    with doorman.admitted(made, request):  # it leaves before anything has come
        pass
    now[0] += 15
    with doorman.admitted(made, request) as meter:
        meter.count(0, finish(10))
    with pytest.raises(HttpError, match="100 tokens a minute") as caught:
        doorman.admitted(made, request).__enter__()
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "16")
    now[0] += 16
    with doorman.admitted(made, request):
        pass


def test_other_keys_are_not_limited_by_one(keys: Keys) -> None:
    doorman = Doorman(keys, is_open=False)
    one, other = (keys.create(name, Limits(most_running=1))[0] for name in "ab")
    request = [GenerateRequest()]
    with doorman.admitted(one, request):
        with pytest.raises(HttpError, match="1 answers at the same time"):
            doorman.admitted(one, request).__enter__()
        with doorman.admitted(other, request):
            pass
    with pytest.raises(HttpError), doorman.admitted(one, request * 2):
        pass
    with doorman.admitted(one, request):
        pass


@pytest.mark.parametrize(
    ("text", "seconds"), [("90m", 5400), ("12h", 43200), ("30d", 2592000), ("1Y", 31536000)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0d", "-1d", "1", "d", "1w", "1.5d", "9999999d"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--expires"):
        duration(text)


async def ask(door: Door, secret: str = "", **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {secret}".encode("latin-1")} if secret else {}
    async with httpx.AsyncClient(base_url=door.url, timeout=scaled(10), **options) as client:
        body = {"messages": [{"role": "user", "content": "hello"}]}
        return await client.post(CHAT, json=body, headers=headers)


async def test_without_any_key_an_open_door_lets_in_and_another_does_not() -> None:
    async with http_door() as door:
        assert (await ask(door)).status_code == 200
        door.keys.create("a", Limits())
        assert (await ask(door)).status_code == 401
    async with http_door(is_open=False) as door:
        assert (await ask(door)).status_code == 401


async def test_only_good_keys_are_let_in(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with http_door() as door:
        good, secret = door.keys.create("good", Limits())
        expired = door.keys.create("expired", Limits(expires_s=time.time() - 1))[1]
        revoked = door.keys.create("revoked", Limits())[1]
        other = door.keys.create("other", Limits(models=("llama",)))[1]
        door.keys.revoke("revoked")

        assert (await ask(door, secret)).status_code == 200
        for bad in ("", "nonsense", expired, revoked, secret[:-1], f"{secret}\x80"):
            refused = await ask(door, bad)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        assert (await ask(door, other)).status_code == 403
        async with httpx.AsyncClient(base_url=door.url) as client:
            for path in ("/v1/models", "/v1/models/parrot", "/api/tags", "/metrics"):
                assert (await client.get(path)).status_code == 401
                answer = await client.get(path, headers={"x-api-key": secret})
                assert answer.status_code == 200
            for path in ("/healthz", "/readyz"):
                assert (await client.get(path)).status_code == 200
    used = [record.getMessage() for record in caplog.records if good.id in record.getMessage()]
    assert len(used) == 1
    assert "good" in used[0]
    assert not any(s in caplog.text for s in (secret, expired, revoked, other))


async def test_answers_of_a_key_at_the_same_time_are_limited() -> None:
    async with http_door() as door:
        _, secret = door.keys.create("a", Limits(most_running=1))
        headers = {"Authorization": f"Bearer {secret}"}
        async with httpx.AsyncClient(base_url=door.url, headers=headers) as client:
            body = {"messages": [{"role": "user", "content": "hold"}], "stream": True}
            asking = asyncio.create_task(client.post(CHAT, json=body))
            await until(lambda: door.head.live == 1, "an answer runs")
            refused = await ask(door, secret)
            asking.cancel()
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        await until(lambda: door.head.live == 0, "it has ended")
        assert (await ask(door, secret)).status_code == 200


async def until(condition: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(cluster.until, condition, what, 10.0)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A PEM file with a key and a certificate that this key has signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "studio")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / "pair.pem"
    file.write_bytes(
        signed.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return file


async def test_with_a_certificate_the_door_speaks_tls_alone(certificate: Path) -> None:
    async with http_door(tls=tls_of(certificate)) as door:
        trusting = ssl.create_default_context(cafile=str(certificate))
        door.url = door.url.replace("127.0.0.1", "localhost")
        assert (await ask(door, verify=trusting)).status_code == 200
        door.url = door.url.replace("https", "http")
        with pytest.raises(httpx.HTTPError):
            await ask(door)


def test_a_file_without_a_certificate_is_named(certificate: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.pem"
    alone.write_text(certificate.read_text().partition("-----BEGIN PRIVATE")[0])
    for file in (alone, tmp_path / "missing.pem", tmp_path):
        with pytest.raises(InputError, match=f"--http-cert {file}: "):
            tls_of(file)


def test_the_command_shows_a_secret_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNICLUSTER_HOME", str(tmp_path))
    key.create("a guest", 2, 20_000, "demo, llama", "30d")
    secret = capsys.readouterr().out.strip()
    key.show()
    listed = capsys.readouterr().out
    key.revoke("a guest")
    key.show()

    assert re.search(r"^a guest +[0-9a-f]{8} +good .* 2 +20000 +demo, llama$", listed, re.M)
    assert secret not in listed
    assert "revoked" in capsys.readouterr().out
    for requests, tokens, models in ((0, None, None), (None, 0, None), (None, None, ",")):
        with pytest.raises(InputError):
            key.create("b", requests, tokens, models, None)
