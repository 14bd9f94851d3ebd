"""Descriptions of machines: what no machine has, or what would garble a table, is named."""

import math
from typing import Any

import pytest

from coordinator.fleet.descriptions import MOST_DEVICES, nonsense
from unicluster.v1.node_pb2 import Device, NodeInfo

GOOD: dict[str, Any] = {
    "name": "ann",
    "chip": "Apple M3 Ultra",
    "total_memory": 512 << 30,
    "usable_memory": 400 << 30,
    "bandwidth": 819e9,
    "clock": 1.8e9,
    "devices": [Device(engine="mlx", name="GPU0", bandwidth=819e9)],
}


def test_a_machine_as_it_is() -> None:
    assert nonsense(NodeInfo(**GOOD)) is None
    assert nonsense(NodeInfo(name="old")) is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"bandwidth": math.nan}, "a bandwidth of nan"),
        ({"bandwidth": -1.0}, "a bandwidth of -1"),
        ({"ggml_bandwidth": math.inf}, "a bandwidth of inf"),
        ({"devices": [Device(bandwidth=math.nan)]}, "a bandwidth of nan"),
        ({"devices": [Device(usable_memory=1 << 63)]}, "a memory of 9223372036854775808 bytes"),
        ({"devices": [Device()] * (MOST_DEVICES + 1)}, "65 devices"),
        ({"devices": [Device(description="\x1b[2J")]}, "a text of 4 characters"),
        ({"usable_memory": (1 << 64) - 1}, "a memory of"),
        ({"clock": math.nan}, "a clock at nan"),
        ({"chip": "a\nb"}, "a text of 3 characters that begins with 'a\\nb'"),
        ({"platform": "x" * 100_000}, "a text of 100000 characters"),
        ({"engines": ["mlx", "\x07"]}, "a text of 1 characters"),
    ],
)
def test_nonsense_is_named_in_one_printable_line(fields: dict[str, Any], named: str) -> None:
    reason = nonsense(NodeInfo(**{**GOOD, **fields}))

    assert reason is not None
    assert reason.startswith(named)
    assert reason.isprintable()
