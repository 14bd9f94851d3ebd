"""Memory of GPUs as their drivers count it: amdgpu in sysfs, NVIDIA's by nvidia-smi."""

from dataclasses import dataclass
from pathlib import Path

from node.agent.commands import Runner
from node.agent.host_memory import MIB, read_number, read_text

NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,memory.free,pci.bus_id,uuid",
    "--format=csv,noheader,nounits",
)
PAGE = 4096


@dataclass(frozen=True)
class AmdGpu:
    """A GPU of the driver amdgpu, in bytes.

    vram: memory of a card, or what the firmware has carved out of the host's memory for an APU.
    gtt: the part of the host's memory that the GPU may map besides. pci: its address, lower case;
    where that is not known, card0 or the like.
    """

    pci: str
    vram_total: int
    vram_free: int
    gtt_total: int
    gtt_free: int


@dataclass(frozen=True)
class NvidiaGpu:
    """An NVIDIA GPU. total, free: bytes; None where it shares the host's memory."""

    name: str
    total: int | None
    free: int | None
    pci: str
    uuid: str


def amd_gpus(root: Path) -> list[AmdGpu]:
    """GPUs of amdgpu, by the numbers of their cards."""
    most = ttm_limit(root)
    gpus = []
    for folder in sorted((root / "sys/class/drm").glob("card[0-9]*/device")):
        if not (folder / "mem_info_gtt_total").exists():
            continue
        sizes = {
            name: read_number(folder / f"mem_info_{name}")
            for name in ("vram_total", "vram_used", "gtt_total", "gtt_used")
        }
        # A GTT larger than all that TTM may allocate can't be filled.
        gtt = min(sizes["gtt_total"], most or sizes["gtt_total"])
        gpus.append(
            AmdGpu(
                pci=_pci_of(folder) or folder.parent.name,
                vram_total=sizes["vram_total"],
                vram_free=max(0, sizes["vram_total"] - sizes["vram_used"]),
                gtt_total=gtt,
                gtt_free=max(0, gtt - sizes["gtt_used"]),
            )
        )
    return gpus


def ttm_limit(root: Path) -> int:
    """Bytes of the host's memory that all GPUs together may map; 0 where the kernel doesn't say."""
    return ttm_module(root)[1] * PAGE


def ttm_module(root: Path) -> tuple[str, int]:
    """The kernel's module that limits what GPUs map, and its limit in pages; 0: not known.

    AMD's own driver packages bring it under a name of theirs.
    """
    for name in ("amdttm", "ttm"):
        if pages := read_number(root / f"sys/module/{name}/parameters/pages_limit"):
            return name, pages
    return "ttm", 0


def nvidia_gpus(run: Runner) -> list[NvidiaGpu]:
    """NVIDIA's GPUs in the order of their addresses; none without nvidia-smi."""
    gpus: list[NvidiaGpu] = []
    for line in (run(NVIDIA_SMI) or "").splitlines():
        fields = [field.strip() for field in line.rsplit(",", 4)]
        if len(fields) < 5:
            continue
        name, total, free, pci, uuid = fields
        known = total.isdigit() and free.isdigit()
        gpus.append(
            NvidiaGpu(
                name,
                int(total) * MIB if known else None,
                int(free) * MIB if known else None,
                normal_pci(pci) or f"nvidia{len(gpus)}",
                uuid,
            )
        )
    return gpus


def normal_pci(address: str) -> str:
    """A PCI address as the kernel writes it: 00000000:01:00.0 becomes 0000:01:00.0."""
    domain, colon, rest = address.strip().lower().partition(":")
    return f"{domain[-4:]}{colon}{rest}"


def _pci_of(folder: Path) -> str:
    """The PCI address of a device in sysfs; "" where it doesn't say."""
    for line in read_text(folder / "uevent").splitlines():
        if line.startswith("PCI_SLOT_NAME="):
            return normal_pci(line.partition("=")[2])
    return normal_pci(folder.resolve().name) if folder.is_symlink() else ""
