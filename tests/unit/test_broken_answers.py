"""What becomes of an answer that its head has ended, by the status with which it did."""

from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from coordinator.serving.gateway import _BrokenOffError, _meaning
from unicluster.cluster.channels import OUR_OWN
from unicluster.errors import AnswerError, BusyError, InputError, StageError, UnavailableError

DEPLOYMENT: Any = SimpleNamespace(head_name="ann", ending="the ring of ann broke")


def ended(code: grpc.StatusCode, details: str = "it says why") -> Exception:
    marks = grpc.aio.Metadata(*OUR_OWN)
    return _meaning(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), marks, details), DEPLOYMENT)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.CANCELLED, UnavailableError),
        (grpc.StatusCode.INTERNAL, StageError),
        (grpc.StatusCode.UNKNOWN, StageError),
    ],
)
def test_it_goes_on_elsewhere(code: grpc.StatusCode, kind: type[Exception]) -> None:
    meaning = ended(code)

    assert isinstance(meaning, _BrokenOffError)
    assert type(meaning.reason) is kind


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InputError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, BusyError),
        (grpc.StatusCode.ABORTED, AnswerError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, UnavailableError),
    ],
)
def test_it_ends(code: grpc.StatusCode, kind: type[Exception]) -> None:
    assert type(ended(code)) is kind


def test_an_error_that_nobody_foresaw_names_the_head() -> None:
    meaning: Any = ended(grpc.StatusCode.UNKNOWN, "Unexpected <class 'KeyError'>: 'x'")

    assert str(meaning) == "machine ann (head) failed: Unexpected <class 'KeyError'>: 'x'"
