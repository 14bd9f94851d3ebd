"""Messages, calls and tools on their way to the chat template: all of it is used, or refused."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from node.prompts.cancellation import Cancellation
from node.prompts.conversation import conversation_of
from node.prompts.reads import Arguments, Recorded, recorded_message, unread_fields
from node.prompts.templates import TEMPLATES
from node.prompts.written import written_prompt
from unicluster.chat_limits import (
    MOST_JSON_BYTES,
    MOST_NAME_CHARACTERS,
    MOST_TEXT_BYTES,
    MOST_TOOL_CALLS,
    MOST_TOOLS,
    check_limits,
)
from unicluster.errors import InputError
from unicluster.json_text import MOST_DEPTH, parse_object
from unicluster.v1.chat_pb2 import GenerateRequest, Message, Tool, ToolCall

ASK = Message(role="user", content="What is 1 + 2?")
ADD = ToolCall(id="c1", name="add", arguments='{"b": "é", "a": 1}')
SUB = ToolCall(id="c2", name="sub")
CALLS = Message(role="assistant", reasoning_content="Add them.", tool_calls=[ADD, SUB])
SUM = Message(role="tool", content="3", tool_call_id="c1")
REST = Message(role="tool", content="0", tool_call_id="c2", name="sub")
TOOL = Tool(name="add", description="Adds.", parameters='{"type": "object", "required": ["a"]}')

# Each in the manner of a family of models.
EXACT = """{%- if tools %}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif -%}
{%- for m in messages -%}
[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}{% if m.tool_call_id is defined %} for {{
m.tool_call_id }}{% endif %}]{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif
%}{{ m.content }}{% for c in m.tool_calls or [] %}<{{ c.id }} {{ c.function.name }} {{
c.function.arguments | tojson }}>{% endfor %}
{%- endfor %}"""
IN_ORDER = """{%- for m in messages -%}
{% if m.role == 'tool' %}<result>{{ m.content }}</result>{% elif m.tool_calls %}{{ m.content }}{%
for c in m.tool_calls %}{% set c = c.function %}<{{ c['name'] }}{% for key, value in
c.arguments.items() %} {{ key }}={{ value }}{% endfor %}>{% endfor %}{% else %}{{ m.role }}: {{
m.content }}{% endif %}
{%- endfor %}{# reasoning: #}{% if false %}{{ messages[0]['reasoning_content'] }}{% endif %}"""
TEXT_ARGUMENTS = """{%- for m in messages -%}
{% if m.role == 'assistant' and m.content is none %}{% for c in m['tool_calls'] %}{{ 'call ' +
c['function']['name'] + ' ' + c['function']['arguments'] + ';' }}{% endfor %}{% elif
m.content is not none %}{{ m.content }};{% endif %}{{ m.thinking or '' }}
{%- endfor %}"""
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ONLY_TWO_ROLES = """{% for m in messages %}{% if m.role == 'user' %}U {{ m.content }}{%
elif m.role == 'assistant' %}A {{ m.content }}{% endif %}{% endfor %}"""
FIRST_CALL = """{% for m in messages %}{{ m.content }}{{ m.reasoning_content }}{%
if m.tool_calls %}{{ m.tool_calls[0] | tojson }}{% endif %}{% endfor %}"""


def rendered(template: str, *messages: Message, **fields: Any) -> str:
    request = GenerateRequest(messages=messages, **fields)
    check_limits(request)
    variables = {"bos_token": "<s>", "enable_thinking": True}
    return TEMPLATES.render(template, conversation_of(request), variables, 10_000, Cancellation())


@contextmanager
def refused(complaint: str) -> Iterator[None]:
    with pytest.raises(InputError, match=complaint):
        yield


def test_all_fields_reach_a_template_that_uses_them() -> None:
    text = rendered(EXACT, ASK, CALLS, SUM, REST, tools=[TOOL])

    tool, *said = text.splitlines()
    assert json.loads(tool) == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "required": ["a"]},
        },
    }
    assert "".join(said) == (
        "[user]What is 1 + 2?"
        '[assistant](Add them.)<c1 add {"b": "é", "a": 1}><c2 sub {}>'
        "[tool add for c1]3[tool sub for c2]0"
    )


