"""Fleets as people write them, and the catalogue of machines."""

from pathlib import Path

import pytest

from coordinator.fleet.fleet import parse, with_links, with_memory
from coordinator.planning.hardware import GIB, boxes, find, known_compute
from coordinator.planning.links import LINKS
from unicluster.errors import InputError


def test_machines_are_counted_and_numbered() -> None:
    names = [m.name for m in parse("2x mac-studio-m3-ultra-512, framework-desktop-128").machines]

    assert names == [
        "mac-studio-m3-ultra-512-1",
        "mac-studio-m3-ultra-512-2",
        "framework-desktop-128",
    ]


def test_one_memory_option_need_not_be_said() -> None:
    assert parse("dgx-spark").machines[0].name == "dgx-spark-128"


def test_an_unknown_machine_gets_the_closest_names() -> None:
    with pytest.raises(InputError, match=r"no hardware 'mac-studio-m3-ultra': did you mean .*-96"):
        parse("mac-studio-m3-ultra")


def test_a_pair_is_as_fast_as_its_slower_port() -> None:
    fleet = parse("mac-studio-m3-ultra-512, framework-desktop-128")
    one, other = fleet.machines

    link = fleet.network.between(one.name, other.name, (one.link, other.link))

    assert link == LINKS["5gbe"]


def test_links_and_memory_are_set_for_all_or_for_some() -> None:
    fleet = parse("2x framework-desktop-128, dgx-spark")
    pair = "framework-desktop-128-1:framework-desktop-128-2=tb4"

    fleet = with_links(fleet, ["1gbe", pair])
    fleet = with_memory(fleet, ["100GB", "dgx-spark-128=90GB"])

    assert fleet.network.between("framework-desktop-128-1", "dgx-spark-128").name == "1gbe"
    assert fleet.network.between(*sorted(m.name for m in fleet.machines)[1:]).name == "tb4"
    assert [m.usable for m in fleet.machines] == [100e9, 100e9, 90e9]


FILE = """
link: 10gbe
machines:
  - {hardware: mac-studio-m3-ultra-256, name: studio}
  - {name: tower, usable: 90GB, bandwidth: 936 GB/s, compute: 71, count: 2}
links:
  - {between: [studio, tower-2], latency: 4ms, bandwidth: 50 MB/s}
"""


def test_a_file_describes_machines_and_the_links_between_them(tmp_path: Path) -> None:
    (tmp_path / "home.yaml").write_text(FILE)

    fleet = parse(str(tmp_path / "home.yaml"))

    assert [m.name for m in fleet.machines] == ["studio", "tower-1", "tower-2"]
    assert [speeds.bandwidth for speeds in fleet.machines[1].engines.values()] == [936e9] * 2
    assert fleet.network.between("tower-2", "studio").latency_s == 4e-3
    assert fleet.network.between("tower-1", "studio") == LINKS["10gbe"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("machines: 3", "needs a list `machines`"),
        ("machines: [{name: a}]", "a: give its hardware, or memory and bandwidth"),
        ("machines: [{hardware: dgx-spark, ram: 3}]", "a machine has no ram"),
        ("machines: [{hardware: dgx-spark}]\nlinks: [{between: [a, b], link: tb5}]", "no machine"),
        ("machines: [", "no YAML"),
        ("machines: []", "at least one machine"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_name(
    text: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)

    with pytest.raises(InputError, match=said) as refused:
        parse(str(path))

    assert str(path) in str(refused.value)


@pytest.mark.parametrize("box", boxes().values(), ids=lambda box: box.name)
def test_every_machine_of_the_catalogue_is_plausible_and_has_a_source(box) -> None:  # type: ignore[no-untyped-def]
    assert box.source
    assert box.link in LINKS
    assert 0.5 * box.memory < box.usable < box.memory
    assert 60e9 < box.bandwidth < 2000e9


def test_a_mac_offers_three_quarters_of_its_memory() -> None:
    assert find("mac-studio-m3-ultra-512").usable == 384 << 30


def test_the_compute_of_a_chip_is_known_by_its_name() -> None:
    assert known_compute("Apple M3 Ultra") == 21.5e12  # the lesser of its two GPUs
    assert known_compute("nobody's") == 0.0


def test_strix_halo_has_a_backend_for_each_engine() -> None:
    (box,) = parse("framework-desktop-128").machines
    (studio,) = parse("mac-studio-m3-ultra-512").machines

    assert (box.engines["mlx"].backend, box.engines["ggml"].backend) == ("cpu", "vulkan")
    assert box.engines["mlx"].bandwidth == 128e9
    assert box.engines["ggml"].bandwidth == 256e9
    assert studio.engines["ggml"].backend == studio.engines["mlx"].backend == "metal"


@pytest.mark.parametrize("family", ["framework-desktop", "bosgame-m5", "hp-zbook-ultra"])
def test_strix_halo_can_be_set_up_in_two_ways(family: str) -> None:
    raised, carved = parse(f"{family}-128, {family}-128-carved").machines

    assert raised.reach("ggml") == raised.reach("mlx") == 120e9
    # 96 GiB and GTT of half the rest, less 5 % of all; the cores have the rest, less 2 GiB.
    assert carved.reach("ggml") == (96 + 16) * GIB - 128 * GIB // 20
    assert carved.reach("mlx") == 30 * GIB
    assert find(f"{family}-128-carved").price == 0


def test_a_file_says_what_engines_there_are_and_how_fast(tmp_path: Path) -> None:
    rows = "machines:\n- {hardware: dgx-spark, engines: [ggml]}\n"
    rows += "- {name: b, memory: 9GB, bandwidth: 200, mlx_bandwidth: 50}\n"
    (tmp_path / "fleet.yaml").write_text(rows)

    spark, box = parse(str(tmp_path / "fleet.yaml")).machines

    assert tuple(spark.engines) == ("ggml",)
    assert (box.engines["mlx"].bandwidth, box.engines["ggml"].bandwidth) == (50e9, 200e9)
    (tmp_path / "odd.yaml").write_text("machines:\n- {hardware: dgx-spark, engines: [cuda]}\n")
    with pytest.raises(InputError, match="a list of mlx, ggml"):
        parse(str(tmp_path / "odd.yaml"))
