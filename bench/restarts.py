"""From the kill of `serve` to the next token, once it is started again.

python -m bench.restarts [MODEL] [--rounds N]

Two agents on this machine hold half of the model each. `serve` is killed with SIGKILL and started
again at once, as a service manager does; a client asks until it has a token. Prints the medians in
seconds, and how many workers were other ones afterwards.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from tests.support.cluster import LocalCluster, ServeProgram
from unicluster.client.answers import Delta
from unicluster.errors import UniclusterError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--memory", default="12MB", help="of each agent: half of the model")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder)) as cluster:
        cluster.start_agents("ann", "bob", memory=options.memory)
        server = cluster.serve(options.model, "--context", "512")
        begun = time.monotonic()
        server.wait_for("Ctrl-C unloads")
        first_start_s = time.monotonic() - begun
        port = server.address.rpartition(":")[2]
        before = {worker.pid for worker in cluster.workers()}
        waits, others = [], 0
        for _ in range(options.rounds):
            server.kill()
            killed = time.monotonic()
            server = cluster.serve(options.model, "--context", "512", "--grpc-port", port)
            token_after(server)
            waits.append(time.monotonic() - killed)
            after = {worker.pid for worker in cluster.workers()}
            others += len(after - before)
            before = after
        print(f"{len(before)} stages; first start {first_start_s:.1f} s")
        print(f"kill to token: median {statistics.median(waits):.2f} s, worst {max(waits):.2f} s")
        print(f"workers loaded again: {others}")


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
