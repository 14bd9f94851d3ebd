"""Failpoints: what their variable may say, and what happens where they are reached."""

import asyncio
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chaos import points
from unicluster import failpoints
from unicluster.failpoints import FailpointError


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> object:
    return lambda text: monkeypatch.setattr(failpoints, "_points", failpoints.parse(text))


def errors(times: int, name: str = "a.b") -> list[int]:
    """The hits, from 1, at which reaching the place raised."""
    raised = []
    for hit in range(1, times + 1):
        try:
            failpoints.reach(name)
        except FailpointError:
            raised.append(hit)
    return raised


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("a.b=error", [1, 2, 3, 4]),
        ("a.b=error@2", [2]),
        ("a.b=error@3+", [3, 4]),
        ("c.d=error", []),
        ("c.d=error; a.b=error(no room)@4", [4]),
        ("", []),
    ],
)
def test_it_acts_at_the_hits_that_were_asked_for(arm, text: str, at: list[int]) -> None:  # type: ignore[no-untyped-def]
    arm(text)

    assert errors(4) == at


@pytest.mark.parametrize(
    "text", ["a.b", "a.b=", "a.b=explode", "a.b=delay", "a.b=delay(x)", "a.b=hang@0", "A=hang"]
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no failpoint"):
        failpoints.parse(text)


def test_a_delay_is_over_in_time(arm) -> None:  # type: ignore[no-untyped-def]
    arm("a.b=delay(50)")
    began = time.monotonic()

    failpoints.reach("a.b")

    assert time.monotonic() - began >= 0.05


async def test_an_event_loop_goes_on_while_one_place_hangs(arm) -> None:  # type: ignore[no-untyped-def]
    arm("a.b=hang")
    hanging = asyncio.create_task(failpoints.reach_async("a.b"))

    await failpoints.reach_async("another.place")
    await asyncio.sleep(0)

    assert not hanging.done()
    hanging.cancel()


def test_a_panic_ends_the_process_at_once() -> None:
    program = "from unicluster import failpoints\ntry: failpoints.reach('a.b')\nfinally: print('x')"

    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": ":".join(sys.path), failpoints.VARIABLE: "a.b=panic"},
        capture_output=True,
    )

    assert ended.returncode == failpoints.PANIC_CODE
    assert ended.stdout == b""


def test_a_file_arms_a_process_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "points"
    monkeypatch.setattr(failpoints, "LOOK_SECONDS", -1.0)
    monkeypatch.setattr(failpoints, "_points", failpoints._of_environment(f"@{file}"))

    def put(text: str) -> None:
        fresh = tmp_path / "fresh"
        fresh.write_text(text)
        fresh.replace(file)

    assert errors(2) == []
    put("a.b=error@2")
    assert errors(3) == [2]
    assert errors(3) == []  # it was the second time since the file came
    put("a.b=error@1;c.d=error")
    assert errors(2) == [1]
    assert errors(2, "c.d") == [1, 2]
    file.unlink()
    assert errors(2, "c.d") == []


def test_every_place_is_struck_by_chaos_or_a_test() -> None:
    root = Path(failpoints.__file__).parents[1]

    def texts(*rooms: str) -> list[str]:
        return [file.read_text() for room in rooms for file in (root / room).rglob("*.py")]

    code = texts("unicluster", "coordinator", "node")
    named = re.compile(r'failpoints\.reach(?:_async)?\("([a-z_.]+)"\)')
    reached = [name for text in code for name in named.findall(text)]
    calls = sum(len(re.findall(r"failpoints\.reach", text)) for text in code)
    chaos = {point for kind in points.KINDS for point in kind}
    tests = texts("tests")

    assert len(reached) == calls, "a place has no name that can be read in the code"
    assert chaos <= set(reached)
    left = set(reached) - chaos
    assert [name for name in sorted(left) if not any(f"{name}=" in text for text in tests)] == []