def test_results_come_in_the_order_of_their_calls() -> None:
    text = rendered(IN_ORDER, ASK, CALLS, REST, SUM)

    assert text.endswith("<add b=é a=1><sub><result>3</result><result>0</result>")


def test_arguments_are_text_where_a_template_adds_them_to_text() -> None:
    text = rendered(TEXT_ARGUMENTS, ASK, CALLS)

    assert text == 'What is 1 + 2?;call add {"b": "é", "a": 1};call sub {};Add them.'


def test_arguments_are_an_object_and_its_text() -> None:
    arguments = Arguments({"a": "ü"})

    assert ("x" + arguments, arguments + "x") == ('x{"a": "ü"}', '{"a": "ü"}x')
    assert f"{arguments}" == json.dumps(arguments, ensure_ascii=False) == '{"a": "ü"}'
    assert arguments["a"] == "ü"


LEFT_OUT = {
    "calls": (BARE, (ASK, Message(role="assistant", tool_calls=[ADD])), "tool_calls of message 2"),
    "reasoning": (
        BARE,
        (ASK, Message(role="assistant", content="3", reasoning_content="Hm."), ASK),
        "reasoning_content of message 2",
    ),
    "a speaker": (BARE, (Message(role="user", content="hi", name="Ann"),), "name of message 1"),
    "whose result it is": (BARE, (ASK, SUM), "tool_call_id of message 2"),
    "a role": (ONLY_TWO_ROLES, (ASK, Message(role="tool", content="3")), "content of message 2"),
    "system": (ONLY_TWO_ROLES, (Message(role="system", content="Hi"), ASK), "content of message 1"),
    "the second call": (FIRST_CALL, (ASK, CALLS), "tool_calls of message 2"),
    "a result missing": (IN_ORDER, (ASK, CALLS, REST), "tool_call_id of message 3"),
    "a result of no call": (IN_ORDER, (ASK, CALLS, SUM, REST, REST), "tool_call_id of message 5"),
    "another tool's name": (
        IN_ORDER,
        (ASK, CALLS, Message(role="tool", content="3", tool_call_id="c1", name="mul")),
        "name of message 3",
    ),
}


@pytest.mark.parametrize(("template", "messages", "complaint"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_a_field_that_the_template_leaves_out_is_refused_by_name(
    template: str, messages: tuple[Message, ...], complaint: str
) -> None:
    with refused(f"^messages: the {complaint}: the model's chat template does not use it"):
        rendered(template, *messages)


def test_tools_that_the_template_leaves_out_are_refused() -> None:
    with refused("^tools: the model's chat template does not use 'add'"):
        rendered(BARE, ASK, tools=[TOOL])
    with refused("does not use 'sub'"):
        rendered(BARE + "{{ tools[0] | tojson }}", ASK, tools=[TOOL, Tool(name="sub")])
    only_with_system = (
        "{{ messages[0].content }}{% if tools and messages[0].role == 'system' %}{{ tools }}"
        "{% endif %}"
    )
    with refused("does not use 'add'"):
        rendered(only_with_system, ASK, tools=[TOOL])
    assert "Adds." in rendered(only_with_system, Message(role="system"), tools=[TOOL])


def test_a_tool_without_parameters_has_none() -> None:
    shown = rendered("{{ messages[0].content }}{{ tools[0] | tojson }}", ASK, tools=[SUB_TOOL])

    assert '"parameters": {"type": "object", "properties": {}}' in shown


SUB_TOOL = Tool(name="sub")


def test_template_arguments_are_variables() -> None:
    template = BARE + "{{ effort | default('none') }} {% if enable_thinking %}think{% endif %}"

    assert rendered(template, ASK).endswith("none think")
    arguments = '{"effort": {"level": "hîgh"}, "enable_thinking": false}'
    assert rendered(template, ASK, template_arguments=arguments).endswith("{'level': 'hîgh'} ")


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "bos_token", "raise_exception", "range"]
)
def test_template_arguments_that_shadow_others_are_refused(name: str) -> None:
    with refused(f"^template_arguments: '{name}' is the chat template's already"):
        rendered(BARE, ASK, template_arguments=json.dumps({name: ""}))


