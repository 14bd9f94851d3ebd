"""Chat requests of any kind: a job or an InputError that begins with the field's name."""

import contextlib
from typing import Any, ClassVar

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import TextStateMachine

from node.answers.text import StopSearch, TextStream
from node.constraints.vocabulary import Vocabulary
from node.generation.request import Job, check_request
from node.generation.sampling import Sampling
from node.prompts.cancellation import AbandonedError, Cancellation
from node.prompts.tokenizing import LONG, STEP, Tokenizing
from unicluster.chat_limits import (
    MOST_MESSAGES,
    MOST_STOP,
    MOST_STOP_CHARACTERS,
    MOST_TEXT_BYTES,
    MOST_TOKENS,
    ROLES,
    check_limits,
)
from unicluster.errors import InputError
from unicluster.v1 import chat_pb2
from unicluster.v1.chat_pb2 import GenerateRequest, Message, Tool, ToolCall

CONTEXT = 64
FIELDS = tuple(
    f"{field}:"
    for message in (GenerateRequest, chat_pb2.Sampling)
    for field in message.DESCRIPTOR.fields_by_name
)


class Bytes:
    """A tokenizer with a token a byte, that counts what it is given. Its template is not jinja."""

    response_initial_state = None
    has_thinking = False
    has_chat_template = True
    has_tool_calling = False
    structural_markers = ()
    response_transitions: ClassVar[dict[str, Any]] = {}
    chat_template = None
    _chat_template = "written in Python"

    def __init__(self) -> None:
        self.encoded: list[int] = []  # characters, call by call

    def __len__(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(number): number for number in range(128)} | {"abcd": 128}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self.encoded.append(len(text))
        return list(text.encode())

    def apply_chat_template(self, chat: Any, *, add_generation_prompt: bool) -> list[int]:
        return [byte for message in chat for byte in message["content"].encode()]


def check(request: GenerateRequest) -> Job:
    tokenizer = Bytes()
    tokenizing = Tokenizing(tokenizer, CONTEXT)
    vocabulary = Vocabulary(tokenizer)
    return check_request(
        request, tokenizer, CONTEXT, Sampling(), tokenizing, vocabulary, Cancellation()
    )


TOO_MUCH = {
    "messages": GenerateRequest(messages=[Message(role="user")] * (MOST_MESSAGES + 1)),
    "text": GenerateRequest(messages=[Message(role="user", content="a" * (MOST_TEXT_BYTES + 1))]),
    "role": GenerateRequest(messages=[Message(role="a" * 1000)]),
    "tokens": GenerateRequest(token_ids=[1] * (MOST_TOKENS + 1)),
    "stop strings": GenerateRequest(token_ids=[1], stop=["a"] * (MOST_STOP + 1)),
    "a stop string": GenerateRequest(token_ids=[1], stop=["a" * (MOST_STOP_CHARACTERS + 1)]),
    "model": GenerateRequest(model="a" * 5000),
}


@pytest.mark.parametrize("request_", TOO_MUCH.values(), ids=TOO_MUCH)
def test_too_much_of_a_field_is_refused_by_its_name(request_: GenerateRequest) -> None:
    with pytest.raises(InputError) as caught:
        check_limits(request_)
    assert str(caught.value).startswith(FIELDS)
    assert len(str(caught.value)) < 200


NUMBERS = st.floats() | st.floats(0, 2)
JSON = st.just("") | st.sampled_from(["{}", '{"a": [1]}', "[]", '{"a"']) | st.text(max_size=3)
REQUESTS = st.builds(
    GenerateRequest,
    messages=st.lists(
        st.builds(
            Message,
            role=st.sampled_from([*ROLES, *ROLES, "", "robot"]),
            content=st.text(),
            name=st.text(max_size=2),
            tool_call_id=st.sampled_from(["", "a", "b"]),
            reasoning_content=st.text(max_size=2),
            tool_calls=st.lists(
                st.builds(
                    ToolCall,
                    id=st.sampled_from(["", "a", "b"]),
                    name=st.text(max_size=2),
                    arguments=JSON,
                ),
                max_size=2,
            ),
        ),
        max_size=3,
    ),
    tools=st.lists(
        st.builds(Tool, name=st.text(max_size=2), description=st.text(), parameters=JSON),
        max_size=2,
    ),
    template_arguments=JSON,
    token_ids=st.lists(st.integers(0, 300), max_size=4),
    prompt=st.none() | st.text(),
    stop=st.lists(st.text(), max_size=3),
    max_tokens=st.none() | st.integers(0, 2**32 - 1),
    logprobs=st.none() | st.integers(0, 2**32 - 1),
    sampling=st.builds(
        chat_pb2.Sampling,
        temperature=st.none() | NUMBERS,
        top_p=st.none() | NUMBERS,
        min_p=st.none() | NUMBERS,
        repetition_penalty=st.none() | NUMBERS,
        presence_penalty=st.none() | NUMBERS,
        frequency_penalty=st.none() | NUMBERS,
        top_k=st.none() | st.integers(0, 2**32 - 1),
        seed=st.none() | st.integers(0, 2**64 - 1),
        logit_bias=st.dictionaries(st.integers(0, 300), NUMBERS, max_size=3),
    ),
)


