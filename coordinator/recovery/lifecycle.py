"""The state machine of a service: what its deployments, and the answers of its clients, do next.

`apply` and `fate` are pure: they decide, and the service and the gateway carry their decisions out.
Times are seconds.
"""

from dataclasses import dataclass, replace
from enum import Enum

from unicluster.errors import DoesNotFitError, UnavailableError, UniclusterError

# A head that failed one answer and goes on: until the answer is tried on it again.
SAME_SECONDS = 3.0
# What was lost may come back, or its memory, within this; then answers end for lack of it.
FIT_SECONDS = 3.0
# Heads that an answer is tried on with no more of it for its client than before.
MOST_TRIES = 5
# Before an answer is tried again where the last try came to nothing; doubles.
TRY_SECONDS = 0.25


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
    memory lacks, in a sentence, by the last plan. moving: away from a machine that drains.
    """

    phase: Phase = Phase.PLANNING
    ring: int = 0
    problem: str = ""
    stuck: bool = False
    lack: str = ""
    moving: bool = False

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

    lacks_memory: because the model does not fit. drained: because a machine asked to be let go of.
    """

    reason: str
    lacks_memory: bool = False
    drained: bool = False


@dataclass(frozen=True)
class PauseOver:
    """Machines have changed, or it is time to try again."""


@dataclass(frozen=True)
class Stopped:
    """Serving is to end."""


Event = Planned | Opened | Broke | Lost | PauseOver | Stopped


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
        case Stopped():
            end = (Action.END_STAGES,) if phase in _STANDING else ()
            return replace(state, phase=Phase.ENDED), (Action.WAKE_ANSWERS, *end)
        case Planned() if phase is Phase.PLANNING:
            return replace(state, phase=Phase.LOADING, lack=""), (Action.LOAD,)
        case Opened() if phase in (Phase.LOADING, Phase.REOPENING):
            said = Action.ANNOUNCE_RECOVERED if state.ring else Action.ANNOUNCE_READY
            return State(Phase.READY, state.ring + 1), (said, Action.WAKE_ANSWERS)
        case Broke(reason) if phase is Phase.READY:
            broken = replace(state, phase=Phase.REOPENING, problem=reason)
            return broken, (Action.ANNOUNCE_LOSS, Action.WAKE_ANSWERS)
        case Broke(reason) if phase in (Phase.LOADING, Phase.REOPENING) and state.ring:
            return replace(state, problem=reason), ()
        case Lost() if phase in (Phase.PLANNING, *_STANDING):
            return _lost(state, event)
        case PauseOver() if phase is Phase.WAITING:
            return replace(state, phase=Phase.PLANNING), (Action.PLAN,)
    return state, ()


def _lost(state: State, lost: Lost) -> tuple[State, Actions]:
    answered = state.phase in (Phase.READY, Phase.REOPENING)
    after = replace(
        state,
        phase=Phase.WAITING,
        problem=lost.reason,
        stuck=not answered,
        lack=lost.reason if lost.lacks_memory else "",
        moving=lost.drained,
    )
    actions: list[Action] = []
    if state.phase is Phase.READY:
        actions.append(Action.ANNOUNCE_LOSS)
    if state.phase in _STANDING:
        actions.append(Action.LEAVE_STAGES)
    if not state.ring:
        return replace(after, phase=Phase.ENDED), (*actions, Action.FAIL)
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
        return End(UnavailableError("the model is being unloaded"))
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
