"""The GGUF of one stage: made once, held while it is loaded, and removed when it is of no use."""

from dataclasses import dataclass
from pathlib import Path
from typing import IO

from node.ggml.cut import Gguf, copied_bytes, write
from node.weights.caches import unused_stages
from node.weights.clone import can_clone
from node.weights.made import PART, check_space, hold, making, remove_unused
from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.errors import UnavailableError

# Somebody else may remove the file between its making and its use.
ATTEMPTS = 3


@dataclass(frozen=True)
class Part:
    """The layers [first, end) of a GGUF; `has_lm_head`: with final norm and lm_head.

    devices: see Sizes.
    """

    first: int
    end: int
    has_lm_head: bool
    context: int = 0
    users: int = 1
    devices: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class StageFile:
    """A file that nobody removes before `stream` is closed."""

    path: Path
    stream: IO[bytes]


def stage_path(checkpoint: Checkpoint, folder: Path, part: Part) -> Path:
    """The file of a stage in `folder`, whether it is there or not."""
    name = f"{checkpoint.manifest.revision}-{part.first}-{part.end}"
    return folder / f"{name}{'-out' if part.has_lm_head else ''}.gguf"


def file_bytes(gguf: Gguf, part: Part) -> int:
    """Bytes of weights in a stage's file; beside them are some kilobytes of its description."""
    pieces = gguf.pieces(part.first, part.end, part.has_lm_head)
    return sum(piece.size for piece in pieces if piece.source is not None)


def disk_bytes(gguf: Gguf, part: Part, root: Path, folder: Path) -> int:
    """Bytes that a stage's file in `folder` takes beside the model's files in `root`."""
    there = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    if not can_clone(root, there):
        return file_bytes(gguf, part)
    return min(file_bytes(gguf, part), copied_bytes(gguf, part.first, part.end, part.has_lm_head))


def stage_file(gguf: Gguf, checkpoint: Checkpoint, folder: Path, part: Part) -> StageFile:
    """A file of the stage's layers alone in `folder`, where it stays for the next time.

    Raises UnavailableError where the disk has no room for it, also without unused ones, or it
    can't be written.
    """
    file = stage_path(checkpoint, folder, part)
    for _ in range(ATTEMPTS):
        if (stream := hold(file)) is not None:
            return StageFile(file, stream)
        folder.mkdir(parents=True, exist_ok=True)
        remove_unused(folder.glob(f"*{PART}"))
        needed = disk_bytes(gguf, part, checkpoint.root, folder)
        check_space(folder, needed, checkpoint.manifest.model, unused_stages())
        try:
            with making(file) as writing:
                write(gguf, checkpoint.root, writing, part.first, part.end, part.has_lm_head)
        except OSError as error:
            raise UnavailableError(f"{file}: can't be written: {error.strerror}") from error
    raise UnavailableError(f"{file}: is removed whenever it is made: is another program at it?")


def remove_others(folder: Path, kept: Path | None) -> None:
    """Removes the files in `folder` of stages that nobody has, but for `kept`."""
    remove_unused(file for file in sorted(folder.glob("*.gguf")) if file != kept)
