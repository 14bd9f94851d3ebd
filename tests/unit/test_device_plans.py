"""Plans for machines whose engines have different memories, and several devices of one host."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.fleet.fleet import parse
from coordinator.fleet.measured import Measurements
from coordinator.planning.engines import DEFAULT
from coordinator.planning.links import Network
from coordinator.planning.machine import Device, EngineSpeeds, Machine
from coordinator.planning.placement import BANDWIDTH_SHARE, LAYER_S, Layout
from coordinator.planning.planner import plan
from coordinator.planning.shortfall import NoPlanError
from coordinator.planning.stages import Span, stages
from coordinator.planning.variants import ModelVariants
from tests.support.fleets import GB, a_layout, a_machine
from unicluster.errors import InputError
from unicluster.v1 import node_pb2
from unicluster.v1.node_pb2 import NodeInfo

CARD = Device("CUDA0", 22 * GB, 1000e9, chip="NVIDIA GeForce RTX 4090")
APU = Device("Vulkan0", 100 * GB, 250e9, chip="AMD Radeon 8060S")


def a_host(*devices: Device, mlx: int = 0) -> Machine:
    """A machine with these devices for ggml, and MLX on its cores if it has `mlx` bytes."""
    engines = {"mlx": EngineSpeeds(60e9, "cpu", usable=mlx)} if mlx else {}
    ggml = EngineSpeeds.of(devices, "cuda")
    usable = max(mlx, sum(device.usable for device in devices))
    return Machine("host", "", usable, {**engines, "ggml": ggml})


def a_gguf(layers: int, size: int = GB) -> Layout:
    return replace(a_layout([size] * layers), engine="ggml")


def test_a_stage_that_fits_into_the_faster_device_is_on_that_alone() -> None:
    (stage,) = plan(a_gguf(16), [a_host(APU, CARD)]).stages

    assert [(share.device, share.layers) for share in stage.shares] == [("CUDA0", 16)]
    assert stage.seconds_per_token == pytest.approx(
        16 * GB / (BANDWIDTH_SHARE * 1000e9) + 16 * LAYER_S
    )


def test_a_further_device_takes_what_is_left_over_and_its_time_counts() -> None:
    layout = a_gguf(50)
    (stage,) = plan(layout, [a_host(APU, CARD)]).stages

    on_card = layout.capacity(CARD.usable)
    seconds = on_card / 1000e9 + (50 * GB - on_card) / 250e9
    assert stage.seconds_per_token == pytest.approx(seconds / BANDWIDTH_SHARE + 50 * LAYER_S)
    assert [(s.device, s.layers) for s in stage.shares] == [("CUDA0", 21), ("Vulkan0", 29)]


def test_what_whole_layers_leave_over_on_a_device_is_not_counted_on() -> None:
    layout = a_gguf(3, 13 * GB)
    two = Device("CUDA0", 20 * GB, 1000e9), Device("CUDA1", 20 * GB, 1000e9)

    with pytest.raises(NoPlanError):  # 39 GB into 40: but one layer on each is all that goes
        plan(layout, [a_host(*two)])
    plan(layout, [a_host(replace(two[0], usable=40 * GB), two[1])])


@pytest.mark.parametrize("seed", range(40))
def test_no_device_gets_more_than_it_has(seed: int) -> None:
    dice = random.Random(seed)
    devices = [
        Device(f"D{i}", dice.randint(0, 40) * GB, dice.choice([100e9, 250e9, 1000e9]))
        for i in range(dice.randint(1, 4))
    ]
    sizes = [dice.randint(1, 40) * GB // 10 for _ in range(dice.randint(1, 30))]
    try:
        found = plan(replace(a_layout(sizes), engine="ggml"), [a_host(*devices)])
    except NoPlanError:
        alone = max(device.usable for device in devices)
        assert replace(a_layout(sizes), engine="ggml").needed(sum(sizes)) > alone
        return

    (stage,) = found.stages
    usable = {device.name: device.usable for device in devices}
    assert sum(share.layers for share in stage.shares) == len(sizes)
    assert all(share.bytes <= usable[share.device] for share in stage.shares)


def test_each_engine_is_planned_with_its_memory() -> None:
    carved = a_host(replace(APU, usable=96 * GB), mlx=30 * GB)

    (stage,) = plan(a_gguf(60), [carved]).stages
    assert stage.free_bytes == 96 * GB - stage.bytes
    with pytest.raises(NoPlanError, match=r"the machine offers 30\.0 GB"):
        plan(a_layout([GB] * 60), [carved])
    both = ModelVariants(a_layout([GB] * 60), a_gguf(60))
    assert plan(both, [carved]).engines == ("ggml",)


def test_memory_that_another_engine_has_is_no_help() -> None:
    host = a_host(CARD, mlx=120 * GB)

    assert host.usable == 120 * GB
    with pytest.raises(NoPlanError, match=r"the machine offers 22\.0 GB: [\d.]+ GB are missing"):
        plan(a_gguf(30), [host])


def test_machines_are_not_alike_whose_devices_differ() -> None:
    one = replace(a_host(CARD, replace(CARD, name="CUDA1")), name="pair")
    other = replace(a_host(replace(CARD, usable=44 * GB)), name="large")

    found = plan(a_gguf(21, 2 * GB), [one, other])

    assert [stage.machine.name for stage in found.stages] == ["large"]


def test_what_an_agent_says_of_its_devices() -> None:
    info = NodeInfo(name="ann", backend="cpu", usable_memory=7, bandwidth=5e9, engines=["mlx"])
    assert Machine.from_proto(info, "").usable == 7  # an older one

    for engine, name, usable, bandwidth in (
        ("mlx", "CPU", 30, 60e9),
        ("ggml", "Vulkan0", 100, 250e9),
        ("ggml", "CUDA0", 22, 1000e9),
    ):
        info.devices.add(
            engine=engine, name=name, usable_memory=usable, bandwidth=bandwidth, backend="x"
        )
    machine = Machine.from_proto(info, "there:1")

    assert machine.usable == 122
    assert (machine.reach("mlx"), machine.reach("ggml")) == (30, 122)
    assert [device.name for device in machine.engines["ggml"].devices] == ["CUDA0", "Vulkan0"]
    assert machine.engines["ggml"].bandwidth == 1000e9


def test_a_device_of_an_engine_that_is_not_known_is_left_out() -> None:
    info = NodeInfo(name="ann", devices=[node_pb2.Device(engine="warp", name="W", bandwidth=1)])
    assert Machine.from_proto(info, "").engines == {}


def test_stages_of_an_older_agent_name_no_devices() -> None:
    layout = a_layout([GB] * 2)
    (stage,) = stages(Network(), [Span(a_machine("old", 9 * GB, 1e9), 0, 2, layout)])
    assert stage.engine == DEFAULT
    assert stage.shares == ()


def test_the_compute_of_devices_is_that_of_their_chips(tmp_path: Path) -> None:
    twins = a_host(CARD, replace(CARD, name="CUDA1"))
    hosts = [twins, a_host(CARD, APU)]
    known = Measurements.load(tmp_path).fleet(hosts, "m", a_gguf(2)).machines

    assert known[0].engines["ggml"].devices[1].compute == 165e12
    layout = replace(a_gguf(40), layer_active_parameters=(10**9,) * 40)
    both, half_known = (plan(layout, [machine]).stages[0] for machine in known)
    assert (both.chunk_seconds or 0.0) > 0
    assert half_known.chunk_seconds is None


def test_fleet_files_state_memory_by_engine(tmp_path: Path) -> None:
    text = "machines:\n- {name: b, memory: 90GB, bandwidth: 200, mlx_usable: 30GB}\n"
    (tmp_path / "fleet.yaml").write_text(text)

    (box,) = parse(str(tmp_path / "fleet.yaml")).machines

    assert (box.reach("mlx"), box.reach("ggml"), box.usable) == (30 * GB, 90 * GB, 90 * GB)
    (tmp_path / "fleet.yaml").write_text(text.replace("mlx_usable", "warp_usable"))
    with pytest.raises(InputError, match="warp_usable"):
        parse(str(tmp_path / "fleet.yaml"))
