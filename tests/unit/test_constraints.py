"""Answers that must match a schema, a regex or a grammar, whatever the model would rather say."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from node.constraints.numbers import LONGEST_NUMBER
from node.generation.engine import GenerationEngine
from node.speculation.drafting import Lookup, Speculation
from tests.support.constrained import POINT
from tests.support.engines import Completion, Script, Tiny, listen
from tests.support.tiny import MARKS, tiny_config, write_model
from unicluster.chat_limits import MOST_CONSTRAINT_BYTES
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import Constraint, GenerateRequest, Message, Sampling

THINK, THOUGHT, CALL, _ = range(258, 258 + len(MARKS))
EOS = 256
SCHEMAS: dict[str, Any] = {
    "enum": {
        "type": "object",
        "properties": {
            "name": {"enum": ["ann", "bob"]},
            "age": {"type": "integer", "minimum": 3, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "at": {"type": "string", "format": "date"},
            "points": {
                "type": "array",
                "minItems": 2,
                "maxItems": 3,
                "items": {"$ref": "#/$defs/point"},
            },
        },
        "required": ["at", "points"],
        "additionalProperties": False,
        "$defs": {"point": POINT},
    },
    "union": {"anyOf": [{"type": "null"}, POINT]},
    "one letter": {"type": "string", "maxLength": 1},
}
POINT_JSON = json.dumps(POINT)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Models, by whether their tokenizer has marks for reasoning and tool calls."""
    folder = tmp_path_factory.mktemp("models")
    return {
        marks: write_model(folder / f"llama-{marks}", tiny_config("llama"), marks=marks)
        for marks in (False, True)
    }


@pytest.fixture
async def tiny(paths: dict[bool, Path]) -> Tiny:
    return await Tiny.load(paths[False])


@pytest.fixture
async def engine(tiny: Tiny) -> AsyncIterator[GenerationEngine]:
    engine = await tiny.engine(context=1024)
    yield engine
    engine.close()


def request(constraint: Constraint, **fields: Any) -> GenerateRequest:
    prompt = {"messages": [Message(role="user", content="hello")], "max_tokens": 400}
    return GenerateRequest(constraint=constraint, **(prompt | fields))


async def ask(engine: GenerationEngine, constraint: Constraint, **fields: Any) -> Completion:
    return await listen(await engine.submit(request(constraint, **fields)))


async def scripted(
    paths: dict[bool, Path], tokens: list[int], constraint: Constraint, **fields: Any
) -> Completion:
    """The answer of a model with marks that would say `tokens`."""
    tiny = await Tiny.load(paths[True])
    prompt = [104, 105]
    engine = await tiny.engine(Script(tokens, prompt=len(prompt)))
    try:
        fields = {"token_ids": prompt, "max_tokens": 240} | fields
        return await listen(await engine.submit(GenerateRequest(constraint=constraint, **fields)))
    finally:
        engine.close()


# Texts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", SCHEMAS)
async def test_an_answer_is_json_of_its_schema(
    engine: GenerationEngine, name: str, temperature: float
) -> None:
    constraint = Constraint(json_schema=json.dumps(SCHEMAS[name]))

    completion = await ask(engine, constraint, sampling=Sampling(temperature=temperature, seed=5))

    assert completion.reason == "stop"
    jsonschema.validate(json.loads(completion.text), SCHEMAS[name])


async def test_answers_side_by_side_have_each_their_constraint(engine: GenerationEngine) -> None:
    """Beside one without, which stays as it is alone."""
    free = GenerateRequest(messages=[Message(role="user", content="hello")], max_tokens=40)
    alone = await listen(await engine.submit(free))

    asked = [ask(engine, Constraint(json_schema=json.dumps(s))) for s in SCHEMAS.values()]
    beside, *answers = await asyncio.gather(
        listen(await engine.submit(free)), *asked, ask(engine, Constraint(regex="[ab]{5}c"))
    )

    assert beside.tokens == alone.tokens
    assert re.fullmatch("[ab]{5}c", answers.pop().text)
    for answer, schema in zip(answers, SCHEMAS.values(), strict=True):
        jsonschema.validate(json.loads(answer.text), schema)


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
async def test_drafted_tokens_change_nothing(
    tiny: Tiny, engine: GenerationEngine, schema: Any
) -> None:
    drafting = await tiny.engine(context=1024, speculation=Speculation(Lookup, 8))
    constraint = Constraint(json_schema=json.dumps(schema))

    plain, drafted = await ask(engine, constraint), await ask(drafting, constraint)
    drafting.close()

    assert drafted.text == plain.text


async def test_a_regex_is_matched_as_a_whole(engine: GenerationEngine) -> None:
    completion = await ask(engine, Constraint(regex=r"[a-f]{3}-[0-9]{2,4}"))

    assert re.fullmatch(r"[a-f]{3}-[0-9]{2,4}", completion.text)
    assert completion.reason == "stop"


