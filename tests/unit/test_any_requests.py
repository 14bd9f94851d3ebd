"""Any request that its OpenAPI document allows or not: the door answers as the document says.

Slow: hundreds of requests, which take long to make.
"""

import asyncio

import pytest

from tests.support.any_requests import try_document
from tests.support.deadlines import scaled
from tests.support.http_door import http_door


@pytest.mark.sweep
@pytest.mark.parametrize("state", ["ready", "loading"])
async def test_every_answer_is_one_of_the_document(state: str) -> None:
    async with http_door() as door:
        door.service.state = state
        statuses = await asyncio.to_thread(
            try_document, door.url, "none", examples=6, limit_s=scaled(30)
        )
        assert door.gateway.running == door.head.live == 0
    assert statuses[200]
    assert statuses[400]
    assert bool(statuses[503]) == (state == "loading")
