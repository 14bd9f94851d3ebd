"""Requests that schemathesis makes of the OpenAPI document of a door, and checks of the answers."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS: list[Any] = [
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


def try_document(
    url: str, key: str, *, examples: int, limit_s: float, paths: Sequence[str] = ()
) -> Counter[int]:
    """Statuses of the answers to any requests, with counts; `paths`: of these alone.

    Half of the requests keep to the document and half break it: `examples` of each kind for each
    path. Fails where an answer is none of the document's: another status, another type, another
    form, or none within `limit_s`.
    """
    schema: Any = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [each.ok() for each in schema.get_all_operations()]
    if paths:
        operations = [each for each in operations if each.path in paths]
    statuses: Counter[int] = Counter()

    def ask(case: Any) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        response = case.call(headers=headers, timeout=limit_s)
        assert response.status_code != 500, (case.as_curl_command(), response.text)
        case.validate_response(response, checks=CHECKS)
        statuses[response.status_code] += 1

    for operation in operations:
        for mode in MODES:
            _try(operation, mode, examples, ask)
    return statuses


def _try(operation: Any, mode: GenerationMode, examples: int, ask: Callable[[Any], None]) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # a failure is found again: no time goes into shrinking it
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def each(case: Any) -> None:
        ask(case)

    try:
        each()
    except Unsatisfiable:  # a request without parts can't break the document
        assert mode is GenerationMode.NEGATIVE
        assert operation.body is None or not len(operation.body)
