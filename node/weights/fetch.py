"""Fetches a model's files onto this machine: only those that its stage needs."""

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from node.weights import hub, store
from node.weights.caches import unused_stages
from node.weights.made import MAKE_ROOM, check_space
from node.weights.progress import Stop
from node.weights.sources import Sources
from unicluster.checkpoints.checkpoint import Checkpoint, Manifest, is_gguf
from unicluster.checkpoints.gguf import FIRST_BYTES, gguf_header_end
from unicluster.checkpoints.ranges import Ranges, merged, size
from unicluster.checkpoints.safetensors import LENGTH_BYTES, header_length, read_header
from unicluster.errors import InputError, NotFoundError, UnavailableError, in_one_line, shown

# Called with (bytes fetched, bytes to fetch).
OnProgress = Callable[[int, int], None]


async def describe(model: str, revision: str, sources: Sources) -> Checkpoint:
    """A copy of a model with its description: the small files, and the headers of its weights.

    Args:
        model: "demo", an absolute directory, or a hub repository.
        revision: commit or fingerprint; empty: a directory as it is, the hub's newest.
        sources: machines to ask before the hub.

    Raises InputError, NotFoundError or UnavailableError.
    """
    checkpoint = None
    if revision or model == "demo" or Path(model).is_absolute():
        checkpoint = await asyncio.to_thread(store.find, model, revision)
    if checkpoint is None:
        try:
            manifest = await _manifest(model, revision, sources)
        except (NotFoundError, UnavailableError) as error:
            if Path(model).is_absolute() or model == "demo":
                raise
            damaged = await asyncio.to_thread(store.damaged_in_cache, model, revision)
            if not damaged:
                raise
            raise _not_again(damaged, error) from error
        checkpoint = await asyncio.to_thread(store.create, manifest)
    with _stored(checkpoint):
        await _mend(checkpoint, sources)
    return checkpoint


def is_whole(checkpoint: Checkpoint) -> bool:
    """Whether all files of weights are here, whole."""
    return all(checkpoint.is_whole(name) for name in checkpoint.manifest.weights)


async def fetch(
    checkpoint: Checkpoint,
    tensors: Collection[str],
    hub_files: Collection[str] | None,
    sources: Sources,
    on_progress: OnProgress = lambda done, total: None,
) -> None:
    """Fetches the missing bytes of some tensors.

    Files in `hub_files` come from the hub, whole, also those that only other machines need; the
    others come in part from other machines. None means that all come from the hub.
    Raises UnavailableError, before anything is fetched, when the disk is too small.
    """
    wanted = await asyncio.to_thread(tensor_ranges, checkpoint, tensors)
    await fetch_ranges(checkpoint, wanted, hub_files, sources, on_progress)


async def fetch_ranges(
    checkpoint: Checkpoint,
    wanted: Mapping[str, Ranges],
    hub_files: Collection[str] | None,
    sources: Sources,
    on_progress: OnProgress = lambda done, total: None,
    *,
    made: int = 0,
) -> None:
    """Fetches parts of files; see fetch. Raises InputError for a file not in the model.

    made: bytes of files that are made of them later, which the disk must have room for too.
    """
    files = checkpoint.manifest.files
    if unknown := sorted({*wanted, *(hub_files or ())} - files.keys()):
        raise InputError(f"{checkpoint.manifest.model}: it has no file {shown(unknown[0])}")
    missing = {n: r for n, ranges in wanted.items() if (r := checkpoint.missing(n, ranges))}
    asked = missing if hub_files is None else hub_files
    whole = [name for name in asked if not checkpoint.is_whole(name)]
    parts = {name: ranges for name, ranges in missing.items() if name not in whole}
    total = sum(checkpoint.manifest.files[name].size for name in whole)
    total += sum(size(ranges) for ranges in parts.values())
    if not total:
        return
    _check_space(checkpoint, total + made)
    progress = _Progress(total, on_progress, asyncio.get_running_loop())
    tasks = [
        asyncio.create_task(
            _in_thread(lambda stop: hub.fetch(checkpoint, whole, progress.add, stop=stop))
        ),
        asyncio.create_task(sources.fetch(checkpoint, parts, progress.add)),
    ]
    try:
        with _stored(checkpoint):
            await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


