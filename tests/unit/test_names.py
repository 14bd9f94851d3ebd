"""Names that become paths, and the requests that bring them."""

import os
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.agent.admission import check_inspect, check_stage, check_try_hub
from unicluster.checkpoints.checkpoint import MANIFEST, Checkpoint, File, Manifest
from unicluster.checkpoints.fingerprint import whole_directory
from unicluster.checkpoints.names import FileName, ModelName, Revision
from unicluster.errors import DoesNotFitError, InputError
from unicluster.v1.node_pb2 import DeviceShare, Draft, InspectRequest, StageSpec, TryHubRequest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What paths are made of when somebody means harm.
PIECES = st.sampled_from(
    [
        *("..", ".", "", "/", "\\", "a", "etc", "~", "\0", "\n", "%2e%2e", "\uff0e\uff0e", "model"),
        *(":", "C:", MANIFEST, "x.held", "x.part", COMMIT, "\u202e", "\x1b[2J", "-rf", "$HOME"),
    ]
)
HOSTILE = st.one_of(
    st.text(max_size=40),
    st.lists(PIECES, max_size=8).map("/".join),
    st.lists(PIECES, max_size=8).map("".join),
)


@given(HOSTILE)
@settings(max_examples=500, deadline=None)
def test_no_file_name_leads_out_of_its_directory(text: str) -> None:
    try:
        name = FileName(text)
    except InputError:
        return
    root = Path("/srv/models/x")
    joined = Path(os.path.normpath(root / name))

    assert root in joined.parents
    assert str(joined) == f"{root}/{name}"
    assert not any(part.startswith(".") for part in joined.relative_to(root).parts)
    assert name.isprintable() or " " in name or not name.isascii()


@given(HOSTILE)
@settings(max_examples=500, deadline=None)
def test_no_revision_is_anything_but_hex_digits(text: str) -> None:
    try:
        revision = Revision(text)
    except InputError:
        return

    assert set(revision) <= set(string.hexdigits.lower())
    assert len(revision) in (40, 64)


@given(HOSTILE)
@settings(max_examples=500, deadline=None)
def test_a_model_is_a_simple_path_or_the_name_of_a_repository(text: str) -> None:
    try:
        model = ModelName(text)
    except InputError:
        return

    assert os.path.normpath(model) == model
    assert ".." not in model.split("/")
    if not model.startswith("/"):
        assert model.count("/") <= 1


@pytest.mark.parametrize("text", [COMMIT[:-1], COMMIT + "0", COMMIT.upper(), f"{COMMIT}\n", ""])
def test_nearly_a_revision(text: str) -> None:
    with pytest.raises(InputError, match="invalid revision"):
        Revision(text)


@pytest.mark.parametrize(
    "text",
    ["demo", "gpt2", "deepseek-ai/DeepSeek-R1", "me/big-GGUF:ud-q2_k_xl", "/m/it's [a] *model?"],
)
def test_names_of_models_that_people_have(text: str) -> None:
    assert ModelName(text) == text


@pytest.mark.parametrize(
    "text",
    ["model.safetensors", "Q4_K_M/big-00001-of-00002.gguf", "tokenizer config.json", "größe.json"],
)
def test_names_of_files_that_people_have(text: str) -> None:
    assert FileName(text) == text


@pytest.mark.parametrize(
    "file",
    [
        {"size": -1},
        {"size": 1 << 60},
        {"size": 1, "checksum": "../../../etc/passwd"},
        {"size": 1, "checksum": COMMIT.upper()},
        {"size": 1, "checksum": f"{COMMIT}\n"},
    ],
)
def test_a_file_that_can_not_be(file: dict[str, object]) -> None:
    with pytest.raises(InputError, match="invalid"):
        File(**file)  # type: ignore[arg-type]


def test_a_manifest_has_only_good_names() -> None:
    with pytest.raises(InputError, match="revision"):
        Manifest("me/x", "../../secrets", {})
    with pytest.raises(InputError, match="name of a model"):
        Manifest("../x", COMMIT, {})
    with pytest.raises(InputError, match="name of a model's file"):
        Manifest("me/x", COMMIT, {MANIFEST: File(1)})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b'{"model": 1}',
        b'{"model": "me/x", "revision": "../..", "files": {}}',
        b'{"model": "me/x", "revision": "%s", "files": {"../../x": {"size": 1}}}' % COMMIT.encode(),
        b'{"model": "me/x", "revision": "%s", "files": {"x": {"size": "1"}}}' % COMMIT.encode(),
    ],
)
def test_a_damaged_manifest_is_no_copy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)

    assert Checkpoint.open(tmp_path) is None


