"""Check of `unicluster doctor` on the disk of models: room, and whether files can share blocks."""

import os
from pathlib import Path

import psutil
from huggingface_hub import constants

from node.doctor.finding import Finding, Level
from node.weights.clone import can_clone
from unicluster.units import format_bytes


def models_disk(folder: Path | None = None) -> Finding:
    """Finding about the disk of the Hugging Face cache (default: this user's), there or not yet.

    A stage of a GGUF is a file of its layers, which takes no room where it can share their blocks.
    """
    folder = Path(constants.HF_HUB_CACHE) if folder is None else folder
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = f"{format_bytes(psutil.disk_usage(str(folder)).free)} free in {folder}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding(Level.OK, "disk", f"{free}, which can't be written to from here")
    if can_clone(folder, folder):
        return Finding(Level.OK, "disk", f"{free}; stages share blocks with their GGUF there")
    return Finding(
        Level.OK,
        "disk",
        f"{free}; a stage of a GGUF takes its bytes there once more (btrfs, XFS: hardly any)",
    )
