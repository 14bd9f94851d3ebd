"""Tool calls: reading them in each family's format, and holding an answer to them."""

import contextlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer, TokenizerWrapper
from transformers import PreTrainedTokenizerFast

from node.answers.text import TextStream
from node.constraints.build import constraint_of
from node.constraints.mask import Mask
from node.constraints.vocabulary import Vocabulary
from node.prompts.templates import shows_tools
from node.tools.reader import CallReader
from tests.support.constrained import POINT
from tests.support.engines import Script, Tiny
from tests.support.tiny import tiny_config, write_model, write_tokenizer
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import (
    Delta,
    Finish,
    GenerateEvent,
    GenerateRequest,
    Message,
    Sampling,
    Tool,
    ToolChoice,
)

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days"],
}
CLOCK: dict[str, Any] = {"type": "object", "properties": {}}
TOOLS = [
    Tool(name="weather", description="Tells it.", parameters=json.dumps(WEATHER)),
    Tool(name="clock", parameters=json.dumps(CLOCK)),
]
PARIS = {"city": "Paris", "days": 3}


def deepseek(words: str) -> str:
    return "<\uff5c" + words.replace(" ", "\u2581") + "\uff5c>"


class Family:
    """A family of models: what its tokenizer has, and how it writes a call."""

    def __init__(self, template: str, call: str, *tokens: str, ends: tuple[str, ...] = ()) -> None:
        self.template = template
        self.call = call
        self.tokens = tokens
        self.ends = ends


FAMILIES = {
    "qwen": Family(
        "<tool_call> tool_call.name",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
        *("<tool_call>", "</tool_call>", "<think>", "</think>"),
    ),
    "qwen3-coder": Family(
        "<tool_call>\n<function=",
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        *("<tool_call>", "</tool_call>"),
    ),
    "glm": Family(
        "<arg_key>",
        "<tool_call>weather<arg_key>city</arg_key><arg_value>Paris</arg_value>"
        "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>",
        *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "kimi": Family(
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
        '<|tool_call_argument_begin|>{"city": "Paris", "days": 3}<|tool_call_end|>'
        "<|tool_calls_section_end|>",
        *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
        *("<|tool_call_end|>", "<|tool_call_argument_begin|>"),
    ),
    "minimax": Family(
        "<minimax:tool_call>",
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n</minimax:tool_call>',
        *("<minimax:tool_call>", "</minimax:tool_call>"),
    ),
    "mistral": Family(
        "[TOOL_CALLS]",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris", "days": 3}}]',
        "[TOOL_CALLS]",
    ),
    "mistral with headers": Family(
        "[TOOL_CALLS]",
        '[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 3}',
        *("[TOOL_CALLS]", "[ARGS]"),
    ),
    "deepseek": Family(
        deepseek("tool calls begin"),
        f"{deepseek('tool calls begin')}{deepseek('tool call begin')}weather{deepseek('tool sep')}"
        f'{{"city": "Paris", "days": 3}}{deepseek("tool call end")}{deepseek("tool calls end")}',
        *map(deepseek, ("tool calls begin", "tool calls end", "tool call begin", "tool call end")),
        deepseek("tool sep"),
    ),
    "deepseek with blocks": Family(
        f"{deepseek('tool calls begin')} ```json",
        f"{deepseek('tool calls begin')}{deepseek('tool call begin')}function{deepseek('tool sep')}"
        f'weather\n```json\n{{"city": "Paris", "days": 3}}\n```{deepseek("tool call end")}'
        f"{deepseek('tool calls end')}",
        *map(deepseek, ("tool calls begin", "tool calls end", "tool call begin", "tool call end")),
        deepseek("tool sep"),
    ),
    "gpt-oss": Family(
        "harmony",
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        '{"city": "Paris", "days": 3}<|call|>',
        *("<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|return|>"),
        ends=("<|call|>",),
    ),
    "llama": Family(
        'respond with {"name": ..., "parameters": ...}',
        '{"name": "weather", "parameters": {"city": "Paris", "days": 3}}',
        "<|start_header_id|>",
    ),
}


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TokenizerWrapper]:
    """mlx-lm's wrapper of a tokenizer of bytes and of a family's tokens."""

    def make(name: str) -> TokenizerWrapper:
        family = FAMILIES[name]
        folder: Path = tmp_path_factory.mktemp("tokenizer")
        write_tokenizer(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [*family.tokens, *family.ends, "<|end|>"]}
        )
        tokenizer.chat_template = family.template
        ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|end|>", *family.ends)]
        if name == "gpt-oss":
            tokenizer.eos_token = family.tokens[-1]
            ends[0] = tokenizer.eos_token_id
        return TokenizerWrapper(tokenizer, NaiveStreamingDetokenizer, eos_token_ids=ends)

    return make


