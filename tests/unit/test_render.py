"""Contents of the tables, within the width of the terminal."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from coordinator.planning.machine import Device, EngineSpeeds, Machine
from coordinator.planning.planner import Layout, Plan, plan
from coordinator.planning.variants import ModelVariants
from coordinator.terminal.loading import LoadingBars
from coordinator.terminal.plan import fleet_table, nodes_table, plan_table
from tests.support.fleets import a_machine
from unicluster.v1 import node_pb2

GB = 10**9

LAYOUT = Layout(
    model_type="llama",
    layer_bytes=(5 * GB,) * 32,
    layer_active_bytes=(5 * GB,) * 32,
    head_bytes=2 * GB,
    kv_bytes_per_layer=(GB // 10,) * 32,
    context=8192,
    users=4,
    hidden_bytes=16384,
    quant="q4",
    max_context=131072,
)
STUDIO = a_machine(
    "studio [1]", 100 * GB, 819e9, address="192.168.1.21:7711", chip="Apple M3 Ultra"
)
STRIX = a_machine(
    "framework", 110 * GB, 256e9, address="192.168.1.30:7711", chip="AMD Ryzen AI Max+ 395"
)
BOX = a_machine(
    "box",
    50 * GB,
    128e9,
    address="192.168.1.32:7711",
    backend="cpu",
    ggml_backend="vulkan",
    ggml_bandwidth=256e9,
)
AIR = a_machine(
    "air-of-ann",
    4 * GB,
    100e9,
    address="192.168.1.31:7711",
    chip="Apple M2",
    backend="metal",
)


def printed(item: RenderableType, width: int = 120, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding), width=width)
    console.print(item)
    console.file.flush()
    return raw.getvalue().decode(encoding)


def the_plan() -> Plan:
    return plan(LAYOUT, [STUDIO, STRIX, AIR])


def an_info(name: str, **about: object) -> node_pb2.NodeInfo:
    known = {"chip": "Apple M3 Ultra", "backend": "metal", "version": "0.1.0", "bandwidth": 819e9}
    info = node_pb2.NodeInfo(name=name, usable_memory=460 * GB, total_memory=512 * GB)
    for field, value in (known | about).items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize("width", [80, 120])
def test_a_plan_says_who_holds_what_and_how_fast_that_is(width: int) -> None:
    shown = printed(plan_table(the_plan(), LAYOUT, "llama-70b q8"), width)
    for part in ("llama-70b q8: context 8192, 4 users, latency", "studio [1]", "Apple M3 Ultra"):
        assert part in shown
    for stage in the_plan().stages:
        assert f"{stage.first}-{stage.end - 1}" in shown
    assert "predicted" in shown
    assert "for one user" in shown
    assert "air-of-ann: 4.0 GB usable, and a layer needs 5.4 GB" in shown
    assert max(map(len, shown.splitlines())) <= width


@pytest.mark.parametrize("width", [80, 120])
def test_tables_keep_figures_and_addresses_whole(width: int) -> None:
    fleet = printed(fleet_table([STUDIO, STRIX, AIR]), width)
    nodes = printed(nodes_table([(an_info("studio"), STUDIO.address)]), width)
    assert "110.0 GB" in fleet
    assert "3 machines, 214.0 GB usable" in fleet
    assert "of 512.0 GB" in nodes
    assert all("192.168.1.21:7711" in shown for shown in (fleet, nodes))


def test_nodes_say_what_they_serve_and_what_was_not_measured() -> None:
    serving = an_info("studio", bandwidth_measured=True)
    serving.stages.add(first_layer=0, end_layer=12)
    bare = an_info("bare", backend="none")
    shown = printed(nodes_table([(serving, "a:1"), (bare, "b:1")]))
    assert "0-11" in shown
    assert "no MLX" in shown
    assert shown.count("819 GB/s*") == 1


def test_versions_are_shown_in_a_narrow_terminal_when_they_differ() -> None:
    same = nodes_table([(an_info("a"), "a:1"), (an_info("b"), "b:1")])
    differ = nodes_table([(an_info("a"), "a:1"), (an_info("b", version="0.2.0"), "b:1")])
    assert "0.1.0" not in printed(same, 80)
    assert "0.2.0" in printed(differ, 80)


def test_bars_are_drawn_in_ascii_where_nothing_else_prints() -> None:
    shown = printed(plan_table(the_plan(), LAYOUT, "llama"), encoding="ascii")
    assert "# weights" in shown
    assert "####" in shown


def test_without_a_terminal_there_are_no_colours() -> None:
    assert "\x1b" not in printed(plan_table(the_plan(), LAYOUT, "llama"))


def test_without_a_terminal_loading_is_a_line_for_each_change() -> None:
    out = io.StringIO()
    found = the_plan()
    first, second = (stage.machine.name for stage in found.stages)
    with LoadingBars(found, Console(file=out, width=80)) as loading:
        for done in range(3):
            loading.update(first, node_pb2.LoadProgress(layers_done=done, layers_total=19))
        loading.ready(first)
        loading.failed(second, f"machine {second}: out of memory")
    lines = out.getvalue().splitlines()
    assert lines[0].startswith(f"{first}: loading layers 0-")
    assert lines[1].startswith(f"{first}: ready after ")
    assert lines[2:] == [f"machine {second}: out of memory"]


def test_a_worker_that_loads_again_says_so() -> None:
    out = io.StringIO()
    found = the_plan()
    name = found.stages[0].machine.name
    with LoadingBars(found, Console(file=out, width=80)) as loading:
        loading.failed(name, "worker ended: signal 9")
        loading.update(name, node_pb2.LoadProgress())
    assert "loading layers" in out.getvalue().splitlines()[1]


def test_in_a_terminal_each_machine_has_a_bar_with_layers_and_bytes() -> None:
    out = io.StringIO()
    found = the_plan()
    first, second = found.stages
    with LoadingBars(found, Console(file=out, width=100, force_terminal=True)) as loading:
        loading.ready(first.machine.name)
        loading.failed(second.machine.name, "machine framework: disk full")
    count = first.end - first.first
    assert f"{count}/{count}" in out.getvalue()
    assert "machine framework: disk full" in out.getvalue()


def test_what_is_reported_after_loading_is_not_shown() -> None:
    out = io.StringIO()
    found = the_plan()
    loading = LoadingBars(found, Console(file=out))
    with loading:
        pass
    loading.failed(found.stages[0].machine.name, "gone")
    assert out.getvalue() == ""


def test_a_plan_of_two_engines_says_which_is_where_and_why() -> None:
    boxes = [replace(BOX, name=f"box-{n}") for n in (1, 2)]
    variants = ModelVariants(
        LAYOUT, replace(LAYOUT, engine="ggml", quant="q4_0"), hypothetical=True
    )

    shown = printed(plan_table(plan(variants, [STUDIO, *boxes]), variants, "llama-70b q4"), 160)

    phrase = (
        "mlx on studio [1] (reads 655 GB/s there, like ggml); "
        "ggml on box-1, box-2 (reads 205 GB/s there, MLX 5.1)"
    )
    assert phrase in " ".join(shown.split())
    assert "assuming a GGUF of about the same size (q4_0); serve it with --gguf" in shown
    assert re.search(r"box-1 .* ggml ", shown)


def test_of_one_engine_nothing_is_said_unless_the_model_is_a_gguf() -> None:
    alone = printed(plan_table(the_plan(), LAYOUT, "it"))
    gguf = replace(LAYOUT, engine="ggml")
    shown = printed(plan_table(plan(gguf, [STUDIO, STRIX]), gguf, "it"))

    assert "engine" not in alone
    assert "ggml (llama.cpp), because the model is a GGUF" in shown


def test_a_fleet_shows_what_each_engine_gets_at() -> None:
    shown = printed(fleet_table([BOX, replace(BOX.only(["ggml"]), name="other")]))

    assert "cpu, vulkan (ggml)" in shown
    assert "128 GB/s, ggml 256 GB/s" in shown
    assert re.search(r"other .* vulkan \(ggml\) .* 256 GB/s", shown)


def test_machines_are_listed_with_the_engines_that_they_offer() -> None:
    only = an_info("box", backend="cpu", ggml_backend="vulkan")
    only.engines.append("ggml")
    both = an_info("spark", backend="cuda", ggml_backend="cuda")
    both.engines.extend(["mlx", "ggml"])

    shown = printed(nodes_table([(only, "box:1"), (both, "spark:1"), (an_info("old"), "old:1")]))

    assert re.search(r"box .* vulkan \(ggml\) ", shown)
    assert re.search(r"spark .* cuda +\d", shown)
    assert re.search(r"old .* metal +\d", shown)


def test_devices_are_listed_where_engines_reach_different_memories() -> None:
    carved = an_info("strix", usable_memory=30 * GB, total_memory=137 * GB)
    for engine, name, usable, kind in (("mlx", "CPU", 30, "cpu"), ("ggml", "Vulkan0", 113, "igpu")):
        carved.devices.add(
            engine=engine,
            name=name,
            description="Radeon 8060S",
            kind=kind,
            usable_memory=usable * GB,
            total_memory=(usable + 7) * GB,
            bandwidth=256e9,
        )
    for width in (80, 120):
        shown = printed(nodes_table([(carved, "a:1"), (an_info("studio"), "b:1")]), width)
        assert "2 machines, 573.0 GB usable" in shown
        devices = shown[shown.index("Devices") :]
        assert re.search(
            r"strix +Vulkan0: Radeon.* ggml +113\.0 GB +120\.0 GB +256 GB/s\*", devices
        )
        assert re.search(r"strix +CPU: Radeon.* mlx +30\.0 GB +37\.0 GB", devices)
        assert "studio" not in devices
        assert max(map(len, shown.splitlines())) <= width
    fleet = printed(fleet_table([Machine.from_proto(carved, "a:1")]))
    assert re.search(r"113\.0 GB.*\n.*mlx 30\.0 GB", fleet)


def test_a_stage_on_two_devices_says_which_layers_are_where() -> None:
    devices = (Device("CUDA0", 44 * GB, 1008e9), Device("CUDA1", 90 * GB, 900e9))
    host = Machine("host", "a:1", 134 * GB, {"ggml": EngineSpeeds.of(devices, "cuda")})
    layout = replace(LAYOUT, engine="ggml", layer_bytes=(2 * GB,) * 32)
    shown = printed(plan_table(plan(layout, [host]), layout, "llama"))
    assert "host: CUDA0 0-19, CUDA1 20-31" in shown
