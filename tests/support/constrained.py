"""A small schema, and requests for answers of it."""

import json

from unicluster.v1.chat_pb2 import Constraint, GenerateRequest

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}


def point_of(prompt: list[int]) -> GenerateRequest:
    """Asks for a POINT, with room for all the whitespace that a random model likes."""
    constraint = Constraint(json_schema=json.dumps(POINT))
    return GenerateRequest(token_ids=prompt, constraint=constraint, max_tokens=380)
