"""The doctor's check of how much of its memory an APU's GPU reaches, on hosts as trees of files."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import pytest
import yaml

from node.agent.host_memory import GIB
from node.doctor.finding import Finding, Level
from node.doctor.gpu_memory import examine
from tests.support.hosts import amd_card, answer, linux, strix_halo, write

HOST = Path(__file__).parents[2] / "ansible/roles/host"


def memory_of(
    root: Path, files: Mapping[str, str] | None = None, ggml: str | None = None
) -> Finding | None:
    """The doctor's finding on the memory of a host with these files besides.

    ggml: llama.cpp's list of devices; None: it is not installed.
    """
    for path, text in (files or {}).items():
        write(root, path, text)

    def run(command: Sequence[str]) -> str | None:
        return ggml if command[0] == sys.executable and "ggml" in command[-1] else None

    return next(examine(root, run), None)


def test_a_gtt_of_half_the_memory_is_told_the_kernels_parameter(tmp_path: Path) -> None:
    strix_halo(tmp_path, carved=GIB // 2, gtt=64 * GIB)

    finding = memory_of(tmp_path, {"etc/default/grub": ""})

    assert finding is not None
    assert finding.level is Level.WARNING
    assert finding.message == "69.3 GB of 137.4 GB can be mapped by the GPU"
    pages = int((119.5 * GIB) // 4096)
    parameters = f"ttm.pages_limit={pages} ttm.page_pool_size={pages}"
    assert f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {parameters}"' in finding.remedy
    assert finding.remedy.endswith("host_gtt_mib: 122368")


@pytest.mark.parametrize("module", ["ttm", "amdttm"])
def test_the_playbook_sets_the_parameters_that_the_doctor_names(
    module: str, tmp_path: Path
) -> None:
    strix_halo(tmp_path, carved=GIB // 2, gtt=64 * GIB)
    finding = memory_of(
        tmp_path, {f"sys/module/{module}/parameters/pages_limit": str(64 * GIB // 4096)}
    )
    assert finding is not None
    mib = finding.remedy.rpartition("host_gtt_mib: ")[2]

    settings = yaml.safe_load((HOST / "vars/main.yml").read_text())
    defaults = yaml.safe_load((HOST / "defaults/main.yml").read_text())
    of_host = defaults | {"host_gtt_mib": mib, "host_gtt_module": module}
    rendered = jinja2.Template(settings["host_gtt_parameters"]).render(of_host)

    assert f"boot with the kernel parameters {rendered}; reboot" in finding.remedy
    assert "gttsize" not in rendered


def test_fedora_and_a_deprecated_parameter_and_amds_own_module(tmp_path: Path) -> None:
    strix_halo(tmp_path, carved=32 * GIB, gtt=48 * GIB)
    files = {
        "usr/sbin/grubby": "",
        "proc/cmdline": "ro quiet amdgpu.gttsize=49152",
        "sys/module/amdttm/parameters/pages_limit": str(48 * GIB // 4096),
    }

    finding = memory_of(tmp_path, files)

    assert finding is not None
    assert "in the firmware carve out the least" in finding.remedy
    assert "grubby --update-kernel=ALL --remove-args=amdgpu.gttsize" in finding.remedy
    assert "--args='amdttm.pages_limit=31326208 amdttm.page_pool_size=31326208'" in finding.remedy


@pytest.mark.parametrize("carved", [GIB // 2, 96 * GIB])
def test_an_apu_that_is_set_up_either_way_is_fine(carved: int, tmp_path: Path) -> None:
    strix_halo(tmp_path, carved=carved, gtt=120 * GIB if carved < GIB else 16 * GIB)

    finding = memory_of(tmp_path)

    assert finding is not None
    assert finding.level is Level.OK


def test_a_card_with_memory_of_its_own_is_no_apu(tmp_path: Path) -> None:
    linux(tmp_path, "AMD Ryzen 9 7950X")
    amd_card(tmp_path, "card0", 16 * GIB, 64 * GIB, pci="0000:03:00.0")
    assert memory_of(tmp_path) is None

    strix_halo(tmp_path / "both", carved=GIB // 2, gtt=64 * GIB)
    amd_card(tmp_path / "both", "card0", 24 * GIB, 64 * GIB, pci="0000:03:00.0")
    by_name = memory_of(tmp_path / "both")
    rows = [{"pci": "0000:03:00.0", "kind": "gpu"}, {"pci": "0000:c4:00.0", "kind": "igpu"}]
    by_list = memory_of(tmp_path / "both", ggml=answer(rows))
    assert by_name == by_list
    assert by_name is not None
    assert by_name.message.startswith("69.3 GB of 137.4 GB")
