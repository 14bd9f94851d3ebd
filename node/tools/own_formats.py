"""Formats of calls that mlx-lm does not know: DeepSeek's, gpt-oss's and Llama's."""

import json
import re
from dataclasses import replace
from typing import Any

from node.tools.call_format import CallFormat

Call = dict[str, Any]

# DeepSeek: <|tool call begin|>name<|tool sep|>{...}<|tool call end|>, or with the word "function"
# before the separator, and the name and a block of JSON after it.


def _mark(words: str) -> str:
    """One of DeepSeek's marks, which has wide bars and low blocks for bars and spaces."""
    return "<\uff5c" + words.replace(" ", "\u2581") + "\uff5c>"


DEEPSEEK_CALL = (_mark("tool call begin"), _mark("tool sep"), _mark("tool call end"))
_FENCE = re.compile(r"^\s*(?P<name>[^\n]+)\n```(?:json)?\n(?P<arguments>.*?)\n?```\s*$", re.DOTALL)


def _parse_deepseek(text: str, tools: list[Call]) -> list[Call]:
    begin, separator, end = DEEPSEEK_CALL
    calls = []
    for part in text.split(begin)[1:]:
        head, found, rest = part.partition(separator)
        body = rest.partition(end)[0]
        if not found:
            raise ValueError("a call has no separator")
        if (fenced := _FENCE.match(body)) and head.strip() in ("function", ""):
            head, body = fenced["name"], fenced["arguments"]
        calls.append({"name": head.strip(), "arguments": json.loads(body)})
    return calls


DEEPSEEK = CallFormat(
    "deepseek", _mark("tool calls begin"), _mark("tool calls end"), _parse_deepseek
)
DEEPSEEK_FENCED = replace(DEEPSEEK, name="deepseek_fenced")


# gpt-oss (harmony): every message has a header, which names its channel and perhaps a recipient:
# <|channel|>commentary to=functions.name <|constrain|>json<|message|>{...}<|call|>
_MESSAGE = "<|message|>"
_FUNCTION = re.compile(r"^(?P<name>[\w.-]+)")


def _parse_harmony(text: str, tools: list[Call]) -> list[Call]:
    header, found, body = text.partition(_MESSAGE)
    named = _FUNCTION.match(header)
    if not found or named is None:
        raise ValueError("a call has no name or no message")
    return [{"name": named["name"], "arguments": json.loads(body)}]


HARMONY = CallFormat(
    "harmony",
    "<|channel|>commentary to=functions.",
    "<|call|>",
    _parse_harmony,
    transitions={
        "header": [
            ("<|channel|>analysis<|message|>", "reasoning"),
            ("<|channel|>commentary to=functions.", "tool"),
            (" to=functions.", "tool"),
            (_MESSAGE, "normal"),
        ],
        "reasoning": [("<|end|>", "header"), ("<|start|>assistant", "header")],
        "normal": [("<|end|>", "header"), ("<|start|>assistant", "header")],
        "tool": [("<|call|>", "header"), ("<|end|>", "header")],
    },
    initial_state="header",
    closings=("<|end|>", f"<|end|><|start|>assistant<|channel|>final{_MESSAGE}"),
)


# Llama 3: {"name": "...", "parameters": {...}}, perhaps after a mark that is a token.
_LLAMA_START = '{"name": "'


def _parse_llama(text: str, tools: list[Call]) -> list[Call]:
    decoder, at, calls = json.JSONDecoder(), 0, []
    text = _LLAMA_START + text
    while at < len(text):
        call, at = decoder.raw_decode(text, at)
        calls.append({"name": call["name"], "arguments": call.get("parameters", {})})
        rest = text[at:].lstrip(" \n;")
        at = len(text) - len(rest)
    return calls


LLAMA = CallFormat("llama", _LLAMA_START, "", _parse_llama, plain=True)


def own_format(template: str, vocabulary: "set[str] | dict[str, int]") -> CallFormat | None:
    """The format of a model, by what its chat template writes and which tokens there are."""
    if "<|channel|>" in vocabulary and _MESSAGE in vocabulary:
        return HARMONY
    if DEEPSEEK.start in template:
        return DEEPSEEK_FENCED if "```json" in template else DEEPSEEK
    if '"parameters": ' in template and "<|start_header_id|>" in vocabulary:
        return LLAMA
    return None
