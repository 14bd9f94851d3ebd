"""Probes of machines that are not at hand: their chips, memory and bandwidth."""

from pathlib import Path

import pytest

from node.agent.chips import known_bandwidth
from node.agent.host_memory import GIB, MIB
from node.agent.probe import Hardware, measure_bandwidth, probe
from tests.support.hosts import NVIDIA_SMI, RADV, commands, linux, look, strix_halo, write


def test_a_plain_computer_keeps_a_reserve(tmp_path: Path) -> None:
    linux(tmp_path, "Intel(R) Core(TM) i9-14900K", total=64 * GIB, available=60 * GIB)

    hardware = look(tmp_path, commands("cpu"))

    assert hardware.chip == "Intel Core i9-14900K"
    assert hardware.backend == "cpu"
    assert hardware.total_memory == 64 * GIB
    assert hardware.usable_memory == 60 * GIB - 64 * GIB // 20


def test_a_small_computer_still_offers_something(tmp_path: Path) -> None:
    linux(tmp_path, total=4 * GIB, available=1 * GIB)

    assert look(tmp_path, commands("cpu")).usable_memory == 3 * GIB // 4


def test_the_cap_limits_what_is_usable(tmp_path: Path) -> None:
    linux(tmp_path)

    assert look(tmp_path, commands("cpu"), cap=5 * GIB).usable_memory == 5 * GIB


def test_available_follows_the_machine(tmp_path: Path) -> None:
    hardware = look(linux(tmp_path, total=100 * GIB, available=90 * GIB), commands("cpu"))

    linux(tmp_path, total=100 * GIB, available=50 * GIB)

    assert hardware.available() == 45 * GIB


def test_without_mlx_the_backend_is_none(tmp_path: Path) -> None:
    assert look(linux(tmp_path), commands(None)).backend == "none"


def test_a_control_group_limits_memory(tmp_path: Path) -> None:
    linux(tmp_path)
    write(tmp_path, "proc/self/cgroup", "0::/user.slice/agent.service")
    write(tmp_path, "sys/fs/cgroup/user.slice/memory.max", 16 * GIB)
    write(tmp_path, "sys/fs/cgroup/user.slice/memory.current", 6 * GIB)
    write(tmp_path, "sys/fs/cgroup/user.slice/memory.stat", f"anon 1\ninactive_file {2 * GIB}")
    write(tmp_path, "sys/fs/cgroup/user.slice/agent.service/memory.max", "max")

    hardware = look(tmp_path, commands("cpu"))

    assert hardware.total_memory == 16 * GIB
    assert hardware.usable_memory == (16 - 6 + 2 - 2) * GIB


def test_a_container_limits_memory(tmp_path: Path) -> None:
    linux(tmp_path)
    write(tmp_path, "proc/self/cgroup", "0::/")
    write(tmp_path, "sys/fs/cgroup/memory.max", 8 * GIB)

    assert look(tmp_path, commands("cpu")).total_memory == 8 * GIB


def test_strix_halo_with_a_gpu_build_reaches_gtt_and_vram(tmp_path: Path) -> None:
    hardware = look(strix_halo(tmp_path), commands("rocm"))

    reserve = 128 * GIB // 20
    assert hardware.total_memory == 128 * GIB
    assert hardware.usable_memory == (78 + 31) * GIB - reserve
    assert hardware.bandwidth == 256e9
    assert not hardware.bandwidth_measured


def test_strix_halo_on_the_cpu_has_the_hosts_memory_and_what_the_cores_reach(
    tmp_path: Path,
) -> None:
    hardware = look(strix_halo(tmp_path), commands("cpu"))

    assert hardware.chip == "AMD RYZEN AI MAX+ 395"
    assert hardware.total_memory == 96 * GIB
    assert hardware.bandwidth_measured


def test_llama_cpp_reaches_the_gpu_of_strix_halo(tmp_path: Path) -> None:
    hardware = look(strix_halo(tmp_path), commands("cpu", ggml=[RADV]))

    assert hardware.engines == ["mlx", "ggml"]
    assert (hardware.backend, hardware.ggml_backend) == ("cpu", "vulkan")
    assert hardware.ggml_bandwidth == 256e9
    assert hardware.offering("ggml").engines == ["ggml"]


def test_gb10_shares_the_hosts_memory(tmp_path: Path) -> None:
    linux(tmp_path, total=120 * GIB, available=110 * GIB)

    hardware = look(
        tmp_path,
        commands("cuda", **{NVIDIA_SMI: "NVIDIA GB10, [N/A], [N/A], 0000000F:01:00.0, GPU-1\n"}),
    )

    assert (hardware.chip, hardware.backend) == ("NVIDIA GB10", "cuda")
    assert hardware.total_memory == 120 * GIB
    assert hardware.usable_memory == 104 * GIB
    assert hardware.bandwidth == 273e9


