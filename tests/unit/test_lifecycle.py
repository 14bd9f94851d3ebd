"""The state machine of a service, in every state that few events lead to."""

from collections.abc import Iterator
from itertools import pairwise

import pytest

from coordinator.recovery.lifecycle import (
    FIT_SECONDS,
    MOST_TRIES,
    SAME_SECONDS,
    Action,
    Actions,
    Broke,
    BrokenOff,
    End,
    Event,
    GoOn,
    Lost,
    Opened,
    PauseOver,
    Phase,
    Planned,
    State,
    Stopped,
    Wait,
    apply,
    fate,
)
from unicluster.errors import DoesNotFitError, StageError, UnavailableError

EVENTS: tuple[Event, ...] = (
    Planned(),
    Opened(),
    Broke("bob closed the connection"),
    Lost("bob is gone"),
    Lost("4 GB are missing", lacks_memory=True),
    Lost("bob drains", drained=True),
    PauseOver(),
    Stopped(),
)
DEPTH = 8
MOVES = {
    (Phase.PLANNING, Phase.LOADING),
    (Phase.PLANNING, Phase.WAITING),
    (Phase.PLANNING, Phase.ENDED),
    (Phase.LOADING, Phase.READY),
    (Phase.LOADING, Phase.WAITING),
    (Phase.LOADING, Phase.ENDED),
    (Phase.READY, Phase.REOPENING),
    (Phase.READY, Phase.WAITING),
    (Phase.READY, Phase.ENDED),
    (Phase.REOPENING, Phase.READY),
    (Phase.REOPENING, Phase.WAITING),
    (Phase.REOPENING, Phase.ENDED),
    (Phase.WAITING, Phase.PLANNING),
    (Phase.WAITING, Phase.ENDED),
}
STANDING = {Phase.LOADING, Phase.READY, Phase.REOPENING}

Step = tuple[State, Event, State, Actions]


def steps(depth: int = DEPTH) -> Iterator[Step]:
    """Every step from every state that so many events lead to, each state once."""
    known, fresh = {State()}, [State()]
    for _ in range(depth):
        found = []
        for state in fresh:
            for event in EVENTS:
                after, actions = apply(state, event)
                yield state, event, after, actions
                if after not in known:
                    known.add(after)
                    found.append(after)
        fresh = found


STEPS = list(steps())
STATES = list({state for state, *_ in STEPS} | {after for _, _, after, _ in STEPS})


def test_there_are_states_of_all_phases_and_names() -> None:
    assert {state.phase for state in STATES} == set(Phase)
    assert {state.name for state in STATES} == {"loading", "ready", "recovering", "failed"}
    assert {action for *_, actions in STEPS for action in actions} == set(Action)


def test_only_legal_moves_are_made_and_each_is() -> None:
    made = {(a.phase, b.phase) for a, _, b, _ in STEPS if a.phase is not b.phase}
    assert made == MOVES


def test_what_means_nothing_changes_nothing() -> None:
    for state, event, after, actions in STEPS:
        if state == after:
            assert not actions, (state, event)
        if state.phase is Phase.ENDED:
            assert after == state


def test_stages_are_let_go_of_exactly_when_they_stood() -> None:
    let_go = {Action.LEAVE_STAGES, Action.END_STAGES}
    for state, event, after, actions in STEPS:
        ended = state.phase in STANDING and after.phase not in STANDING
        assert len(let_go.intersection(actions)) == ended, (state, event)
        loads = state.phase not in STANDING and after.phase in STANDING
        assert (Action.LOAD in actions) == loads, (state, event)


def test_what_follows_is_always_set_in_motion() -> None:
    for state, event, after, actions in STEPS:
        if after.phase is Phase.PLANNING and state != after:
            assert Action.PLAN in actions
        if after.phase is Phase.WAITING and state != after:
            assert len({Action.PAUSE, Action.PAUSE_BRIEFLY}.intersection(actions)) == 1
        if after.phase is Phase.ENDED and state != after:
            assert (Action.FAIL in actions) != isinstance(event, Stopped)


def test_clients_learn_of_each_loss_and_each_return_once() -> None:
    for state, event, after, actions in STEPS:
        lost = state.phase is Phase.READY and after.phase is not Phase.READY
        stops = isinstance(event, Stopped)
        assert actions.count(Action.ANNOUNCE_LOSS) == (lost and not stops), (state, event)
        back = after.phase is Phase.READY and state.phase is not Phase.READY
        said = [Action.ANNOUNCE_READY, Action.ANNOUNCE_RECOVERED]
        assert sum(map(actions.count, said)) == back
        if back:
            assert (Action.ANNOUNCE_READY in actions) == (state.ring == 0)
            assert after == State(Phase.READY, state.ring + 1)


