"""Services in the state file: noted, taken up by equal options, and damage that harms nobody."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.planning.links import Network
from coordinator.planning.placement import Plan
from coordinator.planning.stages import Span, stages
from coordinator.serving.inspected import Inspected
from coordinator.state import claim
from coordinator.state.claim import claimed
from coordinator.state.cut import Cut
from coordinator.state.database import MIGRATIONS, Database
from coordinator.state.services import Services
from tests.support.fleets import GB, a_layout, a_machine
from unicluster.errors import InputError
from unicluster.v1.node_pb2 import ModelLayout

ANN, BOB = a_machine("ann", GB, 100e9), a_machine("bob", GB, 50e9)
LAYOUT = a_layout([100_000] * 10)
SPANS = [Span(ANN, 0, 6, LAYOUT), Span(BOB, 6, 10, LAYOUT)]
PLAN = Plan("latency", 2, stages(Network(), SPANS), (), chunk_tokens=16)


@pytest.fixture
def services(tmp_path: Path) -> Services:
    return Services(Database(tmp_path / "state.sqlite3"))


def test_a_cut_comes_back_on_the_machines_as_they_are_now() -> None:
    again = Cut.from_json(Cut.of(PLAN).to_json()).on([BOB, ANN])

    assert again == PLAN


def test_a_cut_is_none_without_all_its_machines() -> None:
    assert Cut.of(PLAN).on([ANN]) is None


def changed(**values: Any) -> str:
    rows = json.loads(Cut.of(PLAN).to_json())
    rows["stages"][1] |= values
    return json.dumps(rows)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"stages": 3}',
        '{"stages": [], "objective": "latency", "users": 1, "chunk_tokens": 1, "gap": 0}',
        changed(first=5),
        changed(first=6, end=6),
        changed(end="10"),
        changed(shares=[[1]]),
        changed(seconds_per_token=None),
        Cut.of(PLAN).to_json().replace("latency", "beauty"),
        Cut.of(PLAN).to_json()[:-20],
    ],
)
def test_a_damaged_cut_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - JSON's own, too
        Cut.from_json(text)


@pytest.mark.parametrize("text", ["", "{}", "[]", "[null, null, null]", '["AAAA", null, null]'])
def test_damaged_sizes_are_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - JSON's own, too
        Inspected.from_json(text)


def test_sizes_come_back() -> None:
    layout = ModelLayout(
        layer_bytes=[1], layer_active_bytes=[1], kv_bytes_per_layer=[1], users=1, revision="r"
    )
    known = Inspected(layout, draft=layout)

    assert Inspected.from_json(known.to_json()) == known


def test_several_services_are_wanted_at_once_until_each_is_ended(services: Services) -> None:
    for name in ("llama", "qwen"):
        services.begin(name, "{}")
    services.keep("llama", "sizes", Cut.of(PLAN))

    llama, qwen = services.all()
    assert (llama.name, llama.inspected) == ("llama", "sizes")
    assert llama.cut is not None
    assert llama.cut.on([ANN, BOB]) == PLAN
    assert (qwen.name, qwen.inspected, qwen.cut) == ("qwen", None, None)

    services.end("llama")
    assert [each.name for each in services.all()] == ["qwen"]


def test_only_equal_options_take_up_what_was_known(services: Services) -> None:
    services.begin("llama", '{"users": 1}')
    services.keep("llama", "sizes", Cut.of(PLAN))

    assert services.begin("llama", '{"users": 1}').cut is not None
    assert services.begin("llama", '{"users": 2}').cut is None
    assert services.begin("llama", '{"users": 1}').cut is None


def test_a_state_file_of_the_first_version_is_migrated_and_keeps_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    with sqlite3.connect(path) as old:
        old.executescript(MIGRATIONS[0])
        old.execute("INSERT INTO keys (id, name, hash, created_s) VALUES ('1', 'ci', x'00', 0)")
        old.execute("PRAGMA user_version = 1")
    old.close()

    database = Database(path)

    assert Services(database).all() == []
    assert [row["name"] for row in database.rows("SELECT name FROM keys")] == ["ci"]


HOLDING = """
import asyncio, sys
from pathlib import Path
from coordinator.state.claim import claimed
async def hold():
    async with claimed("llama", "ann (ann:47700)", Path(sys.argv[1])):
        print("held", flush=True)
        await asyncio.Future()
asyncio.run(hold())
"""


def test_a_claim_is_one_process_s_and_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "WAIT_SECONDS", 0.2)

    async def take(service: str) -> None:
        async with claimed(service, "bob", tmp_path):
            pass

    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)], stdout=subprocess.PIPE, env=os.environ
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()

        with pytest.raises(InputError, match=r"llama is served already, from ann \(ann:47700\): "):
            asyncio.run(take("llama"))
        asyncio.run(take("qwen"))
        holder.send_signal(signal.SIGKILL)
        holder.wait()

    asyncio.run(take("llama"))
