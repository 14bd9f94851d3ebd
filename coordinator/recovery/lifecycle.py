"""The state machine of a service: what its deployments, and the answers of its clients, do next.

`apply` and `fate` are pure: they decide, and the service and the gateway carry their decisions out.
Times are seconds.
"""

from dataclasses import dataclass, replace
from enum import Enum

from unicluster.errors import DoesNotFitError, StoppingError, UnavailableError, UniclusterError

# A head that failed one answer and goes on: until the answer is tried on it again.
SAME_SECONDS = 3.0
# What was lost may come back, or its memory, within this; then answers end for lack of it.
FIT_SECONDS = 3.0
# Heads that an answer is tried on with no more of it for its client than before.
MOST_TRIES = 5
# Before an answer is tried again where the last try came to nothing; doubles.
TRY_SECONDS = 0.25
# Between two moves to a better plan; doubles with each that came to nothing or ended in a loss.
REST_SECONDS = 300.0
MOST_REST_SECONDS = 3600.0


class Move(Enum):
    """Why the layers are about to leave machines that are there, or on their way."""

    DRAIN = "a machine asked to be let go of"
    PREPARING = "a better plan was chosen: machines that it adds load before others let go"
    BETTER = "a better plan is prepared: running answers end, or break off and go on there"


class Phase(Enum):
    PLANNING = "machines are asked and a placement is searched"
    LOADING = "stages load, and their ring is opened for the first time"
    READY = "answers run"
    REOPENING = "the ring broke; its stages stand, or their workers start anew"
    WAITING = "the deployment is gone: until machines change, or a pause is over"
    ENDED = "serving was told to end, or the first deployment came to nothing"


@dataclass(frozen=True)
class State:
    """problem: why it does not answer. ring: rings opened so far.

    stuck: the last deployment never answered, or none could be planned. lack: what the model's
    memory lacks, in a sentence, by the last plan. begun: a deployment was loaded, or began to be.
    worth_since: since when another plan has been better by the margin. moved_at: when the last move
    to a better plan was decided; rest: seconds from there to the next one. By one clock.
    """

    phase: Phase = Phase.PLANNING
    ring: int = 0
    problem: str = ""
    stuck: bool = False
    lack: str = ""
    begun: bool = False
    move: Move | None = None
    worth_since: float | None = None
    moved_at: float | None = None
    rest: float = REST_SECONDS

    @property
    def moving(self) -> bool:
        """Whether new answers wait until others have taken over."""
        return self.move in (Move.DRAIN, Move.BETTER)

    @property
    def name(self) -> str:
        """The state as clients see it: loading, ready, recovering or failed."""
        if self.stuck:
            return "failed"
        if self.phase is Phase.READY:
            return "ready"
        return "recovering" if self.ring else "loading"


@dataclass(frozen=True)
class Planned:
    """A placement was chosen."""


@dataclass(frozen=True)
class Opened:
    """The ring is open: its head answers."""


@dataclass(frozen=True)
class Broke:
    """The ring is not open any more, or could not be opened."""

    reason: str


@dataclass(frozen=True)
class Lost:
    """A deployment can't go on, or none could be planned.

    lacks_memory: because the model does not fit. mendable: planning again may be of help, although
    no deployment has answered yet. move: the layers leave on purpose.
    """

    reason: str
    lacks_memory: bool = False
    mendable: bool = False
    move: Move | None = None


@dataclass(frozen=True)
class Surveyed:
    """The machines were looked at, at a time, for a plan that is better than the one that stands.

    worth: it is, by the margin. settle: seconds for which that must be so.
    """

    worth: bool
    at: float
    settle: float


@dataclass(frozen=True)
class Asked:
    """Somebody asks for the move to a better plan now."""

    at: float


@dataclass(frozen=True)
class Prepared:
    """The machines that a better plan adds have loaded their layers."""


@dataclass(frozen=True)
class Abandoned:
    """A better plan could not be prepared; the one that stands answers as before."""


@dataclass(frozen=True)
class PauseOver:
    """Machines have changed, or it is time to try again."""


