"""The Hugging Face hub: manifests of repositories, and downloads into the ordinary cache.

Addresses, tokens, retries and the cache's layout are huggingface_hub's, and so are the
environment variables: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.

Its own downloads resume after a lost connection, but not in the next process, and compare sizes,
not checksums. So files over plain HTTP are streamed and verified here, by its public calls,
and then handed to its cache.
"""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import (
    build_hf_headers,
    disable_progress_bars,
    hf_raise_for_status,
    http_stream_backoff,
    tqdm,
)

from node.weights.caches import folder
from node.weights.hub_compat import HTTPError
from node.weights.hub_errors import translated_errors
from node.weights.progress import Rate, Stop
from node.weights.store import UNVERIFIED, checksum
from unicluster.checkpoints.checkpoint import (
    Checkpoint,
    File,
    Manifest,
    is_gguf,
    is_small,
    is_wanted,
    is_weights,
)
from unicluster.checkpoints.gguf import FIRST_BYTES, gguf_header_end
from unicluster.checkpoints.gguf_names import check_named, chosen, split_id
from unicluster.checkpoints.safetensors import LENGTH_BYTES, MOST_HEADER_BYTES, header_length
from unicluster.errors import InputError, NotFoundError, in_one_line
from unicluster.retry import attempts_in_thread

log = logging.getLogger(__name__)

FILES_AT_ONCE = 8
ATTEMPTS = 5
FIRST_RETRY_SECONDS = 1.0
LAST_RETRY_SECONDS = 8.0
# Between two reports of progress.
CHUNK_BYTES = 1 << 20
REPORT_SECONDS = 0.5
# Between two looks at a file that another thread or process fetches.
LOCK_SECONDS = 0.25
# The hub serves larger files only through hf_xet.
MOST_HTTP_BYTES = 50 * 10**9
PARTIAL_CONTENT = 206

OnBytes = Callable[[int], None]

# Its annotations are stricter than what it accepts.
_Bar: Any = tqdm

disable_progress_bars()


class _DamagedError(NotFoundError):
    """A file whose checksum is not the hub's."""


def resolve(model: str, revision: str = "") -> Manifest:
    """Manifest of a repository on the hub; of a repository of GGUFs, for the named quantization.

    Raises NotFoundError with the hub's reason or if there is no such GGUF, InputError if it is
    not clear which is meant, UnavailableError when the hub can't be reached.
    """
    repo, quant = split_id(model)
    with translated_errors(repo):
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(
            repo, revision=revision or None, files_metadata=True, timeout=timeout
        )
    files = {
        file.rfilename: File(file.size or 0, file.lfs.sha256 if file.lfs else file.blob_id or "")
        for file in info.siblings or ()
    }
    if quant:
        names = [*filter(is_small, files), *chosen(model, files)]
    else:
        names = [name for name in files if is_wanted(name)]
        if not any(map(is_weights, names)):
            check_named(repo, files)
    return Manifest(model, info.sha or revision, {name: files[name] for name in names})


def check(model: str, revision: str) -> None:
    """Checks access: asks the hub for a file's size, which only those who may download it get.

    Raises NotFoundError with the hub's reason, UnavailableError when it can't be reached.
    """
    repo, quant = split_id(model)
    # Repositories of GGUFs often have nothing else.
    file = resolve(model, revision).weights[0] if quant else "config.json"
    with translated_errors(repo):
        url = hf_hub_url(repo, file, revision=revision or None)
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)


def fetch_headers(checkpoint: Checkpoint, names: list[str], *, stop: Stop | None = None) -> None:
    """Fetches the headers of files of weights, which list their tensors, until `stop` is set."""
    stop = stop or Stop()
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for _ in pool.map(lambda name: _fetch_header(checkpoint, name, stop), names):
            pass