async def test_a_grammar_is_followed(engine: GenerationEngine) -> None:
    lark = 'start: "(" start ")" | "x"'

    completion = await ask(engine, Constraint(grammar=lark), max_tokens=80)

    opened = completion.text.count("(")
    assert opened > 2 or completion.text == "(" * opened + "x" + ")" * opened
    assert set(completion.text) <= set("(x)")


async def test_penalties_and_log_probabilities_go_with_it(engine: GenerationEngine) -> None:
    sampling = Sampling(repetition_penalty=1.3, frequency_penalty=0.5)

    completion = await ask(
        engine, Constraint(json_schema=POINT_JSON), sampling=sampling, logprobs=2
    )

    jsonschema.validate(json.loads(completion.text), POINT)
    assert len(completion.logprobs) == len(completion.tokens)
    assert all(entry.logprob > -1e9 for entry in completion.logprobs)


async def test_without_room_it_ends_by_its_length(engine: GenerationEngine) -> None:
    completion = await ask(engine, Constraint(json_schema=POINT_JSON), max_tokens=3)

    assert completion.reason == "length"
    assert completion.text.startswith("{")


# Reasoning


async def test_reasoning_is_free_and_the_text_is_not(paths: dict[bool, Path]) -> None:
    tokens = [THINK, *b"{no json", THOUGHT, *b"sure: 7"]

    completion = await scripted(paths, tokens, Constraint(json_schema=POINT_JSON))

    assert completion.reasoning == "{no json"
    jsonschema.validate(json.loads(completion.text), POINT)


@pytest.mark.parametrize("leaving", [EOS, CALL])
async def test_reasoning_must_end_in_a_text(paths: dict[bool, Path], leaving: int) -> None:
    tokens = [THINK, *b"so", leaving, *b"!", THOUGHT, *b"7"]

    completion = await scripted(paths, tokens, Constraint(json_schema=POINT_JSON))

    assert completion.reason == "stop"
    assert not completion.tool_calls
    jsonschema.validate(json.loads(completion.text), POINT)


async def test_marks_within_the_text_belong_to_it(paths: dict[bool, Path]) -> None:
    """They are written out: the tokens themselves are no text."""
    text = '"<think> or <tool_call>"'

    completion = await scripted(
        paths, list(text.encode()), Constraint(json_schema='{"type": "string"}')
    )

    assert (completion.text, completion.reasoning, completion.tool_calls) == (text, "", [])


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint(regex="a <think> or </tool_call>[.]"),
        Constraint(grammar='start: "a <think> or " "</tool_call>" "."'),
        Constraint(grammar='%llguidance {}\nstart: "a <think> or " "</tool_call>" "."'),
        Constraint(json_schema='{"const": "a <think> or </tool_call>."}'),
        Constraint(json_schema='{"type": "string", "pattern": "^a <thin[k]> or </tool_call>[.]$"}'),
    ],
    ids=lambda constraint: str(constraint.WhichOneof("kind")),
)
async def test_a_constraint_may_demand_what_looks_like_a_mark(
    paths: dict[bool, Path], constraint: Constraint
) -> None:
    text = "a <think> or </tool_call>."
    expected = json.dumps(text) if constraint.json_schema else text

    completion = await scripted(paths, list(expected.encode()), constraint)

    assert (completion.text, completion.reason) == (expected, "stop")


@pytest.mark.parametrize("mark", ["<think>", "</think>", "<tool_call>"])
@pytest.mark.parametrize("kind", ["regex", "grammar"])
async def test_a_text_may_begin_with_what_looks_like_a_mark(
    paths: dict[bool, Path], mark: str, kind: str
) -> None:
    """Letter by letter it is text; the token of that name would begin the reasoning."""
    text = f"{mark} is no end."
    constraint = Constraint(
        **{kind: f'start: "{text}"' if kind == "grammar" else text[:-1] + "[.]"}
    )

    plain = await scripted(paths, list(text.encode()), constraint)
    behind = await scripted(
        paths,
        [THINK, *b"so", THOUGHT, *text.encode()],
        constraint,
        stop=["</think>!"],  # of which the mark itself may become a part
    )

    assert (plain.text, plain.reasoning, plain.tool_calls) == (text, "", [])
    assert (behind.text, behind.reasoning, behind.tool_calls) == (text, "so", [])
    assert (plain.reason, behind.reason) == ("stop", "stop")


# Numbers


