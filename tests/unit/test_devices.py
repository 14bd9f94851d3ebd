"""Devices of machines of each kind: which memory each reaches, and what stages leave of it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from node.agent.host_memory import GIB, MIB, reserve
from node.agent.ledger import Ledger
from node.agent.probe import Hardware, probe
from node.ggml.library import Listed
from tests.support.hosts import (
    NVIDIA_SMI,
    RADV,
    amd_card,
    commands,
    linux,
    look,
    strix_halo,
    write,
)
from unicluster.errors import DoesNotFitError, InputError
from unicluster.v1.node_pb2 import DeviceShare, StageSpec

FIRST_CARD, SECOND_CARD = "0000:01:00.0", "0000:02:00.0"
APU = replace(RADV, pci="0000:c4:00.0")


def cuda(number: int, pci: str, name: str = "NVIDIA GeForce RTX 4090") -> Listed:
    return Listed(f"CUDA{number}", name, "gpu", pci, 23 * GIB, 24 * GIB)


def smi(*pcis: str, free: int = 24000) -> dict[str, str]:
    """Answer of nvidia-smi: cards of 24,564 MiB."""
    rows = [
        f"NVIDIA GeForce RTX 4090, 24564, {free}, 0000{pci.upper()}, GPU-{number}\n"
        for number, pci in enumerate(pcis)
    ]
    return {NVIDIA_SMI: "".join(rows)}


def usable(hardware: Hardware, cap: int | None = None, *held: StageSpec) -> dict[str, int]:
    """Bytes to offer by engine and device."""
    offers = Ledger(hardware, cap).usable(held)
    return {f"{device.engine} {device.name}": size for device, size in offers}


def on(engine: str, memory: int, **shares: int) -> StageSpec:
    """A stage of so many bytes, split over devices, with a layer on each."""
    devices = [DeviceShare(name=n, layers=1, memory=size) for n, size in shares.items()]
    return StageSpec(engine=engine, memory=memory, end_layer=len(devices), devices=devices)


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.agent.probe.measure_bandwidth", lambda _: 50e9)


def test_what_the_firmware_carved_out_is_the_gpus_and_the_rest_is_the_cores(
    tmp_path: Path,
) -> None:
    strix_halo(tmp_path, carved=96 * GIB, gtt=16 * GIB, available=30 * GIB)

    hardware = look(tmp_path, commands("cpu", ggml=[APU]))

    kept = 128 * GIB // 20
    assert usable(hardware) == {
        "mlx CPU": 30 * GIB - reserve(30 * GIB, 32 * GIB),
        "ggml Vulkan0": (95 + 14) * GIB - kept,
    }
    assert hardware.total_memory == 128 * GIB
    assert [device.total for device in hardware.devices] == [32 * GIB, 112 * GIB]


def test_with_a_raised_gtt_both_engines_reach_nearly_all_but_not_at_once(tmp_path: Path) -> None:
    strix_halo(tmp_path, carved=GIB // 2, gtt=120 * GIB, available=110 * GIB)
    seen = replace(APU, total=GIB // 2 + 120 * GIB)
    hardware = look(tmp_path, commands("cpu", ggml=[seen]))

    # GTT would map 118 GiB, but other programs leave 110; its half GiB of its own is used.
    kept = 128 * GIB // 20
    assert usable(hardware)["ggml Vulkan0"] == 110 * GIB - kept
    ledger = Ledger(hardware, None)
    held = [on("ggml", 100 * GIB, Vulkan0=1)]
    with pytest.raises(DoesNotFitError, match=r"can give 30\.1 GB more"):  # of 127.5 GiB
        ledger.check(on("mlx", 60 * GIB), held)
    ledger.check(on("mlx", 25 * GIB), held)


def test_a_gtt_of_half_the_memory_is_all_that_the_gpu_maps(tmp_path: Path) -> None:
    strix_halo(tmp_path, carved=GIB // 2, gtt=64 * GIB, available=120 * GIB)

    offers = usable(look(tmp_path, commands("cpu", ggml=[replace(APU, total=65 * GIB)])))

    assert offers["ggml Vulkan0"] == 62 * GIB - 128 * GIB // 20
    assert offers["mlx CPU"] > 110 * GIB


@pytest.mark.parametrize("module", ["ttm", "amdttm"])
def test_what_ttm_allows_limits_a_larger_gtt(module: str, tmp_path: Path) -> None:
    strix_halo(tmp_path, carved=GIB // 2, gtt=120 * GIB, available=120 * GIB)
    write(tmp_path, f"sys/module/{module}/parameters/pages_limit", 32 * GIB // 4096)

    offers = usable(look(tmp_path, commands("cpu", ggml=[APU])))

    assert offers["ggml Vulkan0"] == 30 * GIB - 128 * GIB // 20


def test_rocm_takes_the_carve_out_or_gtt_as_llama_cpp_says(tmp_path: Path) -> None:
    strix_halo(tmp_path, carved=GIB // 2, gtt=120 * GIB, available=120 * GIB)
    rocm = Listed("ROCm0", "AMD Radeon Graphics", "igpu", APU.pci, 100 * GIB, 120 * GIB)
    hardware = look(tmp_path, commands("cpu", ggml=[rocm, APU]))

    (device,) = hardware.of("ggml")  # the APU is not counted again for Vulkan
    assert (device.backend, device.total, device.alone) == ("rocm", 120 * GIB, 0)
    carved = strix_halo(tmp_path / "carved", carved=96 * GIB, gtt=16 * GIB)
    (device,) = look(carved, commands("cpu", ggml=[replace(rocm, total=96 * GIB)])).of("ggml")
    assert (device.total, device.alone) == (96 * GIB, 96 * GIB)


def test_a_host_with_a_card_offers_the_card_to_ggml_and_its_own_memory_to_mlx(
    tmp_path: Path,
) -> None:
    linux(tmp_path, total=128 * GIB, available=120 * GIB)
    run = commands("cpu", ggml=[cuda(0, FIRST_CARD)], **smi(FIRST_CARD))

    hardware = look(tmp_path, run)

    assert usable(hardware) == {
        "mlx CPU": 120 * GIB - 128 * GIB // 20,
        "ggml CUDA0": 24000 * MIB - 2 * GIB,
    }
    assert hardware.ggml_bandwidth == 1008e9
    assert hardware.bandwidth_measured


def test_each_card_has_its_memory(tmp_path: Path) -> None:
    linux(tmp_path)
    listed = [cuda(0, SECOND_CARD), cuda(1, FIRST_CARD)]
    rows = smi(FIRST_CARD, SECOND_CARD)[NVIDIA_SMI].replace("24000, 00000000:02", "9000, 0:02", 1)
    run = commands("cpu", ggml=listed, **{NVIDIA_SMI: rows.replace("0:02", "0000:02")})

    offers = usable(look(tmp_path, run))

    assert offers["ggml CUDA0"] == 9000 * MIB - 2 * GIB
    assert offers["ggml CUDA1"] == 24000 * MIB - 2 * GIB


def test_a_card_and_an_apu_are_two_devices_of_which_some_may_be_chosen(tmp_path: Path) -> None:
    strix_halo(tmp_path, carved=GIB // 2, gtt=100 * GIB, available=110 * GIB)
    radeon = Listed(
        "Vulkan1", "AMD Radeon RX 7900 XTX (RADV NAVI31)", "gpu", FIRST_CARD, 23 * GIB, 24 * GIB
    )
    amd_card(tmp_path, "card0", 24 * GIB, 64 * GIB, pci=FIRST_CARD)
    hardware = look(tmp_path, commands("cpu", ggml=[replace(APU, total=100 * GIB), radeon]))

    devices = hardware.of("ggml")
    assert [(d.name, d.kind, d.bandwidth) for d in devices] == [
        ("Vulkan1", "gpu", 960e9),
        ("Vulkan0", "igpu", 256e9),
    ]
    offers = usable(hardware)
    assert offers["ggml Vulkan1"] == 21 * GIB  # the GTT of a card is not its memory
    assert offers["ggml Vulkan0"] == 98 * GIB - 128 * GIB // 20
    alone = hardware.offering("ggml", ["vulkan1"])
    assert list(usable(alone)) == ["ggml Vulkan1"]
    assert alone.engines == ["ggml"]


def test_a_device_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    run = commands("cpu", ggml=[cuda(0, FIRST_CARD)], **smi(FIRST_CARD))
    hardware = look(linux(tmp_path), run)

    named = r"--device cuda7: this machine has CPU \(Some CPU\), CUDA0 \(NVIDIA GeForce RTX 4090\)"
    with pytest.raises(InputError, match=named):
        hardware.offering("auto", ["CUDA7"])
    assert list(usable(hardware.offering("auto", ["cpu"]))) == ["mlx CPU", "ggml CPU"]


def test_a_card_that_cuda_and_vulkan_reach_is_one_device(tmp_path: Path) -> None:
    vulkan = Listed("Vulkan0", "NVIDIA GeForce RTX 4090", "gpu", FIRST_CARD, 23 * GIB, 24 * GIB)
    run = commands("cuda", ggml=[cuda(0, FIRST_CARD), vulkan], **smi(FIRST_CARD))

    hardware = look(linux(tmp_path), run)

    assert list(usable(hardware)) == ["mlx CUDA0", "ggml CUDA0"]
    ledger = Ledger(hardware, None)
    with pytest.raises(DoesNotFitError, match=r"can give 4\.3 GB more"):
        ledger.check(on("ggml", 5 * GIB), [on("mlx", 24564 * MIB - 4 * GIB)])


def test_mlx_computes_on_one_card_which_is_the_chosen_one(tmp_path: Path) -> None:
    gpus = [
        {
            "device_name": "NVIDIA GeForce RTX 4090",
            "uuid": f"GPU-{number}",
            "total_memory": 24 * GIB,
        }
        for number in (1, 0)  # CUDA's order is not that of the addresses
    ]
    run = commands("cuda", gpus, [], **smi(FIRST_CARD, SECOND_CARD))
    hardware = look(linux(tmp_path), run)

    (first,) = hardware.of("mlx")
    (second,) = hardware.offering("auto", ["CUDA1"]).of("mlx")
    assert (first.pci, first.environment) == (SECOND_CARD, {"CUDA_VISIBLE_DEVICES": "GPU-1"})
    assert (second.pci, second.environment) == (FIRST_CARD, {"CUDA_VISIBLE_DEVICES": "GPU-0"})
    assert Ledger(hardware, None).parts(on("mlx", 7))[0].device == first


def test_memory_of_the_host_is_not_counted_for_two_devices_at_once(tmp_path: Path) -> None:
    strix_halo(tmp_path, carved=GIB // 2, gtt=60 * GIB, available=100 * GIB)
    run = commands("cpu", ggml=[replace(APU, total=60 * GIB)])

    offers = usable(look(tmp_path, run).offering("ggml", ["Vulkan0", "CPU"]))

    assert sum(offers.values()) <= 100 * GIB + GIB // 2


def test_what_only_llama_cpp_knows_of_a_card_is_what_it_said_less_the_stages(
    tmp_path: Path,
) -> None:
    arc = Listed("Vulkan0", "Intel(R) Arc(tm) B580 Graphics (BMG G21)", "gpu", "", 11 * GIB, GIB)
    arc = replace(arc, total=12 * GIB)
    hardware = look(linux(tmp_path), commands("cpu", ggml=[arc]))

    assert usable(hardware)["ggml Vulkan0"] == 9 * GIB
    held = on("ggml", 4 * GIB)
    assert usable(hardware, None, held)["ggml Vulkan0"] == 7 * GIB - reserve(7 * GIB, 12 * GIB)
    assert hardware.ggml_bandwidth == 456e9


def test_a_gpu_in_the_hosts_memory_that_no_driver_counts_has_what_is_free_there(
    tmp_path: Path,
) -> None:
    intel = Listed("Vulkan0", "Intel(R) Iris(R) Xe Graphics", "igpu", "0000:00:02.0", 1, 30 * GIB)
    linux(tmp_path, total=32 * GIB, available=20 * GIB)

    hardware = look(tmp_path, commands("cpu", ggml=[intel]))

    assert usable(hardware)["ggml Vulkan0"] == 18 * GIB
    assert hardware.devices[-1].kind == "igpu"


def test_vulkan_on_the_cpu_is_the_cpu(tmp_path: Path) -> None:
    lavapipe = Listed("Vulkan0", "llvmpipe (LLVM 19.1.7, 256 bits)", "gpu", "", 1, 64 * GIB)
    linux(tmp_path, total=32 * GIB, available=20 * GIB)

    hardware = look(tmp_path, commands("cpu", ggml=[lavapipe]))

    (device,) = hardware.of("ggml")
    assert (device.kind, device.total, device.alone) == ("cpu", 32 * GIB, 0)
    assert usable(hardware)["ggml Vulkan0"] == usable(hardware)["mlx CPU"]


def test_metal_is_one_memory_for_both_engines(tmp_path: Path) -> None:
    metal = Listed("MTL0", "Apple M4 Max", "gpu", "", 48 * GIB, 48 * GIB)
    run = commands(
        "metal",
        [{"max_recommended_working_set_size": 48 * GIB}],
        [metal],
        **{"sysctl -n hw.memsize": f"{64 * GIB}\n"},
    )
    hardware = probe(root=tmp_path, run=run, system="darwin")

    assert usable(hardware) == {"mlx Metal": 48 * GIB, "ggml MTL0": 48 * GIB}
    with pytest.raises(DoesNotFitError, match=r"can give 8\.6 GB more"):
        Ledger(hardware, None).check(on("ggml", 9 * GIB), [on("mlx", 40 * GIB)])


def test_gb10_is_in_the_hosts_memory(tmp_path: Path) -> None:
    linux(tmp_path, total=120 * GIB, available=110 * GIB)
    gb10 = Listed("CUDA0", "NVIDIA GB10", "igpu", "000f:01:00.0", 1, 119 * GIB)
    answer = {NVIDIA_SMI: "NVIDIA GB10, [N/A], [N/A], 0000000F:01:00.0, GPU-1\n"}

    hardware = look(tmp_path, commands("cuda", ggml=[gb10], **answer))

    assert usable(hardware) == {"mlx CUDA0": 104 * GIB, "ggml CUDA0": 104 * GIB}
    assert {device.unit for device in hardware.devices} == {"000f:01:00.0"}


def two_cards(tmp_path: Path) -> Hardware:
    listed = [cuda(0, FIRST_CARD), cuda(1, SECOND_CARD)]
    return look(linux(tmp_path), commands("cpu", ggml=listed, **smi(FIRST_CARD, SECOND_CARD)))


def test_a_split_is_counted_on_each_of_its_devices(tmp_path: Path) -> None:
    ledger = Ledger(two_cards(tmp_path), None)
    held = [on("ggml", 30, CUDA0=20 * GIB, CUDA1=2 * GIB)]

    with pytest.raises(DoesNotFitError, match="CUDA0 can give"):
        ledger.check(on("ggml", 8, CUDA0=5 * GIB, CUDA1=3 * GIB), held)
    ledger.check(on("ggml", 8, CUDA0=3 * GIB, CUDA1=5 * GIB), held)
    ledger.check(on("ggml", 20 * GIB, CUDA1=20 * GIB), held)
    ledger.check(on("mlx", 100 * GIB), held)  # in the host's memory


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (on("ggml", 1, CUDA9=1), "device 'CUDA9': this machine offers CUDA0, CUDA1"),
        (on("mlx", 1, CUDA0=1), "device 'CUDA0': this machine offers CPU"),
        (on("warp", 1), "no engine 'warp' is offered here: there is mlx, ggml"),
        (
            StageSpec(engine="ggml", end_layer=3, devices=on("ggml", 1, CUDA0=1, CUDA1=1).devices),
            "their layers are not those of the stage",
        ),
        (
            StageSpec(
                engine="ggml", end_layer=2, devices=[DeviceShare(name="CUDA0", layers=1)] * 2
            ),
            "no split for ggml: 2 shares",
        ),
    ],
)
def test_a_stage_on_devices_that_make_no_sense_is_refused(
    spec: StageSpec, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        Ledger(two_cards(tmp_path), None).check(spec, [])


def test_the_cap_is_for_all_devices_together(tmp_path: Path) -> None:
    hardware = two_cards(tmp_path)

    assert usable(hardware, 30 * GIB) == {
        "mlx CPU": 30 * GIB,
        "ggml CUDA0": 24000 * MIB - 2 * GIB,
        "ggml CUDA1": 30 * GIB - (24000 * MIB - 2 * GIB),
    }
    held: Sequence[StageSpec] = [on("mlx", 25 * GIB)]
    assert set(usable(hardware, 30 * GIB, *held).values()) == {5 * GIB, 0}
    with pytest.raises(DoesNotFitError, match=r"can give 5\.4 GB more"):
        Ledger(hardware, 30 * GIB).check(on("ggml", 6 * GIB), held)