def test_an_nvidia_card_offers_its_own_memory(tmp_path: Path) -> None:
    linux(tmp_path)
    answer = (
        "NVIDIA GeForce RTX 4090, 24564, 24000, 00000000:01:00.0, GPU-1\n"
        "NVIDIA GeForce RTX 3090, 24576, 24000, 00000000:02:00.0, GPU-2\n"
    )

    hardware = look(tmp_path, commands("cuda", **{NVIDIA_SMI: answer}))

    assert hardware.chip == "NVIDIA GeForce RTX 4090"
    assert hardware.total_memory == 24564 * MIB
    assert hardware.usable_memory == 24000 * MIB - 2 * GIB
    assert hardware.bandwidth == 1008e9


def test_an_nvidia_card_that_mlx_cant_use_is_left_alone(tmp_path: Path) -> None:
    linux(tmp_path)
    run = commands("cpu", **{NVIDIA_SMI: "NVIDIA GeForce RTX 4090, 24564, 24000, 0:1:0.0, GPU-1"})

    assert look(tmp_path, run).total_memory == 128 * GIB


def test_an_unknown_chip_is_measured(tmp_path: Path) -> None:
    hardware = look(linux(tmp_path, "Frobnicator 9000"), commands("cpu"))

    assert hardware.chip == "Frobnicator 9000"
    assert hardware.bandwidth_measured
    assert 1e8 < hardware.bandwidth < 1e13


def test_an_arm_board_without_a_model_name_is_no_error(tmp_path: Path) -> None:
    linux(tmp_path)
    write(tmp_path, "proc/cpuinfo", "processor\t: 0\nBogoMIPS\t: 2000.00")

    assert look(tmp_path, commands("cpu")).chip.endswith(" CPU")


VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                              2000000.
Pages active:                            1000000.
Pages inactive:                          3000000.
Pages speculative:                        100000.
Pages wired down:                         500000.
Pages purgeable:                           50000.
"Translation faults":                  123456789.
"""


def mac(
    chip: str, gpu_cores: int, memory: int, working_set: int | None, vm_stat: str = VM_STAT
) -> Hardware:
    run = commands(
        "metal",
        [{"max_recommended_working_set_size": working_set}] if working_set else [],
        **{
            "sysctl -n machdep.cpu.brand_string": f"{chip}\n",
            "sysctl -n hw.memsize": f"{memory}\n",
            "ioreg": f'  | "gpu-core-count" = {gpu_cores}\n',
            "vm_stat": vm_stat,
        },
    )
    return probe(run=run, system="darwin")


def test_a_mac_offers_what_metal_recommends() -> None:
    hardware = mac("Apple M4 Max", 40, memory=64 * GIB, working_set=48 * GIB)

    assert (hardware.chip, hardware.backend) == ("Apple M4 Max", "metal")
    assert hardware.total_memory == 64 * GIB
    assert hardware.usable_memory == 48 * GIB
    assert hardware.bandwidth == 546e9


def test_a_busy_mac_offers_what_is_free() -> None:
    hardware = mac("Apple M3 Ultra", 80, memory=512 * GIB, working_set=400 * GIB)

    assert hardware.usable_memory == 5_150_000 * 16384


@pytest.mark.parametrize(
    ("chip", "gpu_cores", "bandwidth"),
    [
        ("Apple M1", 8, 68.25e9),
        ("Apple M4 Max", 32, 410e9),
        ("Apple M4 Max", 0, 410e9),
        ("Apple M3 Ultra", 80, 819e9),
        ("AMD RYZEN AI MAX+ PRO 395", 0, 256e9),
        ("AMD Ryzen AI Max 385", 0, 256e9),
        ("NVIDIA GB10", 0, 273e9),
        ("NVIDIA GeForce RTX 5090", 0, 1792e9),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", 0, None),
        ("Apple M99", 10, None),
        ("", 0, None),
    ],
)
def test_the_table_of_chips(chip: str, gpu_cores: int, bandwidth: float | None) -> None:
    assert known_bandwidth(chip, gpu_cores) == bandwidth


def test_measuring_takes_little_memory_where_there_is_little() -> None:
    assert measure_bandwidth(available=0) > 0


def test_this_machine_is_no_error() -> None:
    hardware = probe()

    assert hardware.chip
    assert 0 < hardware.usable_memory <= hardware.total_memory
    assert 0 < hardware.available() <= hardware.total_memory
    assert hardware.bandwidth > 0