def test_a_copy_is_opened_only_below_its_root(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    copy = Checkpoint.create(tmp_path / "copy", Manifest("me/x", COMMIT, {"a.json": File(6)}))

    for name in ("../secret", str(tmp_path / "secret"), MANIFEST):
        with pytest.raises(InputError):
            copy.read(name, 0, 6)
        with pytest.raises(InputError):
            copy.put(name, b"x")
        with pytest.raises(InputError):
            copy.link(name, tmp_path / "secret")


def test_a_sparse_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    copy = Checkpoint.create(tmp_path / "copy", Manifest("me/x", COMMIT, {"a.json": File(6)}))
    (copy.root / "a.json").symlink_to(tmp_path / "secret")

    copy.write("a.json", 0, b"broken")

    assert (tmp_path / "secret").read_text() == "secret"


# Links in a directory that is served


def test_links_that_lead_out_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "secret.json").write_text("{}")
    served = tmp_path / "served"
    served.mkdir()
    (served / "config.json").write_text("{}")
    (served / "stolen.json").symlink_to("../secret.json")
    (served / "alias.json").symlink_to("config.json")
    (served / "dangling.json").symlink_to("nowhere")
    (served / "loop.json").symlink_to("loop.json")

    assert set(whole_directory(served).manifest.files) == {"config.json", "alias.json"}
    assert "stolen.json leads out of its directory" in caplog.text


def test_the_links_of_a_snapshot_in_the_cache_lead_to_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--me--x"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "b").write_text("{}")
    (tmp_path / "other.json").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/b")
    (snapshot / "stolen.json").symlink_to("../../../other.json")

    assert set(whole_directory(snapshot).manifest.files) == {"config.json"}


# What an agent is asked


def good(**fields: object) -> StageSpec:
    known = {"model": "me/x", "revision": COMMIT, "end_layer": 4, "memory": 100}
    return StageSpec(**(known | fields))  # type: ignore[arg-type]


def test_a_good_stage_is_let_in() -> None:
    check_stage(good(sources=[":7", "10.0.0.2:47700", "[fe80::1]:80"]), 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"revision": "../../.."}, "revision"),
        ({"model": "/etc", "revision": ""}, "needs its revision"),
        ({"model": "/etc/../root", "revision": COMMIT}, "name of a model"),
        ({"hub_files": ["../x"]}, "name of a model's file"),
        ({"draft": Draft(model="me/x", hub_files=["/etc/passwd"])}, "name of a model's file"),
        ({"draft": Draft(model="..")}, "name of a model"),
        ({"sources": ["nowhere"]}, "no address"),
        ({"sources": [":1"] * 2000}, "sources: 2000"),
        ({"first_layer": 5}, "invalid range"),
        ({"end_layer": 1 << 20}, "end_layer"),
        ({"context": 1 << 40}, "context"),
        ({"deployment": "x\x1b[2J"}, "deployment: invalid"),
        ({"quant": "q" * 1000}, "quant: invalid"),
        ({"devices": [DeviceShare(name="CUDA0\x1b[2J")]}, "devices: invalid"),
        ({"devices": [DeviceShare(name="CUDA0")] * 65}, "devices: 65"),
    ],
)
def test_an_invalid_stage_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        check_stage(good(**fields), 0)

    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def test_a_stage_that_has_no_place_is_refused() -> None:
    with pytest.raises(DoesNotFitError, match="64 stages"):
        check_stage(good(), 64)


@pytest.mark.parametrize(
    "request_",
    [
        InspectRequest(model="/root"),
        InspectRequest(model="me/x", revision="../.."),
        InspectRequest(model="me/x", drafts_for="/etc"),
        InspectRequest(model="x", config_json="{" * (5 << 20)),
        InspectRequest(model="me/x", users=1 << 30),
    ],
)
def test_an_invalid_inspection_is_refused(request_: InspectRequest) -> None:
    with pytest.raises(InputError):
        check_inspect(request_)


def test_only_repositories_are_asked_for_at_the_hub() -> None:
    check_try_hub(TryHubRequest(model="me/x"))
    with pytest.raises(InputError, match="a directory"):
        check_try_hub(TryHubRequest(model="/etc", revision=COMMIT))
