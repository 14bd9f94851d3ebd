"""JSON schemas of the kinds that people send: some by hand, the others put together at random."""

import random
from typing import Any

Schema = dict[str, Any]

BY_HAND: list[Schema] = [
    {
        "title": "Invoice",
        "type": "object",
        "properties": {
            "number": {"type": "string", "pattern": "^INV-[0-9]{4}$"},
            "date": {"type": "string", "format": "date"},
            "lines": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": {
                    "type": "object",
                    "properties": {
                        "what": {"type": "string", "maxLength": 20},
                        "count": {"type": "integer", "minimum": 1, "maximum": 99},
                        "price": {"type": "number", "minimum": 0, "exclusiveMaximum": 1000},
                    },
                    "required": ["what", "count", "price"],
                    "additionalProperties": False,
                },
            },
            "paid": {"type": "boolean"},
        },
        "required": ["number", "date", "lines", "paid"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {
            "steps": {
                "type": "array",
                "maxItems": 3,
                "items": {
                    "type": "object",
                    "properties": {
                        "explanation": {"type": "string", "maxLength": 30},
                        "output": {"type": "string", "maxLength": 30},
                    },
                    "required": ["explanation", "output"],
                    "additionalProperties": False,
                },
            },
            "final_answer": {"type": "string", "maxLength": 30},
        },
        "required": ["steps", "final_answer"],
        "additionalProperties": False,
    },
    {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": -5, "maximum": 5},
                    "children": {
                        "type": "array",
                        "maxItems": 1,
                        "items": {"$ref": "#/$defs/node"},
                    },
                },
                "required": ["value", "children"],
                "additionalProperties": False,
            }
        },
    },
    {
        "anyOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "circle"}, "radius": {"type": "number"}},
                "required": ["kind", "radius"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"kind": {"const": "square"}, "side": {"type": "number"}},
                "required": ["kind", "side"],
                "additionalProperties": False,
            },
        ]
    },
    {"type": "array", "prefixItems": [{"type": "string", "maxLength": 3}, {"type": "null"}],
     "items": False, "minItems": 2},
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
    {"type": ["string", "null"], "maxLength": 4},
    {"enum": ["red", "gr\u00fcn", 3, None, True]},
    {"const": {"a": [1, 2]}},
    {"type": "string", "enum": ["\"quoted\"", "back\\slash", "new\nline"]},
]  # fmt: skip

FORMATS = ("date", "time", "date-time", "email", "ipv4", "uuid", "hostname")
PATTERNS = ("^[a-z]{2,5}$", "^\\d{3}-\\d{4}$", "^(yes|no)$", "^[A-Z][a-z]*$", "^#[0-9a-f]{6}$")


def schemas(count: int, seed: int = 0) -> list[Schema]:
    """So many schemas, always the same ones for a seed."""
    rng = random.Random(seed)
    return [*BY_HAND, *(_any(rng, depth=3) for _ in range(count - len(BY_HAND)))][:count]


def _any(rng: random.Random, depth: int) -> Schema:
    simple = [_integer, _number, _string, _choice, lambda rng: {"type": "boolean"}]
    if depth == 0:
        return rng.choice(simple)(rng)
    return rng.choice(
        [
            *simple[:2],
            lambda rng: _object(rng, depth),
            lambda rng: _object(rng, depth),
            lambda rng: _array(rng, depth),
            lambda rng: {"anyOf": [_any(rng, depth - 1), {"type": "null"}]},
            lambda rng: _referring(rng, depth),
        ]
    )(rng)


def _integer(rng: random.Random) -> Schema:
    low = rng.randrange(-50, 50)
    bounds = rng.choice(
        [
            {"minimum": low, "maximum": low + rng.randrange(100)},
            {"exclusiveMinimum": low, "exclusiveMaximum": low + 9},
            {"minimum": 10, "maximum": 12345},
            {"minimum": 0, "maximum": 100, "multipleOf": rng.choice([2, 5])},
        ]
    )
    return {"type": "integer", **bounds}


def _number(rng: random.Random) -> Schema:
    low = round(rng.uniform(-10, 10), 2)
    return {"type": "number", "minimum": low, "maximum": round(low + rng.uniform(0.5, 20), 2)}


def _string(rng: random.Random) -> Schema:
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "string", "format": rng.choice(FORMATS)}
    if kind == 1:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    low = rng.randrange(4)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(1, 12)}


def _choice(rng: random.Random) -> Schema:
    values = ["low", "high", "n/a", 1, 2.5, None, True]
    return {"enum": rng.sample(values, rng.randrange(1, 5))}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(["id", "name", "tags", "unit price", "\u00e4rger", "x-y", "a.b"], 4)
    names = names[: rng.randrange(1, 5)]
    return {
        "type": "object",
        "properties": {name: _any(rng, depth - 1) for name in names},
        "required": rng.sample(names, rng.randrange(len(names) + 1)),
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(3)
    most = low + rng.randrange(3)
    return {"type": "array", "items": _any(rng, depth - 1), "minItems": low, "maxItems": most}


def _referring(rng: random.Random, depth: int) -> Schema:
    """An object whose members are one definition, under the path that references have to it."""
    shared = _any(rng, 0)
    members = {name: {"$ref": "#/$defs/shared"} for name in ("first", "second")}
    return {
        "type": "object",
        "properties": members,
        "required": ["second"],
        "additionalProperties": False,
        "x-shared": shared,
    }


def resolved(schema: Any) -> Any:
    """A schema whose references lead to definitions at its root, each by a name of its own."""
    definitions: dict[str, Any] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "x-shared" not in value:
            return {key: walk(each) for key, each in value.items()}
        name = f"shared{len(definitions)}"
        definitions[name] = value["x-shared"]
        members = {key: {"$ref": f"#/$defs/{name}"} for key in value["properties"]}
        return {
            **{key: each for key, each in value.items() if key != "x-shared"},
            "properties": members,
        }

    whole = walk(schema)
    return {**whole, "$defs": definitions} if definitions else whole
