"""A stage of a served model is stuck, and answers pings: what clients see, and what comes after.

Slow: workers are started anew, once as after any loss, and once because nothing came for too long.
"""

import asyncio
import re
import time
from pathlib import Path

import pytest

from tests.support.cluster import LocalCluster, endless_model
from tests.support.deadlines import scaled
from tests.support.strikes import CONTEXT, assert_answers_again, hear_out
from unicluster import failpoints
from unicluster.deadlines import VARIABLE
from unicluster.errors import StageError, UnavailableError

MEMORY = 9_000_000
FLOOR = 2.0
NOTICED = 15.0
SERVE = ("--context", str(CONTEXT), "--users", "2", "--recover", "0")


@pytest.mark.parametrize(
    "fault",
    [
        "stage.compute=hang@300",
        pytest.param("head.compute=hang@300", marks=pytest.mark.sweep),
        pytest.param("stage.compute=freeze@300", marks=pytest.mark.sweep),
        pytest.param("head.compute=freeze@300", marks=pytest.mark.sweep),
    ],
)
async def test_a_stuck_stage_is_named_and_started_anew(tmp_path: Path, fault: str) -> None:
    """Each machine hangs at its 300th step; who is the head or a stage is left to the plan."""
    model = endless_model(tmp_path / "llama")
    env = {VARIABLE: str(scaled(FLOOR)), failpoints.VARIABLE: fault}
    with LocalCluster(tmp_path / "cluster", **env) as cluster:
        cluster.start_agents("ann", "bob", memory=MEMORY)
        with cluster.serve(model, *SERVE) as server:
            async with server.async_client() as client:
                began = time.monotonic()
                answers = [hear_out(client, asyncio.Event()) for _ in range(2)]
                errors = await asyncio.gather(*answers, return_exceptions=True)
                print(f"{time.monotonic() - began:.1f} s: {errors}")

            for error in errors:
                assert isinstance(error, StageError | UnavailableError)
                assert re.search(
                    r"machine (ann|bob) \(layers \d+ to \d+\) "
                    r"has (computed nothing|answered no call) for \d+ s",
                    str(error),
                )
            assert time.monotonic() - began < scaled(NOTICED)
            await assert_answers_again(server)
