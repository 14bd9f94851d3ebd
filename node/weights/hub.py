"""The Hugging Face hub: what a repository holds, and its files, into the ordinary cache.

Addresses, tokens, retries and the cache's layout are huggingface_hub's, and so are the
environment variables: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock
from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import get_hf_file_metadata, http_get
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status, http_stream_backoff
from huggingface_hub.utils.tqdm import disable_progress_bars

from node.weights.hub_errors import HTTPError, reasons
from node.weights.store import UNVERIFIED, folder
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
from unicluster.checkpoints.safetensors import LENGTH_BYTES, header_length
from unicluster.errors import InputError, NotFoundError
from unicluster.retry import attempts_in_thread

FILES_AT_ONCE = 8
ATTEMPTS = 5
FIRST_RETRY_SECONDS = 1.0
LAST_RETRY_SECONDS = 8.0
READ_BYTES = 1 << 22
GIT_DIGITS = 40

OnBytes = Callable[[int], None]

disable_progress_bars()


class _DamagedError(NotFoundError):
    """A file is not what the hub's checksum says."""


def resolve(model: str, revision: str = "") -> Manifest:
    """What the hub says is in a repository now; of one of GGUFs, of the quantization asked for.

    Raises NotFoundError with the hub's reason or if there is no such GGUF, InputError if it is
    not clear which is meant, UnavailableError when the hub can't be reached.
    """
    repo, quant = split_id(model)
    with reasons(repo):
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
    """Asks the hub for the size of a file, which it tells only those who may have the rest.

    Raises NotFoundError with the hub's reason, UnavailableError when it can't be reached.
    """
    repo, quant = split_id(model)
    # Repositories of GGUFs often have nothing else.
    file = resolve(model, revision).weights[0] if quant else "config.json"
    with reasons(repo):
        url = hf_hub_url(repo, file, revision=revision or None)
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)


def fetch_headers(checkpoint: Checkpoint, names: list[str]) -> None:
    """Fetches the headers of files of weights, which tell what is in them."""
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for _ in pool.map(lambda name: _fetch_header(checkpoint, name), names):
            pass


def fetch(checkpoint: Checkpoint, names: list[str], on_bytes: OnBytes = lambda count: None) -> None:
    """Fetches whole files, several at once, and verifies them by the hub's checksums.

    What was fetched before a break is kept. `on_bytes` is called from several threads.
    """
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        started = [pool.submit(_fetch, checkpoint, name, on_bytes) for name in names]
        try:
            for each in started:
                each.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch(checkpoint: Checkpoint, name: str, on_bytes: OnBytes = lambda count: None) -> None:
    manifest, size = checkpoint.manifest, checkpoint.manifest.files[name].size
    partial = checkpoint.root / (name + UNVERIFIED)
    partial.parent.mkdir(parents=True, exist_ok=True)
    # Two workers of one machine may want the same file.
    with FileLock(f"{partial}.lock"), reasons(manifest.model):
        if checkpoint.is_whole(name):
            on_bytes(size)
            return
        # What is too big for plain HTTP comes by hf_xet, which verifies and resumes by itself.
        if size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            _fetch_verified(manifest, name, partial, on_bytes)
            blob = folder(manifest.model) / "blobs" / manifest.files[name].checksum
            blob.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(blob)
        repo, _ = split_id(manifest.model)
        whole = hf_hub_download(repo, name, revision=manifest.revision)
        checkpoint.link(name, Path(whole))


def _fetch_verified(manifest: Manifest, name: str, partial: Path, on_bytes: OnBytes) -> None:
    """Raises NotFoundError for a file that is damaged however often it is fetched."""
    for attempt in attempts_in_thread(
        name, _may_pass, count=ATTEMPTS, first=FIRST_RETRY_SECONDS, last=LAST_RETRY_SECONDS
    ):
        with attempt:
            _fetch_rest(manifest, name, partial, on_bytes)
            if _checksum(partial, manifest.files[name].checksum) == manifest.files[name].checksum:
                return
            on_bytes(-partial.stat().st_size)
            partial.unlink()
            raise _DamagedError(
                f"{manifest.model}: {name} arrived damaged {ATTEMPTS} times: its checksum is not "
                "the hub's; try another network, or another HF_ENDPOINT"
            )


def _fetch_rest(manifest: Manifest, name: str, partial: Path, on_bytes: OnBytes) -> None:
    with partial.open("ab") as stream:
        here = stream.tell()
        http_get(
            _url(manifest, name),
            _Counted(stream, on_bytes),  # type: ignore[arg-type]
            resume_size=here,
            headers=build_hf_headers(),
            expected_size=manifest.files[name].size,
            displayed_filename=name,
        )


class _Counted:
    """A file that tells how many bytes are written to it."""

    def __init__(self, stream: BinaryIO, on_bytes: OnBytes) -> None:
        self._stream = stream
        self._on_bytes = on_bytes

    def write(self, data: bytes) -> int:
        self._on_bytes(len(data))
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _fetch_header(checkpoint: Checkpoint, name: str) -> None:
    manifest = checkpoint.manifest
    with reasons(manifest.model):
        data = (_gguf_header if is_gguf(name) else _safetensors_header)(manifest, name)
    if len(data) == manifest.files[name].size:
        # The first part of a split GGUF may have nothing else: so it is verified as the rest is.
        _fetch(checkpoint, name)
    else:
        checkpoint.write(name, 0, data)
        checkpoint.list(name, ((0, len(data)),))


def _safetensors_header(manifest: Manifest, name: str) -> bytes:
    data = _start(manifest, name, LENGTH_BYTES)
    length = header_length(data) if len(data) == LENGTH_BYTES else 0
    if not LENGTH_BYTES < length <= manifest.files[name].size:
        raise InputError(f"{manifest.model}: {name} on the hub is no safetensors file")
    return _start(manifest, name, length)


def _gguf_header(manifest: Manifest, name: str) -> bytes:
    """Its length is known only when it is here, so more and more of the file is fetched."""
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


def _url(manifest: Manifest, name: str) -> str:
    repo, _ = split_id(manifest.model)
    return hf_hub_url(repo, name, revision=manifest.revision)


def _start(manifest: Manifest, name: str, length: int) -> bytes:
    """The first bytes of a file, whether or not the hub minds what range is asked for."""
    url = _url(manifest, name)
    headers = {**build_hf_headers(), "Range": f"bytes=0-{length - 1}"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    data = b""
    with http_stream_backoff("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= length:
                break
    return data[:length]


def _checksum(file: Path, like: str) -> str:
    """In the form of `like`: a SHA-256, or the SHA-1 that git gives a blob; as it is if empty."""
    if not like:
        return ""
    blob = len(like) == GIT_DIGITS
    digest = hashlib.sha1(usedforsecurity=False) if blob else hashlib.sha256()
    if blob:
        digest.update(b"blob %d\0" % file.stat().st_size)
    with file.open("rb") as stream:
        while data := stream.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _may_pass(error: BaseException) -> bool:
    """Whether to try again: the hub is overloaded, the connection was lost, a file is damaged."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code == 429
    if isinstance(error, OSError):
        return error.errno is None and not isinstance(error, OfflineModeIsEnabled)
    return isinstance(error, (HTTPError, _DamagedError))
