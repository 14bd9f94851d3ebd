"""How long a client comes back for an answer, or waits for a server, by a clock of the test's."""

from typing import Any

import grpc
import pytest

from unicluster.client.answers import ChatInfo, Delta, Finish, Status
from unicluster.client.returning import LAST_PAUSE, MOST_TRIES, RETURN_SECONDS, Asking, Patience
from unicluster.client.target import Target
from unicluster.cluster.channels import OUR_OWN, STOPPING
from unicluster.errors import BusyError, InputError, StageError, TrustError, UnavailableError
from unicluster.v1 import chat_pb2 as wire

BEGUN = wire.GenerateEvent(begun=wire.Begun(prompt_token_ids=[1, 2, 3]))
BEGUN_AGAIN = wire.GenerateEvent(begun=wire.Begun())
KEPT = wire.GenerateEvent(kept=wire.Kept(answer_id="some-id", resume_s=60))
FINISH = wire.GenerateEvent(finish=wire.Finish(usage=wire.Usage(completion_tokens=3)))


class Ended(grpc.RpcError):
    """A call that ended so; `marks` are its trailing metadata."""

    def __init__(self, code: str, details: str = "closed", marks: Any = ()) -> None:
        self._code, self._details, self._marks = grpc.StatusCode[code], details, marks

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._marks


LOST = Ended("UNAVAILABLE", "Socket closed")
LOADING = Ended("UNAVAILABLE", "parrot is loading", OUR_OWN)
FAILED = Ended("UNAVAILABLE", "machine ann is gone", OUR_OWN)
FULL = Ended("RESOURCE_EXHAUSTED", "8 answers wait", OUR_OWN)
UNKNOWN = Ended("NOT_FOUND", "no such answer", OUR_OWN)
ENDING = Ended("UNAVAILABLE", "the model is being unloaded", (*OUR_OWN, *STOPPING))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def asking(clock: Clock, deadline: float | None = None, **patience: Any) -> Asking:
    request = wire.GenerateRequest(messages=[wire.Message(role="user", content="hi")])
    return Asking(request, Patience(**patience), deadline, clock)


def delta(text: str, *tokens: int) -> wire.GenerateEvent:
    return wire.GenerateEvent(delta=wire.Delta(text=text, token_ids=tokens))


def generating(asked: Asking) -> wire.GenerateRequest:
    request = asked.ask()
    assert isinstance(request, wire.GenerateRequest)
    return request


def test_a_lost_connection_is_tried_again_for_so_long_and_no_longer() -> None:
    clock = Clock()
    asked = asking(clock)
    generating(asked)
    asked.take(BEGUN)
    pauses: list[float] = []

    def try_again() -> None:
        pause, _ = asked.broke_off(LOST, "studio")
        pauses.append(pause)
        clock.now += pause
        generating(asked)

    while clock.now < 1000 + RETURN_SECONDS:
        try_again()
    with pytest.raises(UnavailableError, match=r"studio closed the connection; .* 3\d s"):
        try_again()
    assert pauses[0] == 0.0
    assert pauses[1:] == sorted(pauses[1:])
    assert pauses[-1] == LAST_PAUSE


def test_the_time_begins_anew_when_more_has_come() -> None:
    clock = Clock()
    asked = asking(clock, resume=10)
    generating(asked)
    asked.take(BEGUN)
    for token in range(5):
        assert asked.broke_off(LOST, "studio")[1] == Status("lost", "studio closed the connection")
        clock.now += 9
        assert generating(asked).resume.token_ids == list(range(token))
        asked.take(BEGUN_AGAIN)
        assert asked.take(delta("x", token)) == [
            Status("resumed", ""),
            Delta("x", token_ids=(token,)),
        ]


def test_text_without_its_token_is_held_and_comes_once() -> None:
    asked = asking(Clock())
    generating(asked)
    asked.take(BEGUN)
    assert asked.take(delta("half")) == []
    asked.broke_off(LOST, "studio")
    generating(asked)
    asked.take(BEGUN_AGAIN)
    assert asked.take(delta("half")) == []
    texts = [e.text for e in asked.take(delta(" whole", 5)) if isinstance(e, Delta)]
    assert texts == ["half", " whole"]


def test_a_kept_answer_is_continued_behind_what_is_here_or_asked_for_anew() -> None:
    asked = asking(Clock(), resume=60)
    assert generating(asked).resume_s == 60
    for message in (KEPT, BEGUN, delta("a"), delta("b", 5), delta("held")):
        asked.take(message)
    asked.broke_off(LOST, "studio")
    assert asked.ask() == wire.ContinueRequest(answer_id="some-id", events=3)
    assert asked.broke_off(UNKNOWN, "studio") == (0.0, None)
    again = generating(asked)
    assert (list(again.token_ids), list(again.resume.token_ids)) == ([1, 2, 3], [5])


