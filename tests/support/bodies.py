"""JSON bodies for tests: of a schema's form, of all its fields, or damaged in one place.

Of JSON Schema this knows what `coordinator/openapi/parts.py` writes, and references.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import strategies as st

Json = dict[str, Any]
# What clients send where something else is expected: other types, bounds of numbers, long texts.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 1.5, -1e300, 1 << 31, 1 << 64, -(1 << 64), 10**400),
    *("", " ", "nonsense", "x" * 5000, [], [None], [1], ["text"], [[1]], {}, {"nonsense": 1}),
)
MOST_ITEMS = 3
# An object that is a schema, which OpenAI's strict mode allows.
STRICT: Json = {"type": "object", "additionalProperties": False}


class Bodies:
    """Bodies by schemas that refer to each other by `#/components/schemas/NAME`."""

    def __init__(self, schemas: Mapping[str, Json]) -> None:
        self._schemas = schemas

    def resolved(self, schema: Json) -> Json:
        """The schema, or the one it refers to."""
        while "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        return schema

    def branches(self, schema: Json) -> Iterator[Json]:
        """The schemas any of which a value may match: one, but for `anyOf`."""
        schema = self.resolved(schema)
        if "anyOf" not in schema:
            yield schema
        for each in schema.get("anyOf", ()):
            yield from self.branches(each)

    def matching(self, schema: Json) -> st.SearchStrategy[Any]:
        """Values that match the schema."""
        of_each = [self._matching(each) for each in self.branches(schema)]
        return st.one_of(of_each)

    def _matching(self, schema: Json) -> st.SearchStrategy[Any]:
        if "enum" in schema:
            return st.sampled_from(schema["enum"])
        match schema.get("type"):
            case "object":
                return self._objects(schema)
            case "array":
                low = schema.get("minItems", 0)
                high = min(schema.get("maxItems", MOST_ITEMS), low + MOST_ITEMS)
                return st.lists(self.matching(schema["items"]), min_size=low, max_size=high)
            case "string":
                if "pattern" in schema:
                    return st.text(min_size=1, max_size=9).map(lambda text: f"a{text}")
                return st.text(max_size=9)
            case "integer":
                return st.integers(schema.get("minimum"), schema.get("maximum"))
            case "number":
                above = "exclusiveMinimum" in schema
                return st.floats(
                    schema.get("exclusiveMinimum" if above else "minimum"),
                    schema.get("maximum"),
                    exclude_min=above,
                )
            case "boolean":
                return st.booleans()
            case "null":
                return st.none()
        return st.sampled_from(ODD)

    def _objects(self, schema: Json) -> st.SearchStrategy[Any]:
        if "properties" in schema:
            fields = {name: self.matching(each) for name, each in schema["properties"].items()}
            return st.fixed_dictionaries(
                {name: fields[name] for name in schema["required"]},
                optional={n: each for n, each in fields.items() if n not in schema["required"]},
            )
        if "propertyNames" in schema:
            names = st.integers(0, 10**9 - 1).map(str)
            values = self.matching(schema["additionalProperties"])
            return st.dictionaries(names, values, max_size=MOST_ITEMS)
        names = st.text(max_size=9)
        return st.dictionaries(names, st.sampled_from(ODD), max_size=MOST_ITEMS)

    def examples(self, schema: Json) -> list[Any]:
        """Values that together have every field of the schema, at any depth, in every branch."""
        return [value for each in self.branches(schema) for value in self._examples(each)]

    def _examples(self, schema: Json) -> list[Any]:
        if "enum" in schema:
            return list(schema["enum"])
        match schema.get("type"):
            case "object" if "properties" in schema:
                full = {name: self.examples(each) for name, each in schema["properties"].items()}
                one = {name: values[0] for name, values in full.items()}
                return [one] + [
                    {**one, name: value} for name, values in full.items() for value in values[1:]
                ]
            case "object" if "propertyNames" in schema:
                return [{"1": value} for value in self.examples(schema["additionalProperties"])]
            case "object":
                return [copy.deepcopy(STRICT)]
            case "array":
                return [[value] for value in self.examples(schema["items"])]
            case "integer":
                return [min(1, schema.get("maximum", 1))]
        plain = {"null": None, "string": "a", "number": 1, "boolean": True}
        return [plain.get(schema.get("type", ""), {})]

    def fields(self, schema: Json, path: str = "") -> Iterator[str]:
        """Paths of all fields of the schema, such as "messages[].role"."""
        for each in self.branches(schema):
            if "items" in each:
                yield from self.fields(each["items"], f"{path}[]")
            for name, field in each.get("properties", {}).items():
                where = f"{path}.{name}" if path else name
                yield where
                yield from self.fields(field, where)


@st.composite
def damaged(draw: st.DrawFn, bodies: st.SearchStrategy[Any]) -> Any:
    """A body with one value replaced, one field less, or one more; it may still be right."""
    body = copy.deepcopy(draw(bodies))
    places = list(_places(body))
    where, key = draw(st.sampled_from(places)) if places else (None, None)
    how = draw(st.sampled_from(("replace", "remove", "add", "other body")))
    if where is None or how == "other body":
        return draw(st.sampled_from(ODD))
    if how == "replace":
        where[key] = draw(st.sampled_from(ODD))
    elif how == "remove":
        del where[key]
    elif isinstance(where, dict):
        where[draw(st.sampled_from(("nonsense", "", "Model", f"{key} ")))] = 1
    else:
        where.append(draw(st.sampled_from(ODD)))
    return body


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each place in a JSON value: the object or list, and the name or number in it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in inside:
        yield value, key
        if isinstance(each, dict | list):
            yield from _places(each)
