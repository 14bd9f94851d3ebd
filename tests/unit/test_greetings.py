"""Greetings of agents: accepted as they are sent, and refused in whole where a part is invalid."""

import os
import random
import time

import pytest
from google.protobuf.message import DecodeError

from tests.support.deadlines import scaled
from unicluster.cluster.channels import split_address
from unicluster.cluster.records import MOST_ADDRESSES
from unicluster.cluster.sizes import _METHODS, GREETING_BYTES, too_large
from unicluster.dialing.greetings import greeting_of, parse_greeting
from unicluster.errors import InputError
from unicluster.v1.node_pb2 import Greeting

CALLER = "192.168.1.7"
SECONDS = float(os.environ.get("UNICLUSTER_FUZZ_SECONDS", "2"))


def greeting(**changed: object) -> Greeting:
    made = greeting_of(47600, "", [f"{CALLER}:47600", "[fe80::1]:47600"], "0.1.0", 3, 2)
    for field, value in changed.items():
        made.ClearField(field)  # type: ignore[arg-type]
        made.MergeFrom(Greeting(**{field: value}))  # type: ignore[arg-type]
    return made


def test_what_an_agent_sends_is_accepted() -> None:
    said = parse_greeting(greeting(), "studio", CALLER)

    assert said.addresses == (f"{CALLER}:47600", "[fe80::1]:47600")
    assert (said.version, said.protocol, said.oldest) == ("0.1.0", 3, 2)


def test_an_older_agent_says_less() -> None:
    assert parse_greeting(Greeting(port=7), "studio", "::1").addresses == ("[::1]:7",)


def test_a_scope_is_not_the_callers_to_name() -> None:
    said = parse_greeting(greeting(host="fe80::1%en5"), "studio", "fe80::1%eth0")

    assert said.addresses[0] == "[fe80::1%eth0]:47600"


def test_scopes_are_not_told_to_others() -> None:
    assert greeting_of(1, "", ["[fe80::1%eth0]:1"], "", 0, 0).addresses == ["[fe80::1]:1"]


@pytest.mark.parametrize(
    "changed",
    [
        {"port": 0},
        {"port": 65536},
        {"host": "studio.local"},
        {"host": "0.0.0.0"},
        {"host": "224.0.0.251"},
        {"host": "10.0.0.1\n"},
        {"host": "fe80::1%\x1b[2J"},
        {"version": "1.0\nERROR forged"},
        {"version": "1" * 65},
        {"protocol": 1 << 16},
        {"oldest_protocol": 4},
        {"addresses": ["10.0.0.1:0"]},
        {"addresses": ["10.0.0.1"]},
        {"addresses": ["10.0.0.1:1", "evil.example:1"]},
        {"addresses": ["[fe80::1%\r\n]:1"]},
        {"addresses": ["10.0.0.1:1"] * 2},
        {"addresses": [f"10.0.0.{n}:1" for n in range(MOST_ADDRESSES + 1)]},
    ],
)
def test_one_invalid_part_costs_the_greeting(changed: dict[str, object]) -> None:
    with pytest.raises(InputError) as error:
        parse_greeting(greeting(**changed), "studio", CALLER)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["", "a b", "x\nERROR", "x" * 49, "../../etc"])
def test_a_certificate_may_not_have_any_name(name: str) -> None:
    with pytest.raises(InputError):
        parse_greeting(greeting(), name, CALLER)


def test_large_greetings_are_not_parsed() -> None:
    most, descriptor = _METHODS["/unicluster.v1.Node/Greet"]
    large = greeting(version="v" * GREETING_BYTES).SerializeToString()

    assert "at most" in too_large(large, descriptor, most)
    assert not too_large(greeting().SerializeToString(), descriptor, most)


def test_whatever_is_sent_is_a_greeting_or_an_input_error() -> None:
    """For a bounded time, seeded: altered greetings, and altered fields of greetings."""
    chance = random.Random(15)
    until = time.monotonic() + min(SECONDS, scaled(30))
    accepted, reasons = 0, []
    while time.monotonic() < until:
        try:
            made = _altered(chance)
        except DecodeError:
            continue
        try:
            said = parse_greeting(made, "studio", CALLER)
        except InputError as error:
            reasons.append(str(error))
            continue
        accepted += 1
        assert 0 < len(said.addresses) <= MOST_ADDRESSES + 1
        assert (said.version + "".join(said.addresses)).isprintable()
        assert all(0 < split_address(address)[1] < 65536 for address in said.addresses)
    assert accepted > 100
    assert len(reasons) > 100
    assert all(reason.isprintable() and len(reason) < 400 for reason in reasons)


def _altered(chance: random.Random) -> Greeting:
    if chance.random() < 0.5:
        data = bytearray(greeting().SerializeToString())
        for _ in range(chance.randint(1, 4)):
            where = chance.randrange(len(data))
            cut = chance.choice([data[where:], data[:where], b""])
            data[where : where + chance.randint(0, 3)] = bytes([chance.randrange(256)])
            data += bytes(cut) if chance.random() < 0.2 else b""
        return Greeting.FromString(bytes(data))
    made = greeting()
    words = [
        "",
        "::1",
        "fe80::1%1",
        "10.0.0.1:1",
        "[::]:5",
        "\x00",
        "a" * 300,
        "\u0661:\u0661",
        "1.2.3.4%x:5",
    ]
    for _ in range(chance.randint(1, 3)):
        field = chance.choice(["port", "host", "version", "protocol", "addresses"])
        if field in ("port", "protocol"):
            setattr(made, field, chance.choice([0, 1, 47600, 65535, 65536, 2**32 - 1]))
        elif field == "addresses":
            made.addresses.append(chance.choice(words))
        else:
            setattr(made, field, chance.choice(words))
    return made
