"""The hub for tests keeps what it promises to the real client of huggingface_hub."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import (
    HfApi,
    constants,
    get_session,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.support.chat_server import until
from tests.support.deadlines import scaled
from tests.support.hub import Hub

REPO, FIRST, SECOND = "org/name", "model-00001.safetensors", "model-00002.safetensors"
RIGHT, WRONG = "hf_right", "hf_wrong"


def safetensors(values: int) -> bytes:
    shape = {"dtype": "U8", "shape": [values], "data_offsets": [0, values]}
    header = json.dumps({"x": shape}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(i % 251 for i in range(values))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    (path / "sub").mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "sub" / "notes.txt").write_text("notes")
    (path / FIRST).write_bytes(safetensors(5000))
    (path / SECOND).write_bytes(safetensors(300_000))
    return path


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with Hub() as hub:
        hub.add(REPO, model)
        yield hub


@pytest.fixture
def download(hub: Hub, tmp_path: Path) -> Callable[..., Path]:
    """Makes the tests independent of a user's settings."""

    def run(file: str, repo: str = REPO, token: Any = False, **options: Any) -> Path:
        cache = tmp_path / "cache"
        path = hf_hub_download(
            repo, file, endpoint=hub.endpoint, cache_dir=cache, token=token, **options
        )
        return Path(str(path))

    return run


def get(hub: Hub, file: str, byte_range: str) -> Any:
    url = hf_hub_url(REPO, file, endpoint=hub.endpoint)
    return get_session().get(url, headers={"Range": byte_range})


def test_a_model_is_described_with_sizes_and_checksums(hub: Hub, model: Path) -> None:
    info = HfApi(hub.endpoint, token=False).model_info(REPO, files_metadata=True)
    files = {file.rfilename: file for file in info.siblings or []}
    assert set(files) == {"config.json", "sub/notes.txt", FIRST, SECOND}
    assert files[FIRST].size == (model / FIRST).stat().st_size
    lfs = files[FIRST].lfs
    assert lfs
    assert lfs.sha256 == hashlib.sha256((model / FIRST).read_bytes()).hexdigest()
    assert files["config.json"].lfs is None


def test_sizes_are_told_on_request_only(hub: Hub) -> None:
    info = HfApi(hub.endpoint, token=False).model_info(REPO)
    assert [file.size for file in info.siblings or []] == [None] * 4


def test_a_small_file_is_named_by_its_git_blob(download: Callable[..., Path], model: Path) -> None:
    path = download("sub/notes.txt")
    blob = subprocess.check_output(["git", "hash-object", model / "sub/notes.txt"], text=True)
    assert path.read_text() == "notes"
    assert path.resolve().name == blob.strip()


def test_weights_come_from_the_cdn(hub: Hub, download: Callable[..., Path], model: Path) -> None:
    path = download(FIRST)
    assert path.read_bytes() == (model / FIRST).read_bytes()
    assert path.resolve().name == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [(r.method, r.path.split("/")[1], r.status) for r in hub.requests] == [
        ("HEAD", "org", 302),
        ("GET", "cdn", 200),
    ]
    size = path.stat().st_size
    assert hub.downloads() == {FIRST: [(0, size)]}
    assert hub.sent(FIRST) == size


def test_a_snapshot_takes_what_it_wants_once(hub: Hub, tmp_path: Path, model: Path) -> None:
    options: Any = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache", "token": False}
    for _ in range(2):
        path = snapshot_download(REPO, allow_patterns=["*.json", FIRST], **options)
    assert sorted(file.name for file in Path(path).iterdir()) == ["config.json", FIRST]
    assert hub.sent(FIRST) == (model / FIRST).stat().st_size
    assert hub.sent(SECOND) == 0


def test_a_header_is_read_by_range(hub: Hub) -> None:
    api = HfApi(hub.endpoint, token=False)
    assert api.parse_safetensors_file_metadata(REPO, SECOND).tensors["x"].shape == [300_000]
    assert hub.downloads() == {SECOND: [(0, 100_001)]}


@pytest.mark.parametrize("file", ["config.json", FIRST])
@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=5-9", slice(5, 10)),
        ("bytes=5-", slice(5, None)),
        ("bytes=5-999999", slice(5, None)),
        ("bytes=-3", slice(-3, None)),
        ("bytes=-999999", slice(0, None)),
    ],
)
def test_ranges(hub: Hub, model: Path, file: str, asked: str, part: slice) -> None:
    content = (model / file).read_bytes()
    start, end, _ = part.indices(len(content))
    answer = get(hub, file, asked)
    assert (answer.status_code, answer.content) == (206, content[part])
    assert answer.headers["Content-Range"] == f"bytes {start}-{end - 1}/{len(content)}"
    assert hub.downloads() == {file: [(start, end)]}


def test_a_range_past_the_end_is_refused(hub: Hub) -> None:
    answer = get(hub, "config.json", "bytes=999-")
    assert (answer.status_code, answer.headers["Content-Range"]) == (416, "bytes */23")


def test_several_ranges_at_once_are_not_served(hub: Hub) -> None:
    assert get(hub, "config.json", "bytes=0-1,3-4").status_code == 200


def test_without_the_token_there_is_no_such_repo(hub: Hub, download: Callable[..., Path]) -> None:
    hub.token = RIGHT
    with pytest.raises(RepositoryNotFoundError, match=r"(?s)401.*Invalid username"):
        download(FIRST)
    assert hub.sent(FIRST) == 0


def test_a_wrong_token_is_refused(hub: Hub, download: Callable[..., Path]) -> None:
    hub.token = RIGHT
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header"):
        download(FIRST, token=WRONG)