class _Progress:
    """Counts bytes that several threads fetch."""

    def __init__(
        self, total: int, on_progress: OnProgress, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._done, self._total = 0, total
        self._on_progress = on_progress
        self._loop = loop
        on_progress(0, total)

    def add(self, count: int) -> None:
        self._loop.call_soon_threadsafe(self._add, count)

    def _add(self, count: int) -> None:
        self._done += count
        self._on_progress(self._done, self._total)


async def _manifest(model: str, revision: str, sources: Sources) -> Manifest:
    if not revision and not Path(model).is_absolute():
        try:
            newest = await asyncio.to_thread(hub.resolve, model)
            store.set_newest(newest)
            return newest
        except UnavailableError:
            known = await asyncio.to_thread(store.find, model, "")
            manifest = known.manifest if known else await sources.manifest(model, "")
            if manifest is None:
                raise
            return manifest
    manifest = await sources.manifest(model, revision)
    if manifest is not None:
        return manifest
    if Path(model).is_absolute():
        raise InputError(f"{model}: no such directory on this machine, nor a copy of it on others")
    return await asyncio.to_thread(hub.resolve, model, revision)


async def _mend(checkpoint: Checkpoint, sources: Sources) -> None:
    """Fetches what is missing of the description, and small files of a copy that are damaged."""
    await asyncio.to_thread(store.distrust_damaged, checkpoint)
    try:
        await _fetch_description(checkpoint, sources)
    except (NotFoundError, UnavailableError) as error:
        if damaged := await asyncio.to_thread(store.damaged, checkpoint):
            raise _not_again(damaged, error) from error
        raise


def _not_again(damaged: str, error: Exception) -> UnavailableError:
    return UnavailableError(f"{damaged}; and it can't be fetched again: {in_one_line(error)}")


async def _fetch_description(checkpoint: Checkpoint, sources: Sources) -> None:
    manifest = checkpoint.manifest
    small, headers = await asyncio.to_thread(_missing_description, checkpoint)
    if not small and not headers:
        return
    _check_space(checkpoint, sum(manifest.files[name].size for name in small))
    if starts := await sources.starts(manifest):
        first = {name: merged([(0, LENGTH_BYTES)]) for name in headers}
        await sources.fetch(checkpoint, {n: checkpoint.all_of(n) for n in small} | first)
        # Perhaps no machine has more of a GGUF than the header, whose end isn't known yet.
        while rest := await asyncio.to_thread(_missing_headers, checkpoint, headers, starts):
            await sources.fetch(checkpoint, rest)
    else:
        await _in_thread(lambda stop: hub.fetch(checkpoint, small, stop=stop))
        await _in_thread(lambda stop: hub.fetch_headers(checkpoint, headers, stop=stop))


async def _in_thread(work: Callable[[Stop], None]) -> None:
    """Runs work that blocks, which ends soon after this was cancelled."""
    stop = Stop()
    try:
        await asyncio.to_thread(work, stop)
    finally:
        stop.set()


def _missing_description(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Small files, and files of weights whose header is not here; reads headers."""
    manifest = checkpoint.manifest
    small = [name for name in manifest.small if not checkpoint.is_whole(name)]
    return small, [name for name in manifest.weights if not _has_header(checkpoint, name)]


def _missing_headers(
    checkpoint: Checkpoint, names: Collection[str], starts: Mapping[str, int]
) -> dict[str, Ranges]:
    """Parts of headers to be fetched next, as far as they are known; reads headers."""
    missing = {name: _missing_header(checkpoint, name, starts[name]) for name in names}
    return {name: ranges for name, ranges in missing.items() if ranges}


def _has_header(checkpoint: Checkpoint, name: str) -> bool:
    if checkpoint.is_whole(name):
        return True
    if checkpoint.missing(name, ((0, LENGTH_BYTES),)):
        return False
    return not checkpoint.missing(name, ((0, _header_end(checkpoint, name)),))


def _missing_header(checkpoint: Checkpoint, name: str, limit: int) -> Ranges:
    return checkpoint.missing(name, ((0, min(_header_end(checkpoint, name), limit)),))


def _header_end(checkpoint: Checkpoint, name: str) -> int:
    """End of the header; of a GGUF, which doesn't state it, how far to read to learn more."""
    if not is_gguf(name):
        return header_length(checkpoint.read(name, 0, LENGTH_BYTES))
    (first, *_) = checkpoint.available(name)
    length, end = 0, FIRST_BYTES
    while length < min(end, first[1]):  # what is here may be far more than the header
        length = min(end, first[1])
        end = gguf_header_end(checkpoint.read(name, 0, length))
    return min(end, checkpoint.manifest.files[name].size)


def tensor_ranges(checkpoint: Checkpoint, tensors: Collection[str]) -> dict[str, Ranges]:
    """Byte ranges of `tensors` by file of safetensors, where a file has any."""
    by_file = {}
    for name in checkpoint.manifest.weights:
        in_file = read_header(checkpoint.root / name).tensors
        if ranges := merged(in_file[tensor] for tensor in in_file.keys() & tensors):
            by_file[name] = ranges
    return by_file


@contextmanager
def _stored(checkpoint: Checkpoint) -> Iterator[None]:
    """Names the folder where files can't be stored: the disk is full, or may not be written."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise UnavailableError(
            f"{checkpoint.root}: can't be written: {error.strerror}; {MAKE_ROOM}"
        ) from error


def _check_space(checkpoint: Checkpoint, needed: int) -> None:
    check_space(checkpoint.root, needed, checkpoint.manifest.model, unused_stages())
