"""Parts of JSON schemas, as requests are read and answers are written here.

In requests no field is ignored, and null stands for a field that is left out; in answers every
field is named, so that a client can rely on the document.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from coordinator.protocols.asked import Json
from unicluster.chat_limits import (
    MOST_BIAS,
    MOST_BIASES,
    MOST_NAME_CHARACTERS,
    MOST_STOP,
    MOST_STOP_CHARACTERS,
    NAME_CHARACTERS,
)

ANY: Json = {}
FLAG: Json = {"type": "boolean"}
TEXT: Json = {"type": "string"}
OBJECT: Json = {"type": "object"}
NULL: Json = {"type": "null"}
MODEL: Json = {"type": "string", "maxLength": NAME_CHARACTERS}
# Of tools and calls: not only white space.
NAME: Json = {"type": "string", "maxLength": MOST_NAME_CHARACTERS, "pattern": r"\S"}
ID: Json = {"type": "string", "maxLength": MOST_NAME_CHARACTERS}
COUNT: Json = {"type": "integer", "minimum": 0}
# Of reasoning; which words it may be depends on the model's chat template.
EFFORT: Json = {"type": "string", "maxLength": MOST_NAME_CHARACTERS}
NUMBER: Json = {"type": "number"}


def ref(name: str) -> Json:
    """The schema of that name among the document's components."""
    return {"$ref": f"#/components/schemas/{name}"}


def whole(low: int, high: int) -> Json:
    """An integer from `low` to `high`."""
    return {"type": "integer", "minimum": low, "maximum": high}


def number(low: float, high: float, *, above: bool = False) -> Json:
    """A number from `low` to `high`; with `above`, not `low` itself."""
    return {"type": "number", "exclusiveMinimum" if above else "minimum": low, "maximum": high}


def choice(*allowed: Any) -> Json:
    """One of these values."""
    return {"enum": list(allowed)}


def items(schema: Json, least: int = 0, most: int | None = None) -> Json:
    """A list."""
    limits = {"minItems": least} | ({} if most is None else {"maxItems": most})
    return {"type": "array", "items": schema} | limits


def either(*schemas: Json) -> Json:
    """Schema that is matched by what matches any of these."""
    return {"anyOf": list(schemas)}


def optional(schema: Json) -> Json:
    """The schema of what may be null."""
    if not schema or NULL in schema.get("anyOf", ()):
        return schema
    return {"anyOf": [*schema.get("anyOf", [schema]), NULL]}


def asked(needed: Mapping[str, Json], others: Mapping[str, Json]) -> Json:
    """An object of a request: fields that it needs, and others, which may be null."""
    properties = {**needed, **{name: optional(schema) for name, schema in others.items()}}
    return {"type": "object", "additionalProperties": False} | {
        "required": list(needed),
        "properties": properties,
    }


def answered(always: Mapping[str, Json], sometimes: Mapping[str, Json] | None = None) -> Json:
    """An object of an answer: fields that it always has, and others."""
    return {"type": "object", "additionalProperties": False} | {
        "required": list(always),
        "properties": {**always, **(sometimes or {})},
    }


def anything(names: Iterable[str]) -> dict[str, Json]:
    """Fields that change no answer, whatever they are."""
    return dict.fromkeys(names, ANY)


STOP = either(TEXT, items({"type": "string", "maxLength": MOST_STOP_CHARACTERS}, most=MOST_STOP))
BIASES: Json = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": optional(number(-MOST_BIAS, MOST_BIAS)),
    "maxProperties": MOST_BIASES,
}
TEMPERATURE = number(0, 2)
TOP_P = number(0, 1, above=True)
MIN_P = number(0, 1)
PENALTY = number(-2, 2)
REPETITION_PENALTY = number(0, 10, above=True)
SEED = whole(-(1 << 63), (1 << 64) - 1)
# Fields that an error object has where the model does not answer.
NOT_READY: dict[str, Json] = {"state": TEXT, "reason": TEXT, "progress": optional(number(0, 1))}
FINISH = choice("stop", "length", "tool_calls")