def answer(
    tokenizer: Any, tokens: list[int], *, single: bool = False, with_tools: bool = True
) -> tuple[Delta, str]:
    """An answer made of its tokens: its pieces in one, and the reason of its end."""
    dialect = Vocabulary(tokenizer).dialect
    state = dialect.initial_state or "normal"
    text = TextStream(tokenizer, (), dialect.marks(state, with_tools=with_tools))
    segments = [part for token in tokens if token not in tokenizer.eos_token_ids
                for part in text.add(token)]  # fmt: skip
    reader = CallReader(dialect.calls, TOOLS if with_tools else [], single=single)
    whole = Delta()
    for kind, piece in [*segments, *text.finish()]:
        field = {"normal": "text", "reasoning": "reasoning", "tool": "tool_call"}[kind]
        event = GenerateEvent(delta=Delta(**{field: piece}))
        reader.read(event)
        whole.text += event.delta.text
        whole.reasoning += event.delta.reasoning
        whole.tool_call += event.delta.tool_call
        whole.calls.extend(event.delta.calls)
    finish = GenerateEvent(finish=Finish(reason="stop"))
    reader.read(finish)
    return whole, finish.finish.reason


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_that_names_tools_shows_them(
    tokenizer_of: Callable[[str], TokenizerWrapper], name: str
) -> None:
    tokenizer = tokenizer_of(name)
    inner = tokenizer._tokenizer
    for template in (None, "{{ toolset }}{{ messages[0].content }}"):
        inner.chat_template = template
        assert not shows_tools(TokenizerWrapper(inner))
    inner.chat_template = "{% if tools is defined %}{{ tools | tojson }}{% endif %}"
    assert shows_tools(TokenizerWrapper(inner))


# Reading


@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_is_read_in_each_format(
    name: str, tokenizer_of: Callable[[str], TokenizerWrapper]
) -> None:
    tokenizer = tokenizer_of(name)
    tokens = tokenizer.encode(FAMILIES[name].call, add_special_tokens=False)

    delta, reason = answer(tokenizer, tokens)

    assert [(call.name, json.loads(call.arguments)) for call in delta.calls] == [("weather", PARIS)]
    assert all(call.id for call in delta.calls)
    assert (delta.text.strip(), reason) == ("", "tool_calls")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("damage", ["cut", "doubled", "nonsense"])
def test_a_damaged_call_is_none(
    name: str, damage: str, tokenizer_of: Callable[[str], TokenizerWrapper]
) -> None:
    """Its raw text is still there, and nothing is raised."""
    tokenizer = tokenizer_of(name)
    call = FAMILIES[name].call
    text = {
        "cut": call[: len(call) * 2 // 3],
        "doubled": call.replace("{", "{{").replace("<param", "<<param").replace("<arg_k", "<<arg"),
        "nonsense": call.replace("weather", "").replace("Paris", "\x00\u20ac}]"),
    }[damage]

    delta, reason = answer(tokenizer, tokenizer.encode(text, add_special_tokens=False))

    for each in delta.calls:
        assert each.name
        assert isinstance(json.loads(each.arguments), dict)
    assert reason == ("tool_calls" if delta.calls else "stop")
    assert delta.calls or delta.tool_call or delta.text


def test_without_tools_json_that_looks_like_a_call_is_text(
    tokenizer_of: Callable[[str], TokenizerWrapper],
) -> None:
    tokenizer = tokenizer_of("llama")
    call = FAMILIES["llama"].call

    delta, reason = answer(
        tokenizer, tokenizer.encode(call, add_special_tokens=False), with_tools=False
    )

    assert (delta.text, reason) == (call, "stop")


def test_gpt_oss_s_channels_are_sorted(tokenizer_of: Callable[[str], TokenizerWrapper]) -> None:
    tokenizer = tokenizer_of("gpt-oss")
    said = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
        "<|channel|>commentary<|message|>I look. <|end|><|start|>assistant"
        "<|channel|>final<|message|>Sunny."
    )

    delta, reason = answer(tokenizer, tokenizer.encode(said, add_special_tokens=False))

    assert (delta.reasoning, delta.text, reason) == ("Hm.", "I look. Sunny.", "stop")


