"""Answers that run on the hosts while something happens to them."""

import contextlib
import os
from collections.abc import Iterator

from tests.fleet.fleet import UNICLUSTER, Fleet
from tests.support.deadlines import scaled

# The demo model answers it with some 190 tokens, at temperature 0 always the same.
STORY = "'Write a long story about a dragon and a knight.' --temperature 0"
# Workers look at it all the time, by an option of the agents.
FAILPOINTS = "/var/lib/unicluster/failpoints"
# How long a client comes back for its answer, and until the whole of it is here.
RESUME_SECONDS = 300
ANSWER_SECONDS = 420.0


@contextlib.contextmanager
def slowed(fleet: Fleet, milliseconds: int) -> Iterator[None]:
    """While the block runs, a head takes at least so long for a token, on the fastest machine."""
    line = f"head.compute=delay({milliseconds})"
    for host in fleet.each():
        host.run(
            f"echo '{line}' | sudo tee {FAILPOINTS}.new && sudo mv {FAILPOINTS}.new {FAILPOINTS}"
        )
    try:
        yield
    finally:
        unslow(fleet)


def unslow(fleet: Fleet) -> None:
    for host in fleet.each():
        host.try_run(f"sudo rm -f {FAILPOINTS}")


@contextlib.contextmanager
def running_answer(fleet: Fleet, host: str) -> "Iterator[RunningAnswer]":
    """An answer that runs when the block begins, and is ended with it at the latest."""
    answer = RunningAnswer(fleet, host)
    try:
        yield answer
    finally:
        answer.end()


class RunningAnswer:
    """`unicluster chat` on a host, which has printed the beginning of its answer."""

    def __init__(self, fleet: Fleet, host: str) -> None:
        self._fleet = fleet
        self._host = host
        command = f"{UNICLUSTER} chat {STORY} --resume {RESUME_SECONDS} --wait {RESUME_SECONDS}"
        self._process = fleet[host].start(command)
        assert self._process.stdout is not None
        # By the descriptor, as `communicate` reads: nothing stays in a buffer between.
        self._begun = os.read(self._process.stdout.fileno(), 20).decode()
        assert self._begun, self._process.communicate()
        fleet.say(host, f"an answer runs: {self._begun!r}")

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def whole(self) -> str:
        """The text, when all of it is here. AssertionError for an answer that ended otherwise."""
        out, err = self._process.communicate(timeout=scaled(ANSWER_SECONDS))
        assert self._process.returncode == 0, f"{self._begun}{out}: {err}"
        self._fleet.say(self._host, f"the answer ends: {out.strip()[-40:]!r}")
        return (self._begun + out).strip()

    def end(self) -> None:
        """Ends it, if it still runs."""
        if self.runs:
            self._process.kill()
            self._process.communicate()