def test_template_arguments_that_the_template_does_not_use_are_refused() -> None:
    with refused("^template_arguments: the model's chat template does not use 'effort'"):
        rendered(BARE, ASK, template_arguments='{"effort": "high"}')


@pytest.mark.parametrize(
    "read",
    [
        "{{ m.name }}",
        "{{ m['name'] }}",
        "{{ m.get('name') }}",
        "{{ m | tojson }}",
        "{{ m | tojson(indent=2) }}",
        "{{ m }}",
        "{{ [m] }}",
        "{% for key, value in m.items() %}{{ value }}{% endfor %}",
        "{% for key in m %}{{ m[key] }}{% endfor %}",
        "{{ m.values() | list }}",
        "{{ dict(m, role='x') }}",
        "{{ [m] | map(attribute='name') | join }}",
        "{{ m.copy().name }}",
    ],
)
def test_any_way_of_reading_a_field_uses_it(read: str) -> None:
    template = "{% for m in messages %}{{ m.content }}" + read + "{% endfor %}"

    assert "Ann" in rendered(template, Message(role="user", content="hi", name="Ann"))


def test_looking_whether_a_field_is_there_does_not_use_it() -> None:
    message = recorded_message({"role": "user", "content": "hi", "name": "Ann"})

    assert "name" in message
    assert message["content"] == "hi"
    assert unread_fields(message) == ["name"]
    copy = message.copy()
    assert isinstance(copy, Recorded)
    assert copy.pop("name") == "Ann"
    assert unread_fields(message) == []


class Written:
    """A tokenizer whose chats mlx-lm writes, in the format of a family of models."""

    response_initial_state = None

    def __init__(self) -> None:
        from mlx_lm.chat_templates.deepseek_v32 import apply_chat_template

        self._chat_template = apply_chat_template

    def apply_chat_template(self, *args: Any, **options: Any) -> list[int]:
        return list(self._chat_template(*args, **options).encode())


def written(*messages: Message, **fields: Any) -> str:
    tokens, _ = written_prompt(Written(), GenerateRequest(messages=messages, **fields))
    return bytes(tokens).decode()


def test_a_format_of_mlx_lm_gets_calls_and_tools_too() -> None:
    text = written(Message(role="system", content="S"), ASK, CALLS, REST, SUM, tools=[TOOL])

    for part in ('"description": "Adds."', 'name="add"', ">é<", "<result>3</result>\n<result>0"):
        assert part in text
    with refused("^tools: the model's chat template does not use 'add'"):
        written(ASK, tools=[TOOL])
    with refused("^messages: the name of message 1"):
        written(Message(role="user", content="hi", name="Ann"))
    with refused("^template_arguments: the model's chat template does not use 'effort'"):
        written(ASK, template_arguments='{"effort": 1}')
    assert "</think>" in written(ASK, template_arguments='{"enable_thinking": false}')


LONG = "a" * (MOST_NAME_CHARACTERS + 1)
OUT_OF_BOUNDS = {
    "calls of a user": (Message(role="user", tool_calls=[SUB]), "only messages of role assistant"),
    "reasoning of a tool": (Message(role="tool", reasoning_content="a"), "of role assistant"),
    "an answering system": (Message(role="system", tool_call_id="a"), "only messages of role tool"),
    "many calls": (
        Message(role="assistant", tool_calls=[SUB] * (MOST_TOOL_CALLS + 1)),
        f"{MOST_TOOL_CALLS + 1} calls, and at most",
    ),
    "a nameless call": (Message(role="assistant", tool_calls=[ToolCall(id="a")]), "needs a name"),
    "twins": (Message(role="assistant", tool_calls=[SUB, SUB]), "two of them have the same id"),
    "a long id": (Message(role="tool", tool_call_id=LONG), "257 characters in a name or id"),
    "a long name": (Message(role="user", name=LONG), "257 characters in a name or id"),
    "a long call": (Message(role="assistant", tool_calls=[ToolCall(name=LONG)]), "257 characters"),
}


