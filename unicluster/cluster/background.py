"""Background work that goes on whatever one round of it comes to."""

import contextlib
import logging
from collections.abc import Iterator

from unicluster.errors import in_one_line

log = logging.getLogger(__name__)


@contextlib.contextmanager
def going_on(work: str) -> Iterator[None]:
    """Logs what one round of periodic `work` raises, so that the next round is still made.

    The pause between rounds belongs outside, or a lasting error would keep a core busy.
    """
    try:
        yield
    except Exception as error:
        log.warning("%s: %s; going on", work, in_one_line(error))
        log.debug("%s", work, exc_info=True)
