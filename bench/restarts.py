"""From the kill of `serve` to the next token, once it is started again.

python -m bench.restarts [MODEL] [--rounds N] [--prompt TOKENS]

Two agents on this machine hold half of the model each. `serve` is killed with SIGKILL and started
again at once, as a service manager does. A client asks until it has a token, or is in the middle of
an answer and comes back for the rest: with the caches that the stages still have of it, and
without (no_reuse). Prints the medians in seconds, tokens that every stage computed again, and how
many workers were other ones afterwards.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.cluster import LocalCluster, ServeProgram
from unicluster.client.answers import Delta, Status
from unicluster.client.client import Client
from unicluster.client.metrics import Recoveries
from unicluster.errors import UniclusterError

STRUCK_AT = 20  # tokens
TOKENS = 120


class Restarts:
    """Serves on one port, and kills and starts it again."""

    def __init__(self, cluster: LocalCluster, model: str, context: int) -> None:
        self._cluster = cluster
        self._serve = (model, "--context", str(context))
        self.server: ServeProgram = cluster.serve(*self._serve)
        self.server.wait_for("Ctrl-C unloads")
        self._port = self.server.address.rpartition(":")[2]

    def again(self) -> None:
        self.server.kill()
        self.server = self._cluster.serve(*self._serve, "--grpc-port", self._port)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--memory", default="12MB", help="of each agent: half of the model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=400, help="tokens of the running answer's")
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder)) as cluster:
        cluster.start_agents("ann", "bob", memory=options.memory)
        begun = time.monotonic()
        restarts = Restarts(cluster, options.model, options.context)
        first_start_s = time.monotonic() - begun
        before = {worker.pid for worker in cluster.workers()}
        print(f"{len(before)} stages; first start {first_start_s:.1f} s", flush=True)
        waits = []
        for _ in range(options.rounds):
            killed = time.monotonic()
            restarts.again()
            token_after(restarts.server)
            waits.append(time.monotonic() - killed)
        print(f"kill to token: median {statistics.median(waits):.2f} s, worst {max(waits):.2f} s")
        print("| a running answer | kill to next token | tokens replayed | in caches | same text |")
        for name, reuse in (("caches are there", True), ("computed again", False)):
            rounds = [running(restarts, options.prompt, reuse=reuse) for _ in range(options.rounds)]
            seconds = sorted(each[0] for each in rounds)
            print(
                f"| {name} | {statistics.median(seconds):.2f} "
                f"({seconds[0]:.2f} to {seconds[-1]:.2f}) "
                f"| {statistics.median(each[1].replayed_tokens for each in rounds):.0f} "
                f"| {statistics.median(each[1].cached_tokens for each in rounds):.0f} "
                f"| {sum(each[2] for each in rounds)} of {len(rounds)} |",
                flush=True,
            )
        others = {worker.pid for worker in cluster.workers()} - before
        print(f"workers loaded again: {len(others)}")


def running(restarts: Restarts, prompt: int, *, reuse: bool) -> tuple[float, Recoveries, bool]:
    """Seconds from the kill to the answer's next token, what was counted, and if it is the same."""
    server = restarts.server
    with server.client() as client:
        whole, _ = answer(client, prompt, reuse, lambda: None)
        got, seconds = answer(client, prompt, reuse, restarts.again)
    with restarts.server.client() as client:
        return seconds, client.measure().recoveries, got == whole


def answer(
    client: Client, prompt: int, reuse: bool, strike: Callable[[], None]
) -> tuple[list[int], float]:
    """The tokens of an answer, and the seconds from the strike to the next one that is new."""
    got: list[int] = []
    statuses: list[Status] = []
    struck = after = 0.0
    tokens = [7 + (31 * index) % 200 for index in range(prompt)]
    for event in client.stream(
        tokens,
        temperature=0,
        max_tokens=TOKENS,
        ignore_eos=True,
        no_reuse=not reuse,
        on_status=statuses.append,
    ):
        if not isinstance(event, Delta):
            continue
        got += event.token_ids
        if not struck and len(got) >= STRUCK_AT:
            struck = time.monotonic()
            strike()
        elif not after and any(status.state == "resumed" for status in statuses):
            after = time.monotonic()
    return got, after - struck if struck else 0.0


def token_after(server: ServeProgram) -> None:
    """Returns with the first token of an answer, however often it must be asked for."""
    while True:
        try:
            with server.client() as client:
                for event in client.stream("hello", max_tokens=4, temperature=0):
                    if isinstance(event, Delta):
                        return
        except (UniclusterError, AssertionError):
            time.sleep(0.02)


if __name__ == "__main__":
    main()
