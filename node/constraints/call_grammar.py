"""Grammars of what stands between a model's tool-call marks, from the schemas of the tools."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llguidance import LLMatcher

from node.constraints.grammar import JSON_OPTIONS, LIMITS, shortened
from node.tools.call_format import CallFormat
from node.tools.own_formats import DEEPSEEK_CALL
from unicluster.errors import InputError
from unicluster.errors import shown as quoted
from unicluster.v1.chat_pb2 import Tool

Schema = dict[str, Any]
ANY_OBJECT: Schema = {"type": "object"}


class Rules:
    """Rules of a grammar in llguidance's form of Lark, as they are being written.

    `special`: numbers of the tokens that no text can become, by name.
    """

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        self._rules: list[str] = []

    def text(self, text: str) -> str:
        """Literal text, of which a special token is that token."""
        for name, number in self._special.items():
            before, found, after = text.partition(name)
            if found:
                return _sequence(self.text(before), f"<[{number}]>", self.text(after))
        return json.dumps(text) if text else ""

    def schema(self, schema: Schema) -> str:
        return f"%json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS})}"

    def up_to(self, suffix: str) -> str:
        """Any text, and the first `suffix` after it."""
        if any(suffix.startswith(name) for name in self._special):
            return _sequence("/(.|\\n)*/", self.text(suffix))
        return self._rule(f"[suffix={json.dumps(suffix)}]: /(.|\\n)*/")

    def one_of(self, alternatives: Iterable[str]) -> str:
        return self._rule(f": {' | '.join(alternatives)}")

    def grammar(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._rules]) + "\n"

    def _rule(self, body: str) -> str:
        name = f"part{len(self._rules)}"
        self._rules.append(f"{name}{body}")
        return name


def call_grammar(calls: CallFormat, tools: Iterable[Tool], special: Mapping[str, int]) -> str:
    """The grammar of a call's text, or of several where the format has them in one.

    Raises InputError, which begins with the field's name, for a format that has none, and for a
    strict tool whose schema can't be enforced; one that isn't strict may have any arguments then.
    """
    write = _WRITERS.get(calls.name)
    if write is None:
        raise InputError(
            f"tool_choice: calls can't be enforced in this model's format of them ({calls.name})"
        )
    rules = Rules(special)
    return LLMatcher.grammar_from_lark(rules.grammar(write(rules, list(map(_checked, tools)))))


def _checked(tool: Tool) -> tuple[str, Schema]:
    """A tool's name and the schema of its arguments."""
    schema: Schema = json.loads(tool.parameters) if tool.parameters else {}
    schema = {"type": "object", **schema}
    if tool.strict and "properties" in schema:
        schema.setdefault("additionalProperties", False)
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)
    refused, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    if not refused and not messages:
        return tool.name, schema
    if tool.strict:
        raise InputError(
            f"tools: the parameters of {quoted(tool.name)} can't be enforced: "
            f"{shortened(messages[0])}"
        )
    return tool.name, ANY_OBJECT


Tools = list[tuple[str, Schema]]


# Each writes the start rule of one format.


def _named_json(rules: Rules, tools: Tools) -> str:
    """One call, as {"name": ..., "arguments": {...}}."""
    calls = []
    for name, schema in tools:
        before = '{"name": ' + json.dumps(name) + ', "arguments": '
        calls.append(_sequence(rules.text(before), rules.schema(schema), rules.text("}")))
    return rules.one_of(calls)


def _json_tools(rules: Rules, tools: Tools) -> str:
    return _sequence(r"/\s?/", _named_json(rules, tools), r"/\s?/")


def _mistral(rules: Rules, tools: Tools) -> str:
    call = _named_json(rules, tools)
    return _sequence("/ ?/", rules.text("["), call, f'(", " {call})*', rules.text("]"))


def _mistral_headers(rules: Rules, tools: Tools) -> str:
    calls = (_sequence(rules.text(name + "[ARGS]"), rules.schema(of)) for name, of in tools)
    return rules.one_of(calls)


def _kimi_k2(rules: Rules, tools: Tools) -> str:
    begin, argument, end = (
        rules.text(f"<|tool_call_{part}|>") for part in ("begin", "argument_begin", "end")
    )
    calls = []
    for name, schema in tools:
        number = _sequence(rules.text(f"functions.{name}:"), "/[0-9]{1,3}/")
        calls.append(_sequence(begin, number, argument, rules.schema(schema), end))
    return f"{rules.one_of(calls)}+"