@pytest.mark.parametrize("kind", ["number", "integer"])
@pytest.mark.parametrize(
    ("begins", "around"),
    [
        ("", lambda number: number),
        ('{"x": ', lambda number: POINT | {"properties": {"x": number}, "required": ["x"]}),
        ("[7, ", lambda number: {"type": "array", "items": number, "maxItems": 2}),
    ],
)
async def test_a_number_ends_whatever_the_model_would_say(
    paths: dict[bool, Path], begins: str, around: Callable[[Any], Any], kind: str
) -> None:
    schema = around({"type": kind})
    begun = begins + ("3." if kind == "number" else "3")
    tokens = list(f"{begun}{'1' * 150}".encode())

    completion = await scripted(paths, tokens, Constraint(json_schema=json.dumps(schema)))

    number = completion.text.removeprefix(begins).rstrip("]} \n\t")
    assert completion.reason == "stop"
    assert 24 < len(number) <= LONGEST_NUMBER
    jsonschema.validate(json.loads(completion.text), schema)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string"}, f'"{"1" * 90}"'),
        ({"type": "string", "pattern": "^[0-9]{90}$"}, f'"{"1" * 90}"'),
    ],
)
async def test_digits_that_a_schema_demands_or_a_string_has_all_come(
    paths: dict[bool, Path], schema: Any, text: str
) -> None:
    constraint = Constraint(json_schema=json.dumps(schema))

    completion = await scripted(paths, list(text.encode()), constraint)

    assert completion.text == text


async def test_digits_of_a_regex_go_on(paths: dict[bool, Path]) -> None:
    completion = await scripted(paths, list(b"1" * 90 + b","), Constraint(regex="[0-9]+,"))

    assert completion.text == "1" * 90 + ","


# Refusals


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint(), "constraint: says nothing"),
        (Constraint(json_object=False), "constraint.json_object: must be true"),
        (Constraint(json_schema="{"), "constraint.json_schema: is no JSON"),
        (Constraint(json_schema="[1]"), "constraint.json_schema: must be an object"),
        (Constraint(json_schema="[" * 100_000), "constraint.json_schema: is no JSON"),
        (Constraint(json_schema="false"), "constraint.json_schema: must be an object"),
        (Constraint(json_schema='{"minimum": NaN}'), "constraint.json_schema: expected value"),
        (Constraint(json_schema=r'{"const": "\ud800"}'), "constraint.json_schema: .*hex escape"),
        (
            Constraint(json_schema='{"items":' * 300 + "{}" + "}" * 300),
            "constraint.json_schema: recursion limit",
        ),
        (Constraint(json_schema='{"not": {}}'), 'constraint.json_schema: .*"not"'),
        (
            Constraint(json_schema='{"$ref": "http://192.0.2.1/x.json"}'),
            "constraint.json_schema: .*does not fetch",
        ),
        (Constraint(json_schema='{"type": "strin"}'), "constraint.json_schema: .*strin"),
        (Constraint(regex="(a|b"), "constraint.regex: .*unclosed"),
        (Constraint(regex=" "), "constraint.regex: is empty"),
        (Constraint(regex="(?=a)b"), "constraint.regex: .*look-around"),
        (Constraint(grammar="start: nothing"), "constraint.grammar: .*nothing"),
        (Constraint(regex="a" * MOST_CONSTRAINT_BYTES + "a"), "constraint: .*at most"),
    ],
)
async def test_what_can_not_be_followed_is_refused_by_field(
    engine: GenerationEngine, constraint: Constraint, message: str
) -> None:
    with pytest.raises(InputError, match=f"^{message}") as caught:
        await engine.submit(request(constraint))

    assert "\n" not in str(caught.value)


async def test_a_schema_that_is_true_lets_any_json_pass(engine: GenerationEngine) -> None:
    completion = await ask(engine, Constraint(json_schema="true"), max_tokens=1)
    assert completion.tokens


async def test_an_answer_without_end_can_not_be_constrained(engine: GenerationEngine) -> None:
    with pytest.raises(InputError, match=r"^ignore_eos: "):
        await engine.submit(request(Constraint(json_object=True), ignore_eos=True))


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint(regex="((a{1,50}b?){1,50}c?){1,50}"),
        Constraint(regex="(x+x+)+y" * 50),
        Constraint(json_schema=json.dumps({"enum": [f"{n:05}" for n in range(20_000)]})),
        Constraint(
            json_schema=json.dumps(
                {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 50}}}
            )
        ),
    ],
    ids=["counted", "ambiguous", "wide", "recursive"],
)
async def test_a_hostile_grammar_is_refused_or_answered(
    engine: GenerationEngine, constraint: Constraint
) -> None:
    """And holds nobody else."""
    free = GenerateRequest(messages=[Message(role="user", content="hello")], max_tokens=10)
    hostile = asyncio.create_task(ask(engine, constraint, max_tokens=20))

    assert (await listen(await engine.submit(free))).reason in ("stop", "length")
    (outcome,) = await asyncio.gather(hostile, return_exceptions=True)
    if isinstance(outcome, Completion):
        assert outcome.reason in ("stop", "length")
    else:
        assert isinstance(outcome, InputError)
        assert str(outcome).startswith("constraint")
