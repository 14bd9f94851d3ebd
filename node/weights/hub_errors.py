"""Errors of huggingface_hub as ours, each one line with the hub's reason."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from node.weights.hub_compat import HTTPError
from node.weights.made import MAKE_ROOM
from unicluster.errors import NotFoundError, UnavailableError, in_one_line


@contextmanager
def translated_errors(model: str) -> Iterator[None]:
    """Translates the exceptions of huggingface_hub that its block raises into ours."""
    try:
        yield
    except GatedRepoError as error:
        raise NotFoundError(
            f"{model}: gated; accept its terms on the hub and set HF_TOKEN ({_reason(error)})"
        ) from error
    except RevisionNotFoundError as error:
        raise NotFoundError(f"{model}: has no such revision on the hub") from error
    except RepositoryNotFoundError as error:
        raise NotFoundError(
            f"{model}: no such repository on the hub, or HF_TOKEN does not open it "
            f"({_reason(error)})"
        ) from error
    except HfHubHTTPError as error:
        raise NotFoundError(f"{model}: the hub says: {_reason(error)}") from error
    except HFValidationError as error:
        raise NotFoundError(f"{model}: neither a directory nor a valid repository id") from error
    except OfflineModeIsEnabled as error:
        raise UnavailableError(
            f"{model}: not in this machine's cache, and HF_HUB_OFFLINE is set"
        ) from error
    except HTTPError as error:
        raise UnavailableError(
            f"{model}: the hub can't be reached ({in_one_line(error)}); connect this machine, or "
            "copy the model here and give its directory"
        ) from error
    except OSError as error:
        reason = in_one_line(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"{error.strerror}: {MAKE_ROOM}"
        raise UnavailableError(f"{model}: {reason}") from error


def _reason(error: HfHubHTTPError) -> str:
    return error.server_message or f"status {error.response.status_code}"
