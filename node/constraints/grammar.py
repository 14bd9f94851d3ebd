"""From a request's constraint to a grammar of llguidance, checked before anything is computed."""

import json
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from unicluster.errors import InputError, in_one_line
from unicluster.v1.chat_pb2 import Constraint

# Whatever a grammar says, no token's mask takes longer than this much work of llguidance.
LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=250_000,
    max_grammar_size=500_000,
)
REASON_CHARACTERS = 200
# Models indent, and small ones never stop indenting.
JSON_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": r" {1,2}|\r?\n[ \t]{0,24}"}


def grammar_of(constraint: Constraint) -> str:
    """The grammar, in llguidance's own form.

    Raises InputError, which begins with the field's name, for what is no valid constraint.
    """
    kind = constraint.WhichOneof("kind")
    if kind is None:
        raise InputError("constraint: says nothing: set json_schema, json_object, regex or grammar")
    if kind == "json_object":
        if not constraint.json_object:
            raise InputError("constraint.json_object: must be true, or left out")
        return _of_schema({"type": "object"})
    text = getattr(constraint, kind)
    if kind == "json_schema":
        return _of_schema(_parsed(text))
    if not text.strip():
        raise InputError(f"constraint.{kind}: is empty")
    if kind == "regex":
        return _valid(kind, LLMatcher.grammar_from_regex(text))
    return _valid(kind, LLMatcher.grammar_from_lark(text))


def unforced(grammar: str) -> str:
    """A grammar of `grammar_of` under which the text of an answer is never forced.

    Where only one text may follow, llguidance has it in the tokens that a prompt would have. Text
    like "<think>" is a mark there, which the grammar does not allow: its tokens must be chosen.
    """
    if grammar.startswith("{"):
        (single,) = json.loads(grammar)["grammars"]
        schema = single["json_schema"]
        grammar = single["lark_grammar"] or f"start: %json {json.dumps(schema)}"
    return f'%llguidance {{"no_forcing": true}}\n{grammar}'


def _parsed(text: str) -> Any:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"constraint.json_schema: is no JSON: {in_one_line(error)}") from None
    if schema is True:  # any value, as of no conditions
        return {}
    if not isinstance(schema, dict):
        raise InputError("constraint.json_schema: must be an object")
    return schema


def _of_schema(schema: Any) -> str:
    """Whitespace may stand where JSON allows it, as models write it."""
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)
    except (ValueError, RecursionError) as error:  # what Python's JSON has, and others don't
        raise InputError(f"constraint.json_schema: {shortened(str(error))}") from None
    return _valid("json_schema", grammar)


def _valid(kind: str, grammar: str) -> str:
    refused, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    if refused:
        raise InputError(f"constraint.{kind}: {shortened(messages[0])}")
    if messages:  # parts of it that would not be enforced
        raise InputError(f"constraint.{kind}: can't be enforced in whole: {shortened(messages[0])}")
    return grammar


def shortened(message: str) -> str:
    """A message of llguidance's in one line: without the excerpts, with the reason below them."""
    lines = message.strip().splitlines() or ["no reason is stated"]
    reasons = [line.strip() for line in lines[1:] if line.startswith("error:")]
    text = " ".join([lines[0], *reasons[:1]])
    return text if len(text) <= REASON_CHARACTERS else f"{text[:REASON_CHARACTERS]}…"
