"""How many models an agent inspects at a time."""

import asyncio

import pytest

from node.agent.admission import Inspections
from unicluster.errors import BusyError


def test_more_inspections_than_may_be_open_are_refused() -> None:
    inspections = Inspections(at_once=1, most=2)
    refused = pytest.raises(BusyError, match="2 models are being inspected here")
    with inspections.admitted(), inspections.admitted(), refused:
        inspections.admitted().__enter__()
    with inspections.admitted(), inspections.admitted():
        pass


async def test_of_those_that_are_open_few_have_a_child() -> None:
    inspections, running, most = Inspections(at_once=2, most=8), 0, 0

    async def inspect() -> None:
        nonlocal running, most
        async with inspections.child():
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)  # lets the others try
            running -= 1

    await asyncio.gather(*(inspect() for _ in range(8)))
    assert most == 2