@pytest.mark.parametrize(("message", "complaint"), OUT_OF_BOUNDS.values(), ids=OUT_OF_BOUNDS)
def test_messages_have_bounds(message: Message, complaint: str) -> None:
    with refused(f"^messages: the .* of message 2: .*{complaint}"):
        check_limits(GenerateRequest(messages=[ASK, message]))


TOO_MUCH = {
    "tools": GenerateRequest(tools=[TOOL] * (MOST_TOOLS + 1)),
    "tools of one name": GenerateRequest(tools=[TOOL, TOOL]),
    "a nameless tool": GenerateRequest(tools=[Tool(description="Adds.")]),
    "tools with token ids": GenerateRequest(token_ids=[1], tools=[TOOL]),
    "template arguments with token ids": GenerateRequest(token_ids=[1], template_arguments="{}"),
    "descriptions": GenerateRequest(tools=[Tool(name="a", description="a" * MOST_TEXT_BYTES)]),
    "reasoning": GenerateRequest(
        messages=[Message(role="assistant", reasoning_content="a" * (MOST_TEXT_BYTES + 1))]
    ),
    "JSON": GenerateRequest(template_arguments=" " * (MOST_JSON_BYTES + 1)),
    "JSON of a schema": GenerateRequest(
        tools=[Tool(name="a", parameters=" " * (1 + MOST_JSON_BYTES))]
    ),
}


@pytest.mark.parametrize("request_", TOO_MUCH.values(), ids=TOO_MUCH)
def test_too_much_is_refused_by_the_name_of_its_field(request_: GenerateRequest) -> None:
    with refused("^(messages|tools|template_arguments): "):
        check_limits(request_)


NO_OBJECTS = {
    "a list": ("[1]", "it is no object"),
    "half": ('{"a": ', "Expecting value"),
    "a name twice": ('{"a": {"b": 1, "b": 2}}', "'b' twice"),
    "no number": ('{"a": NaN}', "NaN is no number"),
    "infinity": ('{"a": -Infinity}', "-Infinity is no number"),
    "a large number": ('{"a": 1e999}', "1e999 is too large"),
    "a long number": ('{"a": ' + "1" * 10_000 + "}", "integer string conversion"),
    "half a character": ('{"a": "\\ud800"}', "surrogates not allowed"),
    "deep": ("[" * 100_000, f"more than {MOST_DEPTH} levels"),
    "deeper than allowed": ('{"a":' * 65 + "1" + "}" * 65, f"more than {MOST_DEPTH} levels"),
}


@pytest.mark.parametrize(("text", "complaint"), NO_OBJECTS.values(), ids=NO_OBJECTS)
def test_json_that_is_no_object_is_refused(text: str, complaint: str) -> None:
    with refused(f"^field must be the JSON text of an object: .*{complaint}"):
        parse_object("field", text)
    call = Message(role="assistant", tool_calls=[ToolCall(name="f", arguments=text)])
    for field, request in {
        "tools": GenerateRequest(tools=[Tool(name="f", parameters=text)]),
        "messages": GenerateRequest(messages=[call]),
        "template_arguments": GenerateRequest(template_arguments=text),
    }.items():
        with refused(f"^{field}: "):
            conversation_of(request)


def test_json_of_the_greatest_depth_is_an_object() -> None:
    text = '{"a":' * MOST_DEPTH + "1" + "}" * MOST_DEPTH

    assert json.dumps(parse_object("field", text), separators=(",", ":")) == text


def test_a_result_has_the_name_of_its_call() -> None:
    calls = [ToolCall(id=each, name=f"of_{each}", arguments="{}") for each in ("a", "b")]
    messages = [
        Message(role="assistant", tool_calls=calls),
        Message(role="tool", tool_call_id="b", content="2"),
        Message(role="tool", tool_call_id="a", content="1"),
    ]
    conversation = conversation_of(GenerateRequest(messages=messages))
    results = [(m["name"], m["content"]) for m in conversation.messages[1:]]
    assert results == [("of_a", "1"), ("of_b", "2")]
    assert {(1, "name"), (2, "name")} <= conversation.implied
    assert not messages[1].name
