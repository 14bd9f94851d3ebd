"""More caches than llama.cpp keeps apart: the least recently used are on the host meanwhile."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

from node.ggml.memory.places import SAVED_PER_PLACE, Places
from tests.support.ggml_stages import TOKENS, Hop, Tiny, array_of, close, make, through, unsplit
from unicluster.errors import StageError
from unicluster.v1.stage_pb2 import CacheOp

PLACES = 6  # of a model with states, for one user
MANY = 7  # caches
PROMPTS = [TOKENS[i : i + 5 + i] for i in range(MANY)]


def free(number: int) -> CacheOp:
    return CacheOp(cache=number, free=CacheOp.Free())


def copy(number: int, source: int) -> CacheOp:
    return CacheOp(cache=number, copy=CacheOp.Copy(source=source))


def alone(tiny: Tiny) -> list[Any]:
    """Logits of each prompt, and of two tokens after it."""
    return unsplit(tiny.file, [[prompt, [7], [9]] for prompt in PROMPTS])


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return Tiny.make(tmp_path, "qwen3next", 8)


def prefilled(hops: Sequence[Hop], wanted: list[Any]) -> None:
    for number, prompt in enumerate(PROMPTS, start=1):
        assert close(through(list(hops), [prompt], number, make(number))[0], wanted[number - 1][0])


def test_each_goes_on_where_it_was(tiny: Tiny) -> None:
    wanted = alone(tiny)
    hops = tiny.stages(0, 4, 8, users=1)

    prefilled(hops, wanted)

    for step, token in enumerate((7, 9), start=1):
        for number in range(1, 1 + MANY):
            assert close(through(hops, [[token]], number)[0], wanted[number - 1][step])


def test_a_batch_of_as_many_as_there_are_places(tiny: Tiny) -> None:
    wanted = alone(tiny)
    hops = tiny.stages(0, 4, 8, users=1)
    prefilled(hops, wanted)
    merge = CacheOp(cache=50, merge=CacheOp.Merge(sources=range(1, 1 + PLACES)))

    got = through(hops, [[7]] * PLACES, 50, merge)  # each has a copy of its own
    again = through(hops, [[7]], 1)

    assert all(close(got[i], wanted[i][1]) for i in range(PLACES))
    assert close(again[0], wanted[0][1])


def test_copies_of_saved_ones_go_their_own_way(tiny: Tiny) -> None:
    wanted = alone(tiny)
    hops = tiny.stages(0, 4, 8, users=1)
    prefilled(hops, wanted)

    first = through(hops, [[200]], 51, copy(51, 1))
    second = through(hops, [[7]], 52, copy(52, 1), free(1))

    assert not close(first[0], wanted[0][1])
    assert close(second[0], wanted[0][1])


def test_empty_ones_may_be_saved(tiny: Tiny) -> None:
    """A cache of a state that nobody computed with has a place as soon as it is merged."""
    wanted = alone(tiny)
    hops = tiny.stages(0, 4, 8, users=1)
    for hop in hops:
        hop.serve(None, 0, make(40), CacheOp(cache=41, merge=CacheOp.Merge(sources=[40])))
    prefilled(hops, wanted)

    got = through(hops, [PROMPTS[3]], 41)

    assert close(got[0], wanted[3][0])


def test_what_is_saved_is_freed_and_stored_as_any(tiny: Tiny) -> None:
    hop = tiny.stages(0, 8, users=1)[0]
    wanted = alone(tiny)
    prefilled([hop], wanted)
    state = hop.serve(None, 0, CacheOp(cache=1, fetch=CacheOp.Fetch(entry=0))).reports[0].state
    store = CacheOp(cache=60, store=CacheOp.Store(entry=0, kind=state.kind, state=state.state))

    hop.serve(None, 0, *(free(number) for number in range(1, 1 + MANY)))
    got = array_of(hop.serve(np.array([[7]], np.uint32), 60, make(60), store))

    assert close(got[0], wanted[0][1])
    query = CacheOp(cache=60, query=CacheOp.Query())
    assert hop.serve(None, 0, query).reports[0].answer.live == 1


def test_guesses_are_rolled_back_among_saved_ones(tiny: Tiny) -> None:
    wanted = alone(tiny)
    hops = tiny.stages(0, 4, 8, users=1)
    prefilled(hops, wanted)
    snapshot = CacheOp(cache=70, snapshot=CacheOp.Snapshot(source=2))
    restore = CacheOp(cache=2, restore=CacheOp.Restore(snapshot=70, tokens=3))

    through(hops, [[30, 31, 32]], 2, snapshot)
    for number in range(3, 1 + MANY):
        through(hops, [[7]], number)
    got = through(hops, [[7]], 2, restore, free(70))

    assert close(got[0], wanted[1][1])


class Counted:
    """A memory of two sequences, each of which holds some tokens; four tokens fit."""

    recurrent = False
    sequences = 2
    host_bytes = 100

    def __init__(self) -> None:
        self.tokens = {0: 0, 1: 0}

    def copy(self, source: int, to: int, tokens: int) -> None:
        self.tokens[to] = tokens

    def trim(self, sequence: int, tokens: int) -> None:
        self.tokens[sequence] = min(tokens, self.tokens[sequence])

    def state_size(self, sequence: int) -> int:
        return 1

    def fixed_size(self, sequence: int) -> int:
        return 0

    def shortest(self, sequence: int, *, saved: bool = False) -> int:
        return 0

    def state(self, sequence: int) -> Any:
        return np.array([self.tokens[sequence]], np.uint8)

    def restore(self, sequence: int, state: Any) -> None:
        if sum(self.tokens.values()) + int(state[0]) > 4:
            raise StageError("no room")
        self.tokens[sequence] = int(state[0])


def test_others_make_room_for_one_that_comes_back() -> None:
    memory = Counted()
    places = Places(memory)
    first, second, third = (places.new() for _ in range(3))
    memory.tokens[places.bring(first)] = 3
    memory.tokens[places.bring(second)] = 2  # the first one leaves for it

    places.bring(third)
    number = places.bring(first)

    assert memory.tokens[number] == 3
    assert memory.tokens[places.bring(second)] == 2


def test_what_has_no_room_stays_saved() -> None:
    memory = Counted()
    places = Places(memory)
    first = places.new()
    memory.tokens[first.number] = 3
    second = places.new()
    third = places.new()  # the first one leaves for it
    memory.tokens[places.bring(second)] = 2
    places.release(third)

    with pytest.raises(StageError, match="no room"):
        places.bring(first, [second])

    memory.trim(second.number, 1)
    assert memory.tokens[places.bring(first, [second])] == 3


def test_the_host_keeps_no_more_bytes_than_are_planned() -> None:
    memory = Counted()
    memory.host_bytes = 1
    places = Places(memory)
    made = [places.new() for _ in range(3)]

    with pytest.raises(StageError, match="3 caches are all"):
        places.new()
    places.release(made[0])  # which is there
    assert places.saved_bytes == 0
    assert places.new().number in (0, 1)


def test_one_that_is_too_large_for_the_host_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Counted()
    memory.host_bytes = 3
    places = Places(memory)
    large, small = places.new(), places.new()
    sizes = {large.number: 4, small.number: 2}
    monkeypatch.setattr(memory, "state_size", sizes.__getitem__)

    places.new()

    assert large.state is None
    assert small.state is not None


def test_too_many_are_refused() -> None:
    places = Places(Counted())
    made = [places.new() for _ in range(2 * (1 + SAVED_PER_PLACE))]

    with pytest.raises(StageError, match="6 caches are all"):
        places.new()
    with pytest.raises(StageError, match="6 caches are all"):
        places.bring(made[0], made[-2:])
    places.release(made[0])
    assert places.new().number in (0, 1)
