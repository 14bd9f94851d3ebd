"""What OpenAI's strict mode does not allow is refused wherever a schema can be strict."""

from typing import Any, Literal

import pytest
from openai.lib._pydantic import to_strict_json_schema
from pydantic import BaseModel

from coordinator.protocols.errors import failure_of
from coordinator.protocols.openai_chat import read_chat
from coordinator.protocols.openai_responses import read_response
from coordinator.protocols.openai_strict import check_strict
from unicluster.errors import InputError

HELLO = [{"role": "user", "content": "hello"}]
TEXT = {"type": "string"}


def closed(**properties: Any) -> dict[str, Any]:
    """An object as strict mode has it."""
    named = {"properties": properties, "required": list(properties)}
    return {"type": "object", "additionalProperties": False, **named}


OPEN = {"type": "object", "properties": {"b": TEXT}, "required": ["b"]}
OPTIONAL = closed(b=TEXT, c=TEXT) | {"required": ["b"]}

REFUSED: dict[str, tuple[Any, str]] = {
    "a list": ({"type": "array", "items": TEXT}, "its type must be object"),
    "no type": ({"anyOf": [closed()]}, "its type must be object"),
    "open": (OPEN, "in the schema itself additionalProperties must be false"),
    "said to be open": (
        OPEN | {"additionalProperties": True},
        "in the schema itself additionalProperties must be false",
    ),
    "optional": (OPTIONAL, "in the schema itself required must name 'c', too"),
    "nothing required": (closed(b=TEXT) | {"required": None}, "must name 'b', too"),
    "property": (closed(a=OPEN), "in 'properties.a' additionalProperties"),
    "nullable": (closed(a=OPEN | {"type": ["object", "null"]}), "in 'properties.a' additional"),
    "items": (closed(a={"type": "array", "items": OPTIONAL}), "in 'properties.a.items' required"),
    "choice": (closed(a={"anyOf": [TEXT, OPEN]}), r"in 'properties.a.anyOf\[1\]' additional"),
    "definition": (closed() | {"$defs": {"d": OPTIONAL}}, r"in '\$defs.d' required must name 'c'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_is_not_strict_is_refused_by_its_place(name: str) -> None:
    schema, message = REFUSED[name]
    named = {"name": "n", "schema": schema}
    function = {"name": "f", "parameters": schema}
    strict = {"strict": True}

    for path, read, fields in (
        (
            "response_format.json_schema.schema",
            read_chat,
            {"response_format": {"type": "json_schema", "json_schema": named | strict}},
        ),
        (
            "tools[0].function.parameters",
            read_chat,
            {"tools": [{"type": "function", "function": function | strict}]},
        ),
        (
            "text.format.schema",
            read_response,
            {"text": {"format": {"type": "json_schema", **named, **strict}}},
        ),
        (
            "tools[0].parameters",
            read_response,
            {"tools": [{"type": "function", **function, **strict}]},
        ),
    ):
        asked = {"messages": HELLO} if read is read_chat else {"input": HELLO}
        with pytest.raises(InputError, match=message) as caught:
            read({**asked, **fields}, "m")
        failure = failure_of(caught.value)
        assert (failure.status, failure.param) == (400, path)


@pytest.mark.parametrize("name", REFUSED)
def test_without_strict_any_schema_is_read(name: str) -> None:
    schema, _ = REFUSED[name]
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}

    asked = read_chat({"messages": HELLO, "response_format": form}, "m")

    assert asked.request.constraint.json_schema


def test_schemas_that_the_library_makes_are_strict() -> None:
    class Leaf(BaseModel):
        kind: Literal["leaf"]
        size: int | None

    class Tree(BaseModel):
        kind: Literal["tree"]
        parts: list["Tree | Leaf"]

    Tree.model_rebuild(_types_namespace={"Tree": Tree, "Leaf": Leaf})

    check_strict(to_strict_json_schema(Tree), "schema")


def test_properties_may_have_the_names_of_keywords() -> None:
    check_strict(closed(properties=TEXT, items=closed(required=TEXT)), "schema")


def test_a_deep_schema_is_looked_through_to_its_end() -> None:
    schema = OPEN
    for _ in range(5000):
        schema = closed(a=schema)

    with pytest.raises(InputError, match="additionalProperties must be false"):
        check_strict(schema, "schema")