def test_answers_are_woken_whenever_their_fate_may_change() -> None:
    for state, event, after, actions in STEPS:
        if Action.WAKE_ANSWERS in actions:
            continue
        for waited in (0.0, FIT_SECONDS, 100.0):
            answer = broken_off(ring=state.ring, waited=waited)
            before, now = (fate(each, answer, "llama") for each in (state, after))
            if type(before) is not type(now):
                # With a plan there is hope again: then answers wait, which ends nothing.
                assert isinstance(now, Wait) or state.ring == 0, (state, event)


def test_a_service_that_never_answered_fails_and_one_that_did_never_does() -> None:
    for state, event, after, actions in STEPS:
        if isinstance(event, Lost) and state.phase is not after.phase:
            assert (Action.FAIL in actions) == (state.ring == 0)
    for state in STATES:
        if state.phase is Phase.ENDED:
            continue
        assert "ready" in names_after(state, Planned(), Opened()) | names_after(
            state, PauseOver(), Planned(), Opened()
        )


def names_after(state: State, *events: Event) -> set[str]:
    names = {state.name}
    for event in events:
        state, _ = apply(state, event)
        names.add(state.name)
    return names


def test_a_problem_is_there_whenever_it_does_not_answer_after_it_did() -> None:
    for state in STATES:
        if state.phase in (Phase.REOPENING, Phase.WAITING):
            assert state.problem
        if state.phase is Phase.READY:
            assert (state.problem, state.stuck, state.lack, state.moving) == ("", False, "", False)


# Answers


def broken_off(
    ring: int = 1, tries: int = 1, waited: float = 0.0, limit: float = 300.0
) -> BrokenOff:
    return BrokenOff(ring, StageError("machine bob failed"), tries, waited, waited, limit)


ANSWERS = [
    broken_off(ring, tries, waited, limit)
    for ring in (1, 2)
    for tries in (1, 2, MOST_TRIES, MOST_TRIES + 1)
    for waited in (0.0, 1.0, FIT_SECONDS, 30.0, 299.9, 300.0, 1e6)
    for limit in (0.5, 300.0)
]


def test_no_answer_is_lost_silently_and_none_waits_for_ever() -> None:
    for state in STATES:
        for answer in ANSWERS:
            match fate(state, answer, "llama"):
                case GoOn():
                    assert state.phase is Phase.READY
                    assert answer.ring != state.ring or answer.waited >= SAME_SECONDS
                    assert answer.tries <= MOST_TRIES
                case Wait(seconds):
                    assert 0 < seconds <= answer.limit - answer.waited
                case End(error):
                    assert "\n" not in str(error)
                    if state.phase is not Phase.ENDED:
                        assert "machine bob" in str(error)
            if answer.waited >= answer.limit:
                assert not isinstance(fate(state, answer, "llama"), Wait)


def test_an_answer_that_looks_again_when_it_is_to_comes_to_an_end() -> None:
    for state in STATES:
        for ring in (1, 2):
            waited, looks = 0.0, 0
            while isinstance(decided := fate(state, broken_off(ring, 3, waited), "llama"), Wait):
                waited, looks = waited + decided.seconds, looks + 1
                assert looks < 5
            assert isinstance(decided, GoOn | End)


@pytest.mark.parametrize(
    ("state", "answer", "error", "words"),
    [
        (
            State(Phase.WAITING, 1, "x", lack="4 GB are missing"),
            broken_off(waited=FIT_SECONDS),
            DoesNotFitError,
            "machine bob failed; llama can't go on: 4 GB are missing",
        ),
        (
            State(Phase.READY, 7),
            broken_off(tries=MOST_TRIES + 1),
            StageError,
            "machine bob failed; the answer was given up after 6 attempts to go on",
        ),
        (
            State(Phase.LOADING, 1, "bob is gone"),
            broken_off(waited=300.0),
            UnavailableError,
            "machine bob failed; the answer has waited 300 s: llama is recovering: bob is gone",
        ),
        (State(Phase.ENDED, 1), broken_off(), UnavailableError, "the model is being unloaded"),
    ],
    ids=["no room", "tries", "time", "the end"],
)
def test_errors_say_what_happened(
    state: State, answer: BrokenOff, error: type[Exception], words: str
) -> None:
    decided = fate(state, answer, "llama")
    assert isinstance(decided, End)
    assert type(decided.error) is error
    assert str(decided.error) == words


def test_pauses_before_tries_double() -> None:
    ready = State(Phase.READY, 9)
    pauses = []
    for tries in range(2, MOST_TRIES + 1):
        decided = fate(ready, broken_off(tries=tries), "llama")
        assert isinstance(decided, Wait)
        pauses.append(decided.seconds)
    assert all(after == 2 * before for before, after in pairwise(pauses))
