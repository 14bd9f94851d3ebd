"""mDNS records as anybody on the network may send them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unicluster.cluster.records import MOST_ADDRESSES, Kind, parse_record, service_name_of

CLUSTER = "0123456789abcdef"
NAME = service_name_of(Kind.NODE, "studio", CLUSTER)
AT = [("192.168.1.7", 47600)]


def txt(**fields: str | bytes) -> dict[bytes, bytes | None]:
    known: dict[str, str | bytes] = {"name": "studio", "cluster": CLUSTER, "memory": "128"}
    return {
        key.encode(): value if isinstance(value, bytes) else value.encode()
        for key, value in (known | fields).items()
    }


def test_a_good_record() -> None:
    endpoints = [*AT, ("fe80::1%en0", 7), ("192.168.1.7", 47600)]

    record = parse_record(Kind.NODE, NAME, endpoints, txt(chip="M4 Max"))

    assert record.addresses == ("192.168.1.7:47600", "[fe80::1%en0]:7")
    assert (record.name, record.fingerprint, record.memory) == ("studio", CLUSTER, 128)
    assert record.chip == "M4 Max"


def test_a_property_without_a_value_is_empty() -> None:
    assert parse_record(Kind.NODE, NAME, AT, txt() | {b"chip": None}).chip == ""


@pytest.mark.parametrize(
    "endpoints",
    [
        [],
        [("192.168.1.7", 0)],
        [("192.168.1.7", 65536)],
        [("0.0.0.0", 7)],
        [("224.0.0.251", 7)],
        [("::", 7)],
        [("example.org", 7)],
        [("", 7)],
    ],
)
def test_where_nobody_can_be(endpoints: list[tuple[str, int]]) -> None:
    with pytest.raises(ValueError, match="no valid address"):
        parse_record(Kind.NODE, NAME, endpoints, txt())


def test_a_bad_address_costs_that_address() -> None:
    endpoints = [("192.168.1.9", 0), ("nowhere", 1), *AT]

    assert parse_record(Kind.NODE, NAME, endpoints, txt()).addresses == ("192.168.1.7:47600",)


def test_addresses_are_bounded() -> None:
    endpoints = [(f"10.0.{a}.{b}", 7) for a in range(10) for b in range(1, 255)]

    assert len(parse_record(Kind.NODE, NAME, endpoints, txt()).addresses) == MOST_ADDRESSES


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "other"}, "whose it is not"),
        ({"name": ""}, "can't name a machine"),
        ({"name": "a/../b"}, "can't name a machine"),
        ({"cluster": "fedcba9876543210"}, "whose it is not"),
        ({"memory": "1e9"}, "invalid number"),
        ({"memory": "-1"}, "invalid number"),
        ({"memory": "9" * 30}, "invalid number"),
        ({"protocol": "\u0663"}, "invalid number"),
        ({"chip": "M4\x1b[2J"}, "invalid text"),
        ({"chip": "M4\nWARNING forged"}, "invalid text"),
        ({"chip": "\u202exaM"}, "invalid text"),
        ({"chip": b"\xff\xfe"}, "can't decode"),
        ({f"key{i}": "x" for i in range(40)}, "at most 32"),
    ],
)
def test_an_invalid_record(fields: dict[str, str | bytes], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parse_record(Kind.NODE, NAME, AT, txt(**fields))

    assert str(caught.value).isprintable()


@given(
    st.text(max_size=80),
    st.lists(st.tuples(st.text(max_size=40), st.integers(-1, 70000)), max_size=4),
    st.dictionaries(st.binary(max_size=20), st.none() | st.binary(max_size=300), max_size=40),
    st.sampled_from([{}, txt()]),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_whatever_is_sent_is_a_record_or_a_value_error(
    name: str,
    endpoints: list[tuple[str, int]],
    properties: dict[bytes, bytes | None],
    base: dict[bytes, bytes | None],
) -> None:
    try:
        record = parse_record(Kind.NODE, name or NAME, [*endpoints, *AT], base | properties)
    except ValueError:
        return

    assert record.name.isprintable()
    assert all(value.isprintable() for value in record.txt.values())
    assert 0 < len(record.addresses) <= MOST_ADDRESSES