def fetch(
    checkpoint: Checkpoint,
    names: list[str],
    on_bytes: OnBytes = lambda count: None,
    *,
    stop: Stop | None = None,
) -> None:
    """Fetches whole files, several at once, and verifies them by the hub's checksums.

    Bytes fetched before an interruption are reused. `on_bytes` is called from several threads.
    Once `stop` is set it raises StoppedError soon; whoever waits for the same files goes on.
    """
    stop = stop or Stop()
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        started = [pool.submit(_fetch, checkpoint, name, stop, on_bytes) for name in names]
        try:
            for each in started:
                each.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch(
    checkpoint: Checkpoint, name: str, stop: Stop, on_bytes: OnBytes = lambda count: None
) -> None:
    manifest, size = checkpoint.manifest, checkpoint.manifest.files[name].size
    partial = checkpoint.root / (name + UNVERIFIED)
    partial.parent.mkdir(parents=True, exist_ok=True)
    # Two workers of one machine may want the same file.
    with (
        translated_errors(manifest.model),
        _locked(partial, stop, on_bytes),
    ):
        if checkpoint.is_whole(name):
            on_bytes(size)
            return
        repo, _ = split_id(manifest.model)
        cache = folder(manifest.model).parent
        if size <= MOST_HTTP_BYTES:
            _fetch_verified(manifest, name, partial, stop, on_bytes)
            blob = folder(manifest.model) / "blobs" / manifest.files[name].checksum
            blob.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(blob)
            whole = hf_hub_download(repo, name, revision=manifest.revision, cache_dir=cache)
            if not blob.samefile(whole):  # what a snapshot without links had in its place
                whole = str(blob)
        else:
            # hf_xet verifies and resumes by itself.
            whole = hf_hub_download(
                *(repo, name),
                revision=manifest.revision,
                cache_dir=cache,
                tqdm_class=_progress_class(on_bytes, stop),
            )
        checkpoint.link(name, Path(whole))


@contextmanager
def _locked(partial: Path, stop: Stop, on_bytes: OnBytes) -> Iterator[None]:
    """Holds a file's lock. Who has it fetches the file: `on_bytes` reports how it grows."""
    lock, reported = FileLock(f"{partial}.lock"), 0
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            grown = (_size(partial) if partial.exists() else 0) - reported
            on_bytes(grown)
            reported += grown
            stop.wait(LOCK_SECONDS)
    try:
        on_bytes(-reported)
        yield
    finally:
        lock.release()


def _progress_class(on_bytes: OnBytes, stop: Stop) -> Any:
    """A progress bar for huggingface_hub that shows nothing and reports bytes.

    It ends the download, as far as that heeds it, once `stop` is set. Only the first of a download
    reports: hf_xet has one for bytes on the disk, then one for the network.
    """
    bars: list[Any] = []

    class Progress(_Bar):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            bars.append(self)

        def update(self, n: float | None = 1) -> Any:
            stop.check()
            if self is bars[0]:
                on_bytes(int(n or 0))
            return super().update(n)

    return Progress


def _fetch_verified(
    manifest: Manifest, name: str, partial: Path, stop: Stop, on_bytes: OnBytes
) -> None:
    """Fetches the rest of a file into `partial`, until it is complete and its checksum right.

    Raises NotFoundError for a file whose checksum is wrong in all attempts.
    """
    file = manifest.files[name]
    partial.touch()
    on_bytes(_size(partial))
    for attempt in attempts_in_thread(
        name, _is_transient, count=ATTEMPTS, first=FIRST_RETRY_SECONDS, last=LAST_RETRY_SECONDS
    ):
        with attempt:
            stop.check()
            _fetch_rest(manifest, name, partial, stop, on_bytes)
            if _size(partial) == file.size and checksum(partial, file.checksum) == file.checksum:
                return
            on_bytes(-_size(partial))
            partial.write_bytes(b"")
            raise _DamagedError(
                f"{manifest.model}: {name} arrived damaged {ATTEMPTS} times: its checksum is not "
                "the hub's; try another network, or another HF_ENDPOINT"
            )


def _fetch_rest(
    manifest: Manifest, name: str, partial: Path, stop: Stop, on_bytes: OnBytes
) -> None:
    """Appends the missing bytes to `partial`, over new connections as long as each brings some.

    Raises the error of one that brought nothing, ConnectionError, or UnavailableError where the
    bytes only trickle.
    """
    size = manifest.files[name].size
    while (here := _size(partial)) < size:
        try:
            _fetch_some(manifest, name, partial, stop, on_bytes)
        except (HTTPError, OSError) as error:
            if _size(partial) <= here or not _is_transient(error):
                raise
            log.warning("%s: %s; resuming", name, in_one_line(error))
        if _size(partial) <= here:
            raise ConnectionError(f"{name}: a connection brought nothing")