@dataclass(frozen=True)
class Stopped:
    """Serving is to end. comes_back: soon it begins anew, and takes up the stages as they stand."""

    comes_back: bool = False


Event = (
    Planned | Opened | Broke | Lost | Surveyed | Asked | Prepared | Abandoned | PauseOver | Stopped
)


class Action(Enum):
    PLAN = "ask the machines and search a placement"
    LOAD = "load the stages of the placement"
    ANNOUNCE_READY = "the model answers for the first time"
    ANNOUNCE_RECOVERED = "the model answers again"
    ANNOUNCE_LOSS = "the model answered, and does not for now"
    LEAVE_STAGES = "let go of the stages so that the next deployment can adopt them"
    END_STAGES = "let go of the stages, and free their memory"
    PAUSE = "wait for machines to change, a pause longer than the last one"
    PAUSE_BRIEFLY = "wait for machines to change, the shortest pause"
    FAIL = "end with the reason"
    ANNOUNCE_RETRY = "the model has not answered yet, and planning again may help"
    PREPARE = "load what a better plan adds, beside the deployment that answers"
    EMPTY = "let running answers end for a while, then break them off, and move"
    GO_BACK = "the better plan came to nothing: plan where the layers were"
    WAKE_ANSWERS = "answers that broke off look at their fate"


Actions = tuple[Action, ...]

_STANDING = (Phase.LOADING, Phase.READY, Phase.REOPENING)


def apply(state: State, event: Event) -> tuple[State, Actions]:
    """The next state, and what is to be done, in order.

    News of a deployment that is gone, and what means nothing in a phase, changes nothing.
    """
    phase = state.phase
    if phase is Phase.ENDED:
        return state, ()
    match event:
        case Stopped(comes_back):
            let_go = Action.LEAVE_STAGES if comes_back else Action.END_STAGES
            end = (let_go,) if phase in _STANDING else ()
            return replace(state, phase=Phase.ENDED), (Action.WAKE_ANSWERS, *end)
        case Planned() if phase is Phase.PLANNING:
            return replace(state, phase=Phase.LOADING, lack="", begun=True), (Action.LOAD,)
        case Opened() if phase in (Phase.LOADING, Phase.REOPENING):
            said = Action.ANNOUNCE_RECOVERED if state.ring else Action.ANNOUNCE_READY
            opened = State(
                Phase.READY,
                state.ring + 1,
                begun=True,
                moved_at=state.moved_at,
                rest=state.rest,
            )
            return opened, (said, Action.WAKE_ANSWERS)
        case Broke(reason) if phase is Phase.READY:
            broken = replace(
                state, phase=Phase.REOPENING, problem=reason, move=None, worth_since=None
            )
            return broken, (Action.ANNOUNCE_LOSS, Action.WAKE_ANSWERS)
        case Broke(reason) if phase in (Phase.LOADING, Phase.REOPENING) and state.ring:
            return replace(state, problem=reason), ()
        case Lost() if phase in (Phase.PLANNING, *_STANDING):
            return _lost(state, event)
        case Surveyed() if phase is Phase.READY and state.move is None:
            return _surveyed(state, event)
        case Asked(at) if phase is Phase.READY and state.move is None:
            return _moved(state, at)
        case Prepared() if phase is Phase.READY and state.move is Move.PREPARING:
            return replace(state, move=Move.BETTER), (Action.EMPTY,)
        case Abandoned() if phase is Phase.READY and state.move is not None:
            return replace(state, move=None, rest=_longer(state.rest)), (Action.WAKE_ANSWERS,)
        case PauseOver() if phase is Phase.WAITING:
            return replace(state, phase=Phase.PLANNING), (Action.PLAN,)
    return state, ()


def _surveyed(state: State, survey: Surveyed) -> tuple[State, Actions]:
    """A plan must be better for a while, and the last move some time ago: noise moves nothing."""
    if not survey.worth:
        return replace(state, worth_since=None), ()
    since = survey.at if state.worth_since is None else state.worth_since
    rested = state.moved_at is None or survey.at - state.moved_at >= state.rest
    if survey.at - since >= survey.settle and rested:
        return _moved(state, survey.at)
    return replace(state, worth_since=since), ()