def outcome(request: GenerateRequest) -> Job | str:
    """The job, or what is wrong with the request."""
    try:
        return check(request)
    except InputError as error:
        return str(error)


def assert_usable(result: Job | str) -> None:
    if isinstance(result, str):
        assert result.startswith(FIELDS)
        return
    assert 0 < len(result.tokens) < CONTEXT
    assert 0 < result.max_tokens <= CONTEXT - len(result.tokens)
    result.sampling.processors(0)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(REQUESTS)
def test_any_request_is_a_job_or_names_its_field(request: GenerateRequest) -> None:
    assert_usable(outcome(request))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=400))
def test_any_bytes_that_are_a_request_are_checked(data: bytes) -> None:
    with contextlib.suppress(DecodeError):
        assert_usable(outcome(GenerateRequest.FromString(data)))


def test_text_that_no_context_holds_is_not_tokenized() -> None:
    tokenizer = Bytes()
    tokenizing = Tokenizing(tokenizer, CONTEXT)
    tokenizer.encoded.clear()
    with pytest.raises(InputError, match="the prompt has 257 bytes and the context of 64 tokens"):
        tokenizing.encode("a" * (4 * CONTEXT + 1), Cancellation())
    assert tokenizer.encoded == []


def test_of_text_with_too_many_tokens_only_the_beginning_is_tokenized() -> None:
    tokenizer = Bytes()
    tokenizing = Tokenizing(tokenizer, 100_000)
    tokenizer.encoded.clear()
    with pytest.raises(InputError, match="more than"):
        tokenizing.encode("a" * 400_000, Cancellation())
    assert tokenizer.encoded == [STEP] * 4


def test_long_text_that_fits_is_tokenized_in_one_piece() -> None:
    tokenizing = Tokenizing(Bytes(), 1_000_000)
    assert len(tokenizing.encode("ab" * LONG, Cancellation())) == 2 * LONG


def test_abandoned_text_is_tokenized_no_further() -> None:
    tokenizer, cancellation = Bytes(), Cancellation()
    tokenizing = Tokenizing(tokenizer, 1_000_000)
    tokenizer.encoded.clear()
    cancellation.cancel()
    with pytest.raises(AbandonedError):
        tokenizing.encode("a" * 400_000, cancellation)
    assert tokenizer.encoded == []


class Detokenizer:
    """A character a token; counts nothing else."""

    def __init__(self) -> None:
        self.last_segment = ""

    def add_token(self, token: int) -> None:
        self.last_segment = chr(token)

    def finalize(self) -> None:
        self.last_segment = ""


class Plain:
    """The part of a tokenizer that TextStream uses."""

    def __init__(self) -> None:
        self.detokenizer = Detokenizer()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), st.text("abc", max_size=40))
def test_the_first_stop_string_to_end_cuts_the_text(stops: list[str], text: str) -> None:
    search, certain, cut = StopSearch(stops), "", False
    for character in text:
        if not cut:
            more, cut = search.add(character)
            certain += more
    ends = [end for end in range(1, len(text) + 1) if text[:end].endswith(tuple(stops))]
    if not ends:
        assert (certain + search.withheld, cut) == (text, False)
    else:
        longest = max(len(stop) for stop in stops if text[: ends[0]].endswith(stop))
        assert (certain, cut) == (text[: ends[0] - longest], True)


def test_no_more_than_a_stop_string_is_held_back() -> None:
    stop = ["a" * (MOST_STOP_CHARACTERS - 1) + "b"]
    stream = TextStream(Plain(), stop, TextStateMachine().make_state("normal"))
    text = "".join(part.text for _ in range(5000) for part in stream.add(ord("a")))
    assert 5000 - len(text) <= MOST_STOP_CHARACTERS