def test_the_token_opens_the_hub(hub: Hub, download: Callable[..., Path]) -> None:
    hub.token = RIGHT
    assert download(FIRST, token=RIGHT).exists()


def test_the_cdn_takes_no_token(hub: Hub) -> None:
    url = f"{hub.cdn}/cdn/{REPO}/resolve/main/{FIRST}"
    answer = get_session().get(url, headers={"Authorization": f"Bearer {RIGHT}"})
    assert answer.status_code == 400


def test_a_gated_repo_can_be_looked_at_only(hub: Hub, download: Callable[..., Path]) -> None:
    hub.gate(REPO)
    assert HfApi(hub.endpoint, token=False).model_info(REPO).gated == "manual"
    with pytest.raises(GatedRepoError, match=r"(?s)403.*not in the authorized list"):
        download(FIRST, token=RIGHT)
    with pytest.raises(GatedRepoError, match=r"(?s)401.*must be authenticated"):
        download(FIRST)


def test_what_is_missing_is_named(hub: Hub, download: Callable[..., Path]) -> None:
    with pytest.raises(RemoteEntryNotFoundError):
        download("nosuch.json")
    with pytest.raises(RevisionNotFoundError):
        download(FIRST, revision="v2")
    with pytest.raises(RepositoryNotFoundError):
        download(FIRST, repo="org/other", token=RIGHT)
    with pytest.raises(RepositoryNotFoundError):
        HfApi(hub.endpoint, token=False).model_info("org/other")
    assert [request.status for request in hub.requests] == [404, 404, 404, 401]


def test_a_broken_download_goes_on_where_it_stopped(
    hub: Hub, download: Callable[..., Path], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow: the client waits a second before it asks again.

    It forgets what is not yet a whole chunk, of 10 MB unless told otherwise.
    """
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.drop_after(FIRST, 1000)
    path, size = download(FIRST), (model / FIRST).stat().st_size
    assert path.read_bytes() == (model / FIRST).read_bytes()
    assert hub.downloads() == {FIRST: [(0, 1000), (1000, size)]}


def test_damage_keeps_the_size(hub: Hub, download: Callable[..., Path], model: Path) -> None:
    """The client compares sizes only: whoever wants checksums checks them."""
    hub.corrupt(FIRST)
    damaged, content = download(FIRST).read_bytes(), (model / FIRST).read_bytes()
    assert damaged == content[:-1] + bytes([content[-1] ^ 0xFF])
    assert download(FIRST, force_download=True).read_bytes() == content


def test_a_failing_head_is_asked_again(hub: Hub, download: Callable[..., Path]) -> None:
    hub.fail(FIRST, 503)
    download(FIRST)
    assert [(r.method, r.status) for r in hub.requests][:2] == [("HEAD", 503), ("HEAD", 302)]


def test_a_failing_get_is_not(hub: Hub, download: Callable[..., Path]) -> None:
    hub.fail(FIRST, 503, method="GET")
    with pytest.raises(HfHubHTTPError, match="503"):
        download(FIRST)
    assert [(r.method, r.status) for r in hub.requests] == [("HEAD", 302), ("GET", 503)]


def test_the_api_fails_by_the_name_of_the_repo(hub: Hub) -> None:
    hub.fail(REPO, 500)
    with pytest.raises(HfHubHTTPError, match="500"):
        HfApi(hub.endpoint, token=False).model_info(REPO)


def test_the_line_is_shared(hub: Hub) -> None:
    """Two answers of 5000 bytes take half a second at 20 kB/s."""
    hub.throttle = 20_000
    began = time.monotonic()
    threads = [Thread(target=get, args=(hub, FIRST, "bytes=0-4999")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(scaled(10))
    assert 0.45 < time.monotonic() - began < scaled(2)


def test_a_closed_hub_ends_answers_in_progress(hub: Hub) -> None:
    hub.throttle = 1000
    broken: list[Exception] = []

    def ask() -> None:
        try:
            get(hub, SECOND, "bytes=0-")
        except Exception as error:
            broken.append(error)

    client = Thread(target=ask)
    client.start()
    until(lambda: hub.sent(SECOND) > 0)
    hub.close()
    client.join(5)
    assert [type(error).__name__ for error in broken] == ["RemoteProtocolError"]


def test_a_closed_hub_leaves_what_is_cached(hub: Hub, download: Callable[..., Path]) -> None:
    path = download(FIRST)
    hub.close()
    assert download(FIRST) == path


def test_the_environment_means_what_it_means_elsewhere(hub: Hub, tmp_path: Path) -> None:
    """In a process of its own, for the client reads the environment once."""
    hub.token = RIGHT
    home = tmp_path / "home"
    names = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_TOKEN": RIGHT}
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    code = f"import huggingface_hub as h; print(h.hf_hub_download({REPO!r}, {FIRST!r}))"
    command = [sys.executable, "-c", code]
    path = subprocess.check_output(command, env=clean | names, text=True).strip()
    assert Path(path).is_relative_to(home / "hub" / "models--org--name" / "snapshots")
    asked = len(hub.requests)
    offline = clean | names | {"HF_HUB_OFFLINE": "1"}
    assert subprocess.check_output(command, env=offline, text=True).strip() == path
    assert len(hub.requests) == asked


def test_nothing_is_found_without_a_hub(hub: Hub, download: Callable[..., Path]) -> None:
    with pytest.raises(LocalEntryNotFoundError):
        download(FIRST, local_files_only=True)
    assert hub.requests == []
