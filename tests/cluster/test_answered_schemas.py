"""Two hundred JSON schemas over the HTTP door of the demo model: every one that ends is valid.

Slow: each is an answer. Of a real model, and with times: bench/schemas.py, bench/constrained.py.
"""

import asyncio
from pathlib import Path

import pytest

from tests.support.cluster import LocalCluster
from tests.support.deadlines import scaled
from tests.support.schema_answers import answers_to
from tests.support.schemas import resolved, schemas

COUNT = 200
MOST_ENDLESS = 10


@pytest.mark.sweep
def test_every_answer_to_two_hundred_schemas_is_valid(tmp_path: Path) -> None:
    asked = [resolved(schema) for schema in schemas(COUNT)]
    with LocalCluster(tmp_path) as cluster:
        cluster.start_agents("ann", "bob")
        with cluster.serve("demo", "--context", "1024", "--users", "8") as server:
            answers = asyncio.run(answers_to(server.http, asked, at_once=8, limit_s=scaled(120)))
    assert len(answers) == COUNT
    assert [(answer.wrong, answer.schema) for answer in answers if answer.wrong] == []
    # Where a schema sets no limit to a string, a model that tells stories tells them there.
    assert sum(not answer.ended for answer in answers) <= MOST_ENDLESS
