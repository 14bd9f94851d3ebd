"""Messages never lead an agent, or its children, out of the directories that they may use.

A member of the cluster is the attacker: it sends hostile messages, and answers hostilely when it
is asked for weights. Every process of the agent reports what it opens, by an audit hook.
"""

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support.cluster import HOST, AgentProgram, LocalCluster
from tests.support.tiny import tiny_config, write_model
from unicluster.checkpoints.checkpoint import MANIFEST
from unicluster.cluster.channels import SERVER_OPTIONS, connect_sync
from unicluster.v1.node_pb2 import Draft, InspectRequest, StageSpec, TryHubRequest
from unicluster.v1.node_pb2_grpc import NodeStub
from unicluster.v1.weights_pb2 import (
    Block,
    ByteRange,
    HaveRequest,
    HeldFile,
    Holdings,
    ModelFiles,
    RangesDigest,
    ReadRequest,
)
from unicluster.v1.weights_pb2_grpc import (
    WeightsServicer,
    WeightsStub,
    add_WeightsServicer_to_server,
)

ATTACKS = int(os.environ.get("UNICLUSTER_ATTACKS", "150"))
SEED = int(os.environ.get("UNICLUSTER_FUZZ_SEED", "14"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MARK = "the-cat-is-out-of-the-bag"

# In every Python process of the agent: which files below OUTSIDE it opens, makes or renames.
HOOK = """
import os, sys
_outside, _log = os.environ["TEST_OUTSIDE"], os.environ["TEST_OPENED"]
def _hook(event, args):
    if event in ("open", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove"):
        for path in args[:2]:
            if isinstance(path, (str, bytes)) and os.fsdecode(path).startswith("/"):
                real = os.path.realpath(os.fsdecode(path))
                if real.startswith(_outside):
                    descriptor = os.open(_log, os.O_WRONLY | os.O_APPEND)
                    os.write(descriptor, f"{event} {real}\\n".encode(errors="replace"))
                    os.close(descriptor)
sys.addaudithook(_hook)
"""


@dataclass
class Field:
    """An agent, and around it what nobody may get at through it."""

    cluster: LocalCluster
    agent: AgentProgram
    outside: Path
    opened: Path

    @property
    def targets(self) -> list[str]:
        """Paths that an attacker would like, absolute and from the cache."""
        cache = Path(self.cluster.env["HF_HOME"]) / "hub" / "models--org--x" / "unicluster"
        absolute = [self.outside, self.outside / "secret.txt", self.outside / "model"]
        return [*map(str, absolute), *(os.path.relpath(path, cache) for path in absolute)]


@pytest.fixture
def field(tmp_path: Path) -> Iterator[Field]:
    outside = tmp_path / "outside"
    write_model(outside / "model", tiny_config("llama"))
    for folder in (outside, outside / "model"):
        (folder / "secret.txt").write_text(MARK)
        (folder / "generation_config.json").write_text(json.dumps({"mark": MARK}))
        files = {"secret.txt": {"size": len(MARK), "checksum": ""}}
        manifest = {"model": "org/x", "revision": COMMIT, "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    opened = tmp_path / "opened"
    opened.touch()
    with LocalCluster(
        tmp_path / "cluster",
        HF_HOME=str(tmp_path / "cache"),
        TEST_OUTSIDE=str(outside),
        TEST_OPENED=str(opened),
    ) as cluster:
        python_path = f"{tmp_path / 'hook'}{os.pathsep}{cluster.env['PYTHONPATH']}"
        cluster.env["PYTHONPATH"] = python_path
        agent = cluster.start_agent("ann")
        cluster.wait_for_agents()
        (tmp_path / "cache" / "hub").mkdir(parents=True, exist_ok=True)
        yield Field(cluster, agent, outside, opened)


class HostileWeights(WeightsServicer):
    """A member that answers with whatever could lead out."""

    def __init__(self, words: list[str], rng: random.Random) -> None:
        self._words, self._rng = words, rng

    def Have(self, request: HaveRequest, context: Any) -> Holdings:  # noqa: N802
        choose = self._rng.choice
        names = ["config.json", "model.safetensors", MANIFEST, "x.held", *self._words]
        return Holdings(
            revision=choose([request.files.revision, COMMIT, *self._words]),
            files=[
                HeldFile(
                    name=choose(names),
                    size=choose([0, 10, 1 << 62]),
                    checksum=choose(["", COMMIT, *self._words]),
                    held=[ByteRange(start=0, end=10)],
                )
                for _ in range(3)
            ],
        )

    def Read(self, request: ReadRequest, context: Any) -> Iterator[Block]:  # noqa: N802
        yield Block(data=MARK.encode())
        yield Block(sha256=bytes(32))

    def Digest(self, request: ReadRequest, context: Any) -> RangesDigest:  # noqa: N802
        return RangesDigest(sha256=bytes(32))


def hostile_words(field: Field) -> list[str]:
    words = list(field.targets)
    words += [f"{COMMIT}/../{word}" for word in field.targets]
    words += [f"{word}\0" for word in field.targets[:2]]
    return [*words, "..", "../..", "/", "~", ".", "", "%2e%2e/", "org/x:../../..", COMMIT + "/.."]


def test_no_sequence_of_messages_leads_out(field: Field) -> None:
    rng = random.Random(SEED)
    words = hostile_words(field)
    secret_before = sorted(path for path in field.outside.rglob("*"))
    identity = field.cluster.cluster.issue("mallory")
    server = grpc.server(ThreadPoolExecutor(4), options=SERVER_OPTIONS)
    add_WeightsServicer_to_server(HostileWeights(words, rng), server)
    pair = (identity.key_pem.encode(), identity.cert_pem.encode())
    credentials = grpc.ssl_server_credentials([pair], identity.ca_pem.encode(), True)
    source = f"{HOST}:{server.add_secure_port(f'{HOST}:0', credentials)}"
    server.start()
    answers: list[str] = []

    def revision() -> str:
        return rng.choice([COMMIT, "", *words])

    def model() -> str:
        return rng.choice(["org/x", "org/x:q4_0", "demo", *words])

    def files() -> ModelFiles:
        return ModelFiles(model=model(), revision=revision())

    try:
        with connect_sync(field.agent.address, identity) as channel:
            node, weights = NodeStub(channel), WeightsStub(channel)
            attacks = {
                "have": lambda: weights.Have(HaveRequest(files=files()), timeout=20),
                "read": lambda: list(
                    weights.Read(
                        ReadRequest(
                            files=files(),
                            name=rng.choice(["secret.txt", "generation_config.json", *words]),
                            ranges=[ByteRange(start=0, end=len(MARK))],
                        ),
                        timeout=20,
                    )
                ),
                "digest": lambda: weights.Digest(
                    ReadRequest(files=files(), name="secret.txt", ranges=[]), timeout=20
                ),
                "inspect": lambda: node.Inspect(
                    InspectRequest(
                        model=model(),
                        revision=revision(),
                        drafts_for=rng.choice(["", *words]),
                        sources=rng.choice([[], [source]]),
                    ),
                    timeout=20,
                ),
                "hub": lambda: node.TryHub(
                    TryHubRequest(model=model(), revision=revision()), timeout=20
                ),
                "stage": lambda: next(
                    node.RunStage(
                        StageSpec(
                            model=model(),
                            revision=revision(),
                            end_layer=1,
                            sources=[source],
                            hub_files=[rng.choice(words)],
                            draft=Draft(model=rng.choice(words)),
                        ),
                        timeout=5,
                    )
                ),
            }
            for _ in range(ATTACKS):
                attack = rng.choice(list(attacks))
                try:
                    answers.append(str(attacks[attack]()))
                except grpc.RpcError as error:
                    answers.append(str(error.details()))
    finally:
        server.stop(grace=None)

    assert len(answers) == ATTACKS
    # Nothing of what lies outside comes back, by its content or by its path.
    assert not [answer for answer in answers if MARK in answer]
    # Nothing was made or changed there, and the secrets were not even opened.
    assert sorted(field.outside.rglob("*")) == secret_before
    opened = field.opened.read_text().splitlines()
    assert not [line for line in opened if "secret" in line or not line.startswith("open ")]
    assert not [line for line in opened if line.endswith(MANIFEST)]
    assert field.agent.running
    assert "Traceback" not in field.agent.err


def test_the_hook_sees_what_is_opened(field: Field) -> None:
    """Else the test above could not fail: a directory that is named with its state is read."""
    from unicluster.checkpoints.fingerprint import whole

    model = whole(field.outside / "model").manifest
    with connect_sync(field.agent.address, field.cluster.cluster.issue("bob")) as channel:
        layout = NodeStub(channel).Inspect(
            InspectRequest(model=model.model, revision=model.revision), timeout=120
        )

    assert layout.layer_bytes
    assert f"open {field.outside}/model/config.json" in field.opened.read_text()