def _fetch_some(
    manifest: Manifest, name: str, partial: Path, stop: Stop, on_bytes: OnBytes
) -> None:
    """Appends the bytes that one connection brings to `partial`."""
    here, pending, reported = _size(partial), 0, time.monotonic()
    with partial.open("ab") as stream, _opened(manifest, name, here) as response:
        if here and response.status_code != PARTIAL_CONTENT:
            stream.truncate(0)  # the whole file comes again
            on_bytes(-here)
        rate = Rate(f"{manifest.model}: the hub, asked for {name},")
        try:
            for chunk in response.iter_bytes():  # as they come: a larger size waits for more
                stop.check()
                rate.note(len(chunk))
                stream.write(chunk)
                pending += len(chunk)
                if pending >= CHUNK_BYTES or time.monotonic() - reported > REPORT_SECONDS:
                    on_bytes(pending)
                    pending, reported = 0, time.monotonic()
                rate.waiting()
        finally:
            on_bytes(pending)


@contextmanager
def _opened(manifest: Manifest, name: str, start: int, end: int | None = None) -> Iterator[Any]:
    """The hub's response with bytes [start, end) of a file, or all of it if it ignores ranges."""
    repo, _ = split_id(manifest.model)
    headers = build_hf_headers()
    if start or end is not None:
        headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        headers["Accept-Encoding"] = "identity"  # bytes of the file, not of how it travels
    with http_stream_backoff(
        "GET",
        hf_hub_url(repo, name, revision=manifest.revision),
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        # After a connection that breaks in the middle it would be in the way.
        retry_on_exceptions=(),
        retry_on_status_codes=(408, 429),
    ) as response:
        hf_raise_for_status(response)
        yield response


def _size(file: Path) -> int:
    return file.stat().st_size


def _fetch_header(checkpoint: Checkpoint, name: str, stop: Stop) -> None:
    manifest = checkpoint.manifest
    stop.check()
    with translated_errors(manifest.model):
        data = (_gguf_header if is_gguf(name) else _safetensors_header)(manifest, name)
    if len(data) == manifest.files[name].size:
        # The first part of a split GGUF may have nothing else: so it is verified as the rest is.
        _fetch(checkpoint, name, stop)
    else:
        checkpoint.write(name, 0, data)
        checkpoint.list(name, ((0, len(data)),))


def _safetensors_header(manifest: Manifest, name: str) -> bytes:
    """Bytes of a header as they are, for a copy that mlx-lm can read.

    huggingface_hub's parse_safetensors_file_metadata returns only their parsed contents.
    """
    data = _start(manifest, name, LENGTH_BYTES)
    length = header_length(data) if len(data) == LENGTH_BYTES else 0
    if not LENGTH_BYTES < length <= min(manifest.files[name].size, MOST_HEADER_BYTES):
        raise InputError(f"{manifest.model}: {name} on the hub is no safetensors file")
    return _start(manifest, name, length)


def _gguf_header(manifest: Manifest, name: str) -> bytes:
    """Bytes of a GGUF's header, whose length only the header itself gives: so in growing parts."""
    size, length, data = manifest.files[name].size, FIRST_BYTES, b""
    while len(data) < length and len(data) < size:
        data = _start(manifest, name, min(length, size))
        try:
            length = gguf_header_end(data)
        except InputError as error:
            raise InputError(f"{manifest.model}: {name} on the hub: {error}") from error
    if length > size:
        raise InputError(f"{manifest.model}: {name} on the hub: damaged GGUF: it is cut off")
    return data[:length]


def _start(manifest: Manifest, name: str, length: int) -> bytes:
    """The first bytes of a file, whether or not the hub heeds the requested range."""
    data = b""
    for attempt in attempts_in_thread(
        name, _is_transient, count=ATTEMPTS, first=FIRST_RETRY_SECONDS, last=LAST_RETRY_SECONDS
    ):
        with attempt:
            data = b""
            with _opened(manifest, name, 0, length) as response:
                rate = Rate(f"{manifest.model}: the hub, asked for {name},")
                for chunk in response.iter_bytes():
                    rate.note(len(chunk))
                    rate.waiting()
                    data += chunk
                    if len(data) >= length:
                        break
    return data[:length]


def _is_transient(error: BaseException) -> bool:
    """Whether to try again: the hub is overloaded, the connection was lost, a file is damaged."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code == 429
    if isinstance(error, OSError):
        return error.errno is None and not isinstance(error, OfflineModeIsEnabled)
    return isinstance(error, (HTTPError, _DamagedError))