def test_of_several_calls_a_single_one_can_be_had(
    tokenizer_of: Callable[[str], TokenizerWrapper],
) -> None:
    tokenizer = tokenizer_of("kimi")
    call = FAMILIES["kimi"].call
    begin, end = call.index("<|tool_call_begin|>"), call.index("<|tool_calls_section_end|>")
    two = call[:end] + call[begin:end].replace(":0", ":1") + call[end:]
    tokens = tokenizer.encode(two, add_special_tokens=False)

    assert [call.id for call in answer(tokenizer, tokens)[0].calls] == [
        "functions.weather:0",
        "functions.weather:1",
    ]
    assert len(answer(tokenizer, tokens, single=True)[0].calls) == 1


# Holding an answer to calls


def choose(tokenizer: Any, request: GenerateRequest, wish: list[int], most: int = 600) -> list[int]:
    """The answer of a model that says `wish` for as long as it may, and then ends when it may."""
    vocabulary = Vocabulary(tokenizer)
    state = vocabulary.dialect.initial_state or "normal"
    constraint = constraint_of(request, vocabulary, state, 0)
    assert constraint is not None
    names = tokenizer.get_vocab()
    ends = [number for name, number in sorted(names.items()) if "end" in name or "</" in name]
    # Marks that end something, then what ends a string, an object, a list and whitespace.
    preferred = [*sorted(tokenizer.eos_token_ids), *ends, *b'"}]:3A']
    tokens: list[int] = []
    while len(tokens) < most:
        mask = allowed_next(constraint, len(tokenizer))
        assert constraint.error is None
        assert mask.any()
        wished = wish[:1]
        if wished and mask[wished[0]]:
            token, wish = wished[0], wish[1:]
        else:
            wish = []
            token = next((t for t in preferred if mask[t]), int(mask.argmax()))
        tokens.append(token)
        if token in tokenizer.eos_token_ids:
            return tokens
        constraint.follow([token])
    raise AssertionError(f"no end: {tokenizer.decode(tokens)!r}")


def allowed_next(constraint: Mask, vocabulary: int) -> "np.ndarray[Any, Any]":
    """Which tokens may come next, as a sampler sees it."""
    logits = constraint(mx.array([0] * constraint.taken), mx.zeros((1, vocabulary)))
    return np.array(logits[0]) == 0


def asked(choice: ToolChoice, *, strict: bool = False) -> GenerateRequest:
    tools = [Tool(name=t.name, parameters=t.parameters, strict=strict) for t in TOOLS]
    return GenerateRequest(tools=tools, tool_choice=choice)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("choice", [ToolChoice(required=True), ToolChoice(name="clock")], ids=str)
def test_whoever_must_call_does(
    name: str, choice: ToolChoice, tokenizer_of: Callable[[str], TokenizerWrapper]
) -> None:
    """Although the model would rather say something else."""
    tokenizer = tokenizer_of(name)

    tokens = choose(tokenizer, asked(choice), list(b"I would rather not."))
    delta, reason = answer(tokenizer, tokens)

    assert reason == "tool_calls"
    assert delta.text.strip() == ""
    schemas = {"weather": WEATHER, "clock": CLOCK}
    for call in delta.calls:
        assert call.name == (choice.name or call.name)
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_good_call_may_be_written_as_the_model_would(
    name: str, tokenizer_of: Callable[[str], TokenizerWrapper]
) -> None:
    tokenizer = tokenizer_of(name)
    wish = tokenizer.encode(FAMILIES[name].call, add_special_tokens=False)

    tokens = choose(tokenizer, asked(ToolChoice(required=True), strict=True), wish)

    assert tokens[: len(wish)] == wish


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"llama", "gpt-oss"}))
def test_strict_calls_are_held_to_their_schema_and_text_is_free(
    name: str, tokenizer_of: Callable[[str], TokenizerWrapper]
) -> None:
    tokenizer = tokenizer_of(name)
    bad = FAMILIES[name].call.replace("3", "x3")
    wish = tokenizer.encode("Let me see. " + bad, add_special_tokens=False)

    delta, _ = answer(tokenizer, choose(tokenizer, asked(ToolChoice(), strict=True), wish))

    assert delta.text.strip() == "Let me see."
    for call in delta.calls:
        jsonschema.validate(json.loads(call.arguments), WEATHER)


def test_reasoning_comes_before_a_call(tokenizer_of: Callable[[str], TokenizerWrapper]) -> None:
    tokenizer = tokenizer_of("qwen")
    wish = tokenizer.encode("<think>Hm.</think>" + FAMILIES["qwen"].call, add_special_tokens=False)

    delta, reason = answer(tokenizer, choose(tokenizer, asked(ToolChoice(required=True)), wish))

    assert (delta.reasoning, len(delta.calls), reason) == ("Hm.", 1, "tool_calls")


