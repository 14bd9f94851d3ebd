"""What the gateway holds of an answer, and how heads that say nonsense are dealt with."""

import pytest

from coordinator.recovery.recoveries import Gap, RecoveryMeter
from unicluster.client.transcript import MOST_HELD, Transcript
from unicluster.errors import StageError
from unicluster.v1.chat_pb2 import (
    Begun,
    Delta,
    Finish,
    GenerateEvent,
    GenerateRequest,
    Message,
    Sampling,
    Status,
    Tool,
)


def begun(*prompt: int, cached: int = 0) -> GenerateEvent:
    return GenerateEvent(begun=Begun(prompt_token_ids=prompt, cached_tokens=cached))


def delta(text: str = "", *tokens: int) -> GenerateEvent:
    return GenerateEvent(delta=Delta(text=text, token_ids=tokens))


FINISH = GenerateEvent(finish=Finish(reason="stop"))


@pytest.fixture
def transcript() -> Transcript:
    return Transcript(
        GenerateRequest(
            messages=[Message(role="user", content="hello")],
            template_arguments='{"a": 1}',
            tools=[Tool(name="clock")],
            sampling=Sampling(seed=3),
            max_tokens=9,
        )
    )


def test_text_comes_with_its_token_or_not_at_all(transcript: Transcript) -> None:
    transcript.request()
    assert transcript.take(begun(1, 2)) == []
    assert transcript.take(delta("half")) == []
    assert transcript.take(delta(" whole", 7)) == [delta("half"), delta(" whole", 7)]
    assert transcript.take(delta("lost with its head")) == []

    again = transcript.request()
    transcript.take(begun())

    assert list(again.resume.token_ids) == [7]
    assert transcript.take(delta("text", 8)) == [delta("text", 8)]


def test_what_is_left_of_the_text_comes_with_the_finish(transcript: Transcript) -> None:
    transcript.request()
    transcript.take(begun(1, 2))
    assert transcript.take(delta("the rest")) == []
    assert transcript.take(FINISH) == [delta("the rest"), FINISH]
    assert transcript.finished


def test_the_next_head_gets_the_prompt_that_was_answered(transcript: Transcript) -> None:
    first = transcript.request()
    assert first.messages
    assert not first.HasField("resume")
    transcript.take(begun(1, 2, 3, cached=2))
    transcript.take(delta("a", 7))

    again = transcript.request()

    assert list(again.token_ids) == [1, 2, 3]
    assert (list(again.resume.token_ids), again.resume.cached_tokens) == ([7], 2)
    assert not again.messages
    assert not again.template_arguments
    assert again.tools == first.tools
    assert (again.sampling.seed, again.max_tokens) == (3, 9)


def test_an_answer_that_had_not_begun_is_asked_for_anew(transcript: Transcript) -> None:
    first = transcript.request()
    assert transcript.can_resume
    assert transcript.request() == first


def test_computed_again_is_what_the_next_head_has_not_in_its_caches(transcript: Transcript) -> None:
    transcript.request()
    transcript.take(begun(1, 2, 3))
    transcript.take(delta("a", 7))
    transcript.request()
    transcript.take(begun(cached=3))
    assert (transcript.replayed, transcript.cached) == (1, 3)


def test_the_answer_of_an_older_head_is_passed_on_and_can_not_be_resumed(
    transcript: Transcript,
) -> None:
    transcript.request()
    assert transcript.take(delta("text")) == [delta("text")]
    assert not transcript.can_resume
    transcript.take(FINISH)
    assert transcript.finished


@pytest.mark.parametrize(
    "events",
    [
        [begun(1), begun(1)],
        [begun(1, cached=1)],
        [begun()],
        [begun(1), GenerateEvent(status=Status(state="resumed"))],
        [begun(1), GenerateEvent()],
        [begun(1), *[delta("text")] * (MOST_HELD + 1)],
    ],
    ids=["begun twice", "cached", "no prompt", "status", "nothing", "text without end"],
)
def test_a_first_head_s_nonsense_is_refused(
    transcript: Transcript, events: list[GenerateEvent]
) -> None:
    transcript.request()
    with pytest.raises(StageError, match="the head"):
        [transcript.take(event) for event in events]


@pytest.mark.parametrize(
    "event",
    [begun(1, 2), begun(cached=3), delta("from the beginning", 5)],
    ids=["another prompt", "cached", "an older head"],
)
def test_a_next_head_s_nonsense_is_refused(transcript: Transcript, event: GenerateEvent) -> None:
    transcript.request()
    transcript.take(begun(1, 2))
    transcript.take(delta("a", 7))
    transcript.request()
    with pytest.raises(StageError, match="the head"):
        transcript.take(event)


@pytest.mark.parametrize(
    ("gap", "parts"),
    [
        (Gap(1, 2, planned=4, loaded=8), [1, 2, 4, 8]),
        (Gap(1, 2, planned=0, loaded=8), [1, 0, 6, 8]),
        (Gap(1, 2), [1, 0, 0, 14]),
    ],
    ids=["planned anew", "the worker restarted", "the ring stood"],
)
def test_the_parts_of_a_gap_are_the_gap(gap: Gap, parts: list[float]) -> None:
    assert list(gap.parts(16.0).values()) == parts
    assert sum(parts) == 15

    meter = RecoveryMeter()
    meter.resumed(gap, 16.0, replayed=5, cached=2)
    meter.failed()
    meter.returned(replayed=1, cached=30)
    counts = meter.to_wire()
    assert (counts.resumed, counts.failed, counts.returned) == (1, 1, 1)
    assert (counts.replayed_tokens, counts.cached_tokens) == (6, 32)
    assert [counts.detect_s, counts.plan_s, counts.load_s, counts.replay_s] == parts
