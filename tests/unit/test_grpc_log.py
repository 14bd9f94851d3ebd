"""Lines of gRPC's own log that say nothing to whoever reads ours."""

import logging

import pytest

import unicluster.cluster.channels  # noqa: F401  it filters them

LOG = logging.getLogger("grpc._cython.cygrpc")


def test_streams_that_a_server_closes_when_it_is_stopped_are_no_news(
    caplog: pytest.LogCaptureFixture,
) -> None:
    LOG.warning("Aborting method [%s] due to server stop.", "/unicluster.v1.Stage/Hop")
    LOG.warning("Something else happened")
    assert [record.getMessage() for record in caplog.records] == ["Something else happened"]
