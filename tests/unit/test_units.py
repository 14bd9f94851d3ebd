import pytest

from unicluster.errors import InputError
from unicluster.units import format_bytes, format_rate, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("96GB", 96 * 10**9),
        ("96 gb", 96 * 10**9),
        ("96G", 96 * 10**9),
        ("1.5gb", 1_500_000_000),
        ("512MiB", 512 * 2**20),
        ("2TiB", 2 * 2**40),
        ("4096", 4096),
        ("0", 0),
    ],
)
def test_parses_what_people_write(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "96 parsecs", "1,5GB", "0x10", "\N{ARABIC-INDIC DIGIT ONE}GB", "nan"]
)
def test_refuses_what_is_no_amount(text: str) -> None:
    with pytest.raises(InputError, match="write it like 96GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (96 * 10**9, "96.0 GB"),
        (1_500_000_000_000, "1.5 TB"),
        (2 * 10**15, "2000.0 TB"),
        (-3_000_000, "-3.0 MB"),
    ],
)
def test_formats_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_formats_rates() -> None:
    assert format_rate(256e9) == "256 GB/s"
    assert format_rate(1.23e9) == "1.2 GB/s"