def _deepseek(rules: Rules, tools: Tools) -> str:
    begin, separator, end = map(rules.text, DEEPSEEK_CALL)
    call = rules.one_of(
        _sequence(begin, rules.text(name), separator, rules.schema(schema), end)
        for name, schema in tools
    )
    return rf"{call} (/\n?/ {call})*"


def _deepseek_fenced(rules: Rules, tools: Tools) -> str:
    begin, separator, end = map(rules.text, DEEPSEEK_CALL)
    calls = []
    for name, schema in tools:
        head = _sequence(begin, rules.text("function"), separator)
        fenced = rules.text(f"{name}\n```json\n"), rules.schema(schema), rules.text("\n```")
        calls.append(_sequence(head, *fenced, end))
    call = rules.one_of(calls)
    return rf"{call} (/\n?/ {call})*"


def _harmony(rules: Rules, tools: Tools) -> str:
    header = " <|constrain|>json<|message|>"
    calls = (_sequence(rules.text(name + header), rules.schema(of)) for name, of in tools)
    return rules.one_of(calls)


def _llama(rules: Rules, tools: Tools) -> str:
    """After {"name": ", which is the mark."""
    calls = []
    for name, schema in tools:
        before = rules.text(json.dumps(name)[1:] + ', "parameters": ')
        calls.append(_sequence(before, rules.schema(schema), rules.text("}")))
    return rules.one_of(calls)


def _members(schema: Schema) -> list[tuple[str, Schema, bool]]:
    """Names, schemas, and whether they are required, of the members of an object."""
    required = set(schema.get("required", []))
    shared: Schema = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return [
        (name, {**(member if isinstance(member, dict) else {}), **shared}, name in required)
        for name, member in schema.get("properties", {}).items()
    ]


def _tagged(rules: Rules, schema: Schema, before: str, after: str) -> str:
    """Members as tags, in the schema's order.

    `before` stands before each value, its NAME replaced, and `after` behind it.
    """
    parts = []
    for name, member, required in _members(schema):
        choices = member.get("enum", [None])
        if member.get("type") == "string" and "enum" not in member:
            value = rules.up_to(after)
        elif all(isinstance(choice, str) for choice in choices):
            value = _sequence(rules.one_of(map(rules.text, choices)), rules.text(after))
        else:
            value = _sequence(rules.schema(member), rules.text(after))
        part = _sequence(rules.text(before.replace("NAME", name)), value)
        parts.append(part if required else f"({part})?")
    return _sequence(*parts)


def _qwen3_coder(rules: Rules, tools: Tools) -> str:
    calls = []
    for name, schema in tools:
        members = _tagged(rules, schema, "<parameter=NAME>\n", "\n</parameter>\n")
        begin, end = rules.text(f"<function={name}>\n"), rules.text("</function>")
        calls.append(_sequence(begin, members, end))
    return _sequence(r"/\n?/", rules.one_of(calls), r"/\n?/")


def _minimax_m2(rules: Rules, tools: Tools) -> str:
    calls = []
    for name, schema in tools:
        members = _tagged(rules, schema, '<parameter name="NAME">', "</parameter>\n")
        begin, end = rules.text(f'<invoke name="{name}">\n'), rules.text("</invoke>")
        calls.append(_sequence(begin, members, end))
    return _sequence(r"/\n?/", rf"({rules.one_of(calls)} /\n?/)+")


def _glm47(rules: Rules, tools: Tools) -> str:
    before, after = "<arg_key>NAME</arg_key><arg_value>", "</arg_value>"
    calls = (_sequence(rules.text(name), _tagged(rules, of, before, after)) for name, of in tools)
    return rules.one_of(calls)


def _sequence(*parts: str) -> str:
    return " ".join(part for part in parts if part)


_WRITERS: dict[str, Callable[[Rules, Tools], str]] = {
    "json_tools": _json_tools,
    "mistral": _mistral,
    "mistral_headers": _mistral_headers,
    "kimi_k2": _kimi_k2,
    "deepseek": _deepseek,
    "deepseek_fenced": _deepseek_fenced,
    "harmony": _harmony,
    "llama": _llama,
    "qwen3_coder": _qwen3_coder,
    "minimax_m2": _minimax_m2,
    "glm47": _glm47,
}
