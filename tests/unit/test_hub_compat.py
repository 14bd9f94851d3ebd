"""Contracts with what is not documented of huggingface_hub, and what is done by its public calls.

See node/weights/hub_compat.py and the bounds in pyproject.toml.
"""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import http_stream_backoff

from node.weights import hub, store
from node.weights.hub_compat import HTTPError, repository_folder
from tests.support.hub import Hub
from unicluster.errors import InputError

REPO, FILE = "org/name", "model.safetensors"
CONTENT = bytes(range(256)) * 400


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / FILE).write_bytes(CONTENT)
    with Hub() as served:
        served.add(REPO, tmp_path / "model")
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(
            constants.ENDPOINT, served.endpoint
        )
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield served


def test_the_folder_of_a_repository(served: Hub, tmp_path: Path) -> None:
    file = hf_hub_download(REPO, FILE, endpoint=served.endpoint, token=False)
    folder = Path(str(file)).relative_to(tmp_path / "cache").parts[0]
    assert repository_folder(REPO) == folder, (
        "huggingface_hub.file_download.repo_folder_name is no longer where files are cached"
    )


def test_the_error_of_a_connection_that_fails() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with (
            pytest.raises(Exception, match="refused") as caught,
            http_stream_backoff("GET", url, retry_on_exceptions=()),
        ):
            pass
    piece = "HfHubHTTPError no longer derives from the error of huggingface_hub's HTTP library"
    assert isinstance(caught.value, HTTPError), piece
    assert HTTPError is not Exception, piece


def fetched() -> tuple[bytes, int]:
    """The content of FILE as it came, and the sum of what was reported."""
    checkpoint = store.create(hub.resolve(REPO))
    reported: list[int] = []
    hub.fetch(checkpoint, [FILE], reported.append)
    return (checkpoint.root / FILE).read_bytes(), sum(reported)


@pytest.mark.usefixtures("served")
def test_what_is_too_large_for_http_is_left_to_huggingface_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub, "MOST_HTTP_BYTES", 0)
    assert fetched() == (CONTENT, len(CONTENT))


def test_progress_adds_up_whatever_breaks(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(hub, "FIRST_RETRY_SECONDS", 0.0)
    served.drop_after(FILE, 50_000, times=7)
    served.corrupt(FILE)

    assert fetched() == (CONTENT, len(CONTENT))


def test_a_server_that_ignores_ranges_sends_the_whole_file_again(
    served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(hub, "FIRST_RETRY_SECONDS", 0.0)
    monkeypatch.setattr("tests.support.hub._range", lambda header, size: None)
    served.drop_after(FILE, 50_000)

    assert fetched() == (CONTENT, len(CONTENT))


def test_a_connection_that_breaks_in_a_header_is_opened_again(
    served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "FIRST_RETRY_SECONDS", 0.0)
    served.drop_after(FILE, 3)
    checkpoint = store.create(hub.resolve(REPO))

    with pytest.raises(InputError, match="no safetensors file"):  # the content here is none
        hub.fetch_headers(checkpoint, [FILE])

    assert served.downloads()[FILE] == [(0, 3), (0, 8)]