def test_a_strict_tool_that_can_not_be_enforced_is_refused(
    tokenizer_of: Callable[[str], TokenizerWrapper],
) -> None:
    odd = json.dumps({"type": "object", "properties": {"a": {"not": {}}}})
    tool = Tool(name="odd", parameters=odd)
    vocabulary = Vocabulary(tokenizer_of("qwen"))

    def build(strict: bool) -> Any:
        tool.strict = strict
        request = GenerateRequest(tools=[tool], tool_choice=ToolChoice(required=True))
        return constraint_of(request, vocabulary, "normal", 0)

    assert build(strict=False) is not None
    with pytest.raises(InputError, match=r"^tools: the parameters of 'odd' can't be enforced: "):
        build(strict=True)


# Through the engine


TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}{{ tool.function.description }}"
    "{{ tool.function.parameters | tojson }}{% endfor %}"
    "{% for message in messages %}{{ message.content }}<|end|>{% endfor %}"
)
NAMES_TOOLS = (
    "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}"
    "{% for message in messages %}{{ message.content }}{% endfor %}"
)


@pytest.mark.parametrize("choice", [ToolChoice(required=True), ToolChoice(none=True)], ids=str)
async def test_an_answer_has_the_calls_that_were_asked_for(
    choice: ToolChoice, tmp_path: Path
) -> None:
    """The model speaks at random."""
    tiny = await Tiny.load(write_model(tmp_path / "m", tiny_config("llama"), marks=True))
    tiny.tokenizer.chat_template = TEMPLATE
    engine = await tiny.engine(context=2048)
    request = GenerateRequest(
        messages=[Message(role="user", content="hello")],
        tools=[Tool(name="set", description="Sets.", parameters=json.dumps(POINT))],
        tool_choice=choice,
        single_tool_call=True,
        sampling=Sampling(temperature=1, seed=3),
        max_tokens=800,
    )

    events = [event async for event in await engine.submit(request)]
    engine.close()

    calls = [call for event in events for call in event.delta.calls]
    if choice.none:
        assert calls == []
        assert events[-1].finish.reason in ("stop", "length")
    else:
        assert [call.name for call in calls] == ["set"]
        jsonschema.validate(json.loads(calls[0].arguments), POINT)
        assert events[-1].finish.reason == "tool_calls"


@pytest.mark.parametrize("strict", [False, True])
async def test_a_call_may_follow_a_text(strict: bool, tmp_path: Path) -> None:
    """A strict tool's call is constrained, and the text before it is not."""
    tiny = await Tiny.load(write_model(tmp_path / "m", tiny_config("llama"), marks=True))
    tiny.tokenizer.chat_template = NAMES_TOOLS
    call = '<tool_call>{"name": "set", "arguments": {"x": 3, "on": true}}</tool_call>'
    says = tiny.tokenizer.encode(f"Let me <see>. {call}", add_special_tokens=False)
    prompt = tiny.tokenizer.encode("set;hello", add_special_tokens=False)
    engine = await tiny.engine(Script(says, prompt=len(prompt)), context=2048)
    request = GenerateRequest(
        messages=[Message(role="user", content="hello")],
        tools=[Tool(name="set", parameters=json.dumps(POINT), strict=strict)],
        max_tokens=200,
    )

    events = [event async for event in await engine.submit(request)]
    engine.close()

    calls = [call for event in events for call in event.delta.calls]
    assert "".join(event.delta.text for event in events).strip() == "Let me <see>."
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("set", {"x": 3, "on": True})
    ]
    assert events[-1].finish.reason == "tool_calls"


def test_answers_that_begin_at_the_same_time_share_the_machine_s_states(
    tokenizer_of: Callable[[str], Any],
) -> None:
    dialect = Vocabulary(tokenizer_of("qwen")).dialect
    machine = dialect._machines[False]
    both = threading.Barrier(2)

    class Slow(dict[str, Any]):
        """Lets another thread look before a state is there, if it may."""

        def __setitem__(self, name: str, state: Any) -> None:
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)
            super().__setitem__(name, state)

    machine._states = Slow(machine._states)
    with ThreadPoolExecutor(2) as pool:
        states = list(pool.map(lambda _: dialect.marks("unseen", with_tools=False), range(2)))
    assert states[0][1] is states[1][1] is machine._states["unseen"][0]
