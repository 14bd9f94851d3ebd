"""The state machine of a service, in every state that few events lead to."""

from collections.abc import Iterator
from itertools import pairwise

import pytest

from coordinator.recovery.lifecycle import (
    FIT_SECONDS,
    MOST_REST_SECONDS,
    MOST_TRIES,
    REST_SECONDS,
    SAME_SECONDS,
    Abandoned,
    Action,
    Actions,
    Asked,
    Broke,
    BrokenOff,
    End,
    Event,
    GoOn,
    Lost,
    Move,
    Opened,
    PauseOver,
    Phase,
    Planned,
    Prepared,
    State,
    Stopped,
    Surveyed,
    Wait,
    apply,
    fate,
)
from unicluster.errors import DoesNotFitError, StageError, StoppingError, UnavailableError

EVENTS: tuple[Event, ...] = (
    Planned(),
    Opened(),
    Broke("bob closed the connection"),
    Lost("bob is gone"),
    Lost("4 GB are missing", lacks_memory=True),
    Lost("bob is gone, and may come back", mendable=True),
    Lost("bob drains", move=Move.DRAIN),
    Lost("cid is faster", move=Move.BETTER),
    Surveyed(worth=True, at=100.0, settle=60.0),
    Surveyed(worth=True, at=170.0, settle=60.0),
    Surveyed(worth=True, at=9000.0, settle=60.0),
    Surveyed(worth=False, at=180.0, settle=60.0),
    Asked(at=200.0),
    Prepared(),
    Abandoned(),
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
            assert after == State(
                *(Phase.READY, state.ring + 1),
                begun=True,
                moved_at=state.moved_at,
                rest=state.rest,
            )


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


def test_one_that_never_answered_fails_where_no_retry_helps_and_one_that_did_never_does() -> None:
    for state, event, after, actions in STEPS:
        if isinstance(event, Lost) and state.phase is not after.phase:
            first = state.phase is Phase.PLANNING and not state.begun
            hopeless = first or not event.mendable
            assert (Action.FAIL in actions) == (state.ring == 0 and hopeless)
            assert (Action.ANNOUNCE_RETRY in actions) == (state.ring == 0 and not hopeless)
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
            assert (state.problem, state.stuck, state.lack) == ("", False, "")


# Moves to better plans


READY = State(Phase.READY, 1, begun=True)


def after(state: State, *events: Event) -> State:
    for event in events:
        state, _ = apply(state, event)
    return state


def surveyed(at: float, *, worth: bool = True) -> Surveyed:
    return Surveyed(worth, at, settle=60.0)


def test_a_move_begins_only_while_it_answers_and_one_at_a_time() -> None:
    for state, event, now, actions in STEPS:
        if Action.PREPARE in actions:
            assert isinstance(event, Surveyed | Asked)
            assert (state.phase, state.move) == (Phase.READY, None)
            assert (now.phase, now.move) == (Phase.READY, Move.PREPARING)
        if Action.EMPTY in actions:
            assert (state.move, now.move, now.phase) == (Move.PREPARING, Move.BETTER, Phase.READY)


def test_new_answers_wait_for_a_move_only_once_it_is_prepared() -> None:
    for state in STATES:
        assert state.moving == (state.move in (Move.DRAIN, Move.BETTER))
    assert not after(READY, Asked(0.0)).moving
    assert after(READY, Asked(0.0), Prepared()).moving
    assert not after(READY, Asked(0.0), Prepared(), Abandoned()).moving


def test_a_plan_must_be_better_for_a_while() -> None:
    """Figures that are measured anew come and go, and so do machines."""
    assert after(READY, surveyed(0.0)).move is None
    assert after(READY, surveyed(0.0), surveyed(59.9)).move is None
    assert after(READY, surveyed(0.0), surveyed(60.0)).move is Move.PREPARING
    interrupted = (surveyed(0.0), surveyed(50.0, worth=False), surveyed(60.0), surveyed(119.0))
    assert after(READY, *interrupted).move is None
    broken = (surveyed(0.0), Broke("bob is slow"), Opened(), surveyed(60.0))
    assert after(READY, *broken).move is None


def moved(state: State, at: float) -> State:
    """After a move that was decided at a time, and came to its end."""
    begins = (surveyed(at - 60), surveyed(at), Prepared(), Lost("cid is faster", move=Move.BETTER))
    return after(state, *begins, PauseOver(), Planned(), Opened())


def test_moves_are_some_time_apart_unless_somebody_asks() -> None:
    state = moved(READY, 1000.0)
    assert state.moved_at == 1000.0
    soon = 1000.0 + REST_SECONDS - 1
    assert after(state, surveyed(soon - 60), surveyed(soon)).move is None
    assert after(state, surveyed(soon - 60), surveyed(soon), surveyed(soon + 1)).move is not None
    assert after(state, Asked(soon)).move is Move.PREPARING


def test_a_machine_that_comes_and_goes_moves_layers_ever_more_rarely() -> None:
    state, at, gaps = READY, 1000.0, []
    for _ in range(8):
        begun = at
        while after(state, surveyed(at - 60), surveyed(at)).move is None:
            at += 60.0
        state = moved(state, at)
        state = after(state, Lost("cid is gone"), PauseOver(), Planned(), Opened())
        gaps.append(at - begun)
        at += 60.0

    assert gaps == sorted(gaps)
    assert gaps[-1] > 5 * gaps[1]
    assert state.rest == MOST_REST_SECONDS
    steady = moved(state, at + 2 * MOST_REST_SECONDS)
    assert steady.rest == REST_SECONDS


def test_a_plan_that_comes_to_nothing_is_left_for_the_one_that_stood() -> None:
    for state, event, now, actions in STEPS:
        fruitless = state.move is Move.BETTER and state.phase in (Phase.PLANNING, Phase.LOADING)
        lost = isinstance(event, Lost) and state.phase is not now.phase
        assert (Action.GO_BACK in actions) == (fruitless and lost), (state, event)
        if Action.GO_BACK in actions:
            assert now.move is not Move.BETTER or event == Lost("cid is faster", move=Move.BETTER)
            assert now.rest > state.rest or now.rest == MOST_REST_SECONDS


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
        (State(Phase.ENDED, 1), broken_off(), StoppingError, "the model is being unloaded"),
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


@pytest.mark.parametrize("phase", [Phase.LOADING, Phase.READY, Phase.REOPENING])
@pytest.mark.parametrize("comes_back", [True, False])
def test_a_service_that_comes_back_leaves_its_stages(phase: Phase, comes_back: bool) -> None:
    state, actions = apply(State(phase), Stopped(comes_back))

    assert state.phase is Phase.ENDED
    assert (Action.LEAVE_STAGES in actions) == comes_back
    assert (Action.END_STAGES in actions) != comes_back