def _moved(state: State, at: float) -> tuple[State, Actions]:
    stood = state.moved_at is not None and at - state.moved_at >= 2 * state.rest
    moved = replace(
        state,
        move=Move.PREPARING,
        worth_since=None,
        moved_at=at,
        rest=REST_SECONDS if stood else state.rest,
    )
    return moved, (Action.PREPARE,)


def _longer(rest: float) -> float:
    return min(2 * rest, MOST_REST_SECONDS)


def _lost(state: State, lost: Lost) -> tuple[State, Actions]:
    answered = state.phase in (Phase.READY, Phase.REOPENING)
    may_mend = lost.mendable and (state.begun or state.phase is not Phase.PLANNING)
    fruitless = state.move is Move.BETTER and not answered
    moved_in_vain = fruitless or (answered and state.moved_at is not None and lost.move is None)
    after = replace(
        state,
        phase=Phase.WAITING,
        problem=lost.reason,
        stuck=not answered and (state.ring > 0 or not may_mend),
        lack=lost.reason if lost.lacks_memory else "",
        move=lost.move,
        worth_since=None,
        rest=_longer(state.rest) if moved_in_vain else state.rest,
    )
    actions: list[Action] = []
    if state.phase is Phase.READY:
        actions.append(Action.ANNOUNCE_LOSS)
    if state.phase in _STANDING:
        actions.append(Action.LEAVE_STAGES)
    if fruitless:
        actions.append(Action.GO_BACK)
    if not state.ring and not may_mend:
        return replace(after, phase=Phase.ENDED), (*actions, Action.FAIL)
    if not state.ring:
        actions.append(Action.ANNOUNCE_RETRY)
    pause = Action.PAUSE_BRIEFLY if answered else Action.PAUSE
    return after, (*actions, Action.WAKE_ANSWERS, pause)


@dataclass(frozen=True)
class BrokenOff:
    """An answer that broke off on a ring for a `reason`, and waits.

    tries: attempts without a new token for its client. waited: since it broke off. since: the last
    attempt. limit: how long it may wait, its client's deadline included.
    """

    ring: int
    reason: UniclusterError
    tries: int
    waited: float
    since: float
    limit: float


@dataclass(frozen=True)
class GoOn:
    """The answer is given to the head of the ring that is open."""


@dataclass(frozen=True)
class Wait:
    """The answer waits for the service's next state, and looks again after `seconds` anyway."""

    seconds: float


@dataclass(frozen=True)
class End:
    """The answer ends with an error."""

    error: UniclusterError


def fate(state: State, answer: BrokenOff, model: str) -> GoOn | Wait | End:
    """Fate of an answer that broke off. `model` is its name, for messages."""
    reason, waited, since = answer.reason, answer.waited, answer.since
    if state.phase is Phase.ENDED:
        return End(StoppingError("the model is being unloaded"))
    if answer.tries > MOST_TRIES:
        tried = f"{reason}; the answer was given up after {answer.tries} attempts to go on"
        return End(type(reason)(tried))
    if waited >= answer.limit:
        why = f"{model} is {state.name}" + (f": {state.problem}" if state.problem else "")
        return End(UnavailableError(f"{reason}; the answer has waited {waited:.0f} s: {why}"))
    pause = TRY_SECONDS * 2 ** (answer.tries - 2) if answer.tries > 1 else 0.0
    seconds = [answer.limit - waited, pause - since]
    if state.phase is Phase.READY:
        if answer.ring == state.ring:
            pause = max(pause, SAME_SECONDS)
        if since >= pause:
            return GoOn()
        seconds.append(pause - since)
    elif state.lack:
        if since >= FIT_SECONDS:
            return End(DoesNotFitError(f"{reason}; {model} can't go on: {state.lack}"))
        seconds.append(FIT_SECONDS - since)
    return Wait(min(each for each in seconds if each > 0))