def test_a_kept_answer_that_still_waits_is_asked_for_again_where_nothing_is_known_of_it() -> None:
    clock = Clock()
    asked = asking(clock, resume=60)
    generating(asked)
    asked.take(KEPT)
    asked.broke_off(LOST, "studio")
    assert asked.ask() == wire.ContinueRequest(answer_id="some-id")
    assert asked.broke_off(UNKNOWN, "studio") == (0.0, None)
    assert not generating(asked).HasField("resume")
    asked.broke_off(LOADING, "studio")
    assert not asked.waits
    clock.now += 60
    with pytest.raises(UnavailableError, match="not to be had for 60 s"):
        asked.broke_off(LOADING, "studio")


def test_a_deadline_is_that_of_the_whole_answer() -> None:
    clock = Clock()
    asked = asking(clock, deadline=10)
    generating(asked)
    assert asked.timeout == 10
    asked.take(BEGUN)
    clock.now += 4
    asked.broke_off(LOST, "studio")
    assert asked.timeout == 6
    clock.now += 7
    assert asked.timeout == 0
    with pytest.raises(UnavailableError):
        asked.broke_off(LOST, "studio")


def test_an_answer_that_brings_servers_down_is_given_up() -> None:
    asked = asking(Clock(), resume=600)
    generating(asked)
    asked.take(BEGUN)
    for _ in range(MOST_TRIES):
        asked.broke_off(LOST, "studio")
        generating(asked)
        asked.take(BEGUN_AGAIN)
    with pytest.raises(UnavailableError, match="was not to be had"):
        asked.broke_off(LOST, "studio")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FAILED, UnavailableError),
        (Ended("DEADLINE_EXCEEDED"), UnavailableError),
        (Ended("INTERNAL", "machine ann failed", OUR_OWN), StageError),
        (Ended("INVALID_ARGUMENT", "top_p: no", OUR_OWN), InputError),
        (Ended("UNAVAILABLE", "CERTIFICATE_VERIFY_FAILED"), TrustError),
        (TrustError("not of this cluster"), TrustError),
    ],
)
def test_a_server_s_own_error_ends_an_answer_that_runs(
    error: Exception, kind: type[Exception]
) -> None:
    asked = asking(Clock(), resume=600, wait=600)
    generating(asked)
    asked.take(BEGUN)
    with pytest.raises(kind):
        asked.broke_off(error, "studio")


@pytest.mark.parametrize("error", [LOST, ENDING, Ended("CANCELLED"), None, UnavailableError("?")])
def test_the_end_of_a_server_does_not(error: Exception | None) -> None:
    asked = asking(Clock())
    generating(asked)
    asked.take(BEGUN)
    asked.broke_off(error, "studio")
    for refusal in (LOADING, FULL):  # by its successor
        generating(asked)
        asked.broke_off(refusal, "studio")


@pytest.mark.parametrize(
    ("error", "kind"), [(LOST, UnavailableError), (LOADING, UnavailableError), (FULL, BusyError)]
)
def test_what_has_not_begun_is_not_tried_again(error: Exception, kind: type[Exception]) -> None:
    asked = asking(Clock())
    generating(asked)
    with pytest.raises(kind):
        asked.broke_off(error, "studio")


def test_an_older_server_s_answer_ends_with_its_connection() -> None:
    asked = asking(Clock())
    generating(asked)
    asked.take(delta("You", 1))
    with pytest.raises(UnavailableError, match="studio closed the connection"):
        asked.broke_off(LOST, "studio")


def test_waiting_shows_what_is_new_and_ends() -> None:
    clock = Clock()
    asked = asking(clock, wait=60)
    generating(asked)
    asked.broke_off(LOADING, "studio")
    info = ChatInfo("parrot", "q4", 1, 1, "loading", "3 of 12 GB", (), 0)
    assert asked.looked(info)[1] == Status("loading", "3 of 12 GB")
    assert asked.looked(info)[1] is None
    assert asked.waits
    clock.now += 61
    with pytest.raises(UnavailableError, match="3 of 12 GB; waited 61 s"):
        asked.looked(info)


def test_times_are_those_that_the_client_saw() -> None:
    clock = Clock()
    asked = asking(clock)
    generating(asked)
    asked.take(BEGUN)
    clock.now += 1
    asked.take(delta("a", 1))
    asked.broke_off(LOST, "studio")
    clock.now += 4
    generating(asked)
    asked.take(BEGUN_AGAIN)
    (*_, finish) = asked.take(FINISH)
    assert isinstance(finish, Finish)
    assert (finish.timings.time_to_first_token_s, finish.timings.decode_s) == (1, 4)
    assert finish.timings.tokens_per_s == 0.5


@pytest.mark.parametrize("patience", [{"resume": -1}, {"wait": float("inf")}, {"wait": -0.5}])
def test_patience_without_a_meaning_is_refused(patience: dict[str, float]) -> None:
    with pytest.raises(InputError, match="give seconds, 0 or more"):
        Patience(**patience)


def test_a_server_that_another_answer_has_looked_away_from_is_still_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Forgetful(Target):
        """Another thread's answer breaks off just when this one has found the server."""

        async def find_here(self) -> str:
            return "ann:1"

        async def find(self) -> str:
            found = await super().find()
            self.forget()
            return found

    monkeypatch.delenv("UNICLUSTER_SERVER", raising=False)
    target = Forgetful(None, None, 1.0)
    assert target.find_sync() == "ann:1"
    assert target.address == ""
