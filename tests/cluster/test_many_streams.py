"""Sixty-four clients that stream at once: each gets its answers, and nothing stays behind.

Slow: they ask for fifteen seconds. With memory, and for two minutes: bench/streams.py.
"""

import asyncio
from pathlib import Path

import pytest

from tests.support.cluster import LocalCluster, until
from tests.support.deadlines import scaled
from tests.support.many_streams import DOORS, stream_from_many

CLIENTS = 64


@pytest.mark.sweep
def test_sixty_four_streams_at_once_all_end(tmp_path: Path) -> None:
    with LocalCluster(tmp_path) as cluster:
        cluster.start_agents("ann", "bob")
        settings = ("--context", "192", "--users", str(CLIENTS))
        with cluster.serve("demo", *settings) as server:
            streams = asyncio.run(
                stream_from_many(server.http, CLIENTS, seconds=15, stalled_s=scaled(90))
            )
            with server.client() as client:
                until(lambda: not client.describe().live_caches, "the caches of all are freed")

    assert streams.wrong == []
    assert streams.ended.total() >= CLIENTS
    assert set(streams.ended) == {door.path for door in DOORS}
