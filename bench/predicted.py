"""Predicted against measured: a fleet of unlike machines, before and after one run.

    python -m bench.predicted [--rounds N] [--answers N] [--size 10M|125M]

Three agents on this machine, each with less memory than the model needs. Fast ones have a core of
their own, slow ones share another with a program that never rests. In each round they have
learnt nothing: a first run serves, answers, and ends; what `unicluster plan` then predicts is
compared with a second run, and with a third in which the same machines offer other amounts of
memory and so hold other layers. Linux, two cores or more.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.models import llama_config
from tests.support.cluster import LocalCluster, endless_model, until

TOKENS = 64
CONTEXT = 256
FAST, SLOW = 0, 1


@dataclass(frozen=True)
class Node:
    """A machine to be: the core it has, and the share of the model's bytes that it offers."""

    name: str
    core: int
    share: float


FLEET = (Node("ann", FAST, 0.65), Node("bob", SLOW, 0.45), Node("cid", SLOW, 0.45))
CHANGED = (Node("ann", FAST, 0.45), Node("bob", SLOW, 0.75), Node("cid", SLOW, 0.35))
RUNS = {"nothing known": FLEET, "after one run": FLEET, "other memory": CHANGED}


@dataclass(frozen=True)
class Run:
    """Seconds a token, as planned just before and as it was; layers by machine."""

    predicted: float
    measured: float
    layers: dict[str, int]

    def __str__(self) -> str:
        error = (self.predicted / self.measured - 1) * 100
        held = ", ".join(f"{name} {count}" for name, count in self.layers.items())
        return (
            f"predicted {self.predicted * 1e3:6.1f} ms a token, "
            f"measured {self.measured * 1e3:6.1f}: {error:+5.1f} %   ({held})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=5, help="of which the median counts")
    parser.add_argument("--size", choices=("10M", "125M"), default="10M")
    options = parser.parse_args()
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}", flush=True)
    errors: dict[str, list[float]] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is then ended too
    with tempfile.TemporaryDirectory() as folder, busy(SLOW):
        model = endless_model(Path(folder) / "model", **llama_config(options.size))
        for number in range(options.rounds):
            home = Path(folder) / f"home-{number}"
            for name, fleet in RUNS.items():
                row = run(fleet, model, home, options.answers)
                print(f"{name:14} {row}", flush=True)
                errors.setdefault(name, []).append(abs(row.predicted / row.measured - 1))
    for name, found in errors.items():
        print(f"{name:14} error, median of {len(found)}: {median(found) * 100:.1f} %")


def run(fleet: tuple[Node, ...], model: Path, home: Path, answers: int) -> Run:
    """Plans, serves, and times answers, with what earlier runs left in `home`."""
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    folder = Path(tempfile.mkdtemp(dir=home.parent))
    asked = (str(model), "--context", str(CONTEXT))
    with LocalCluster(folder, home=home) as cluster:
        for node in fleet:
            memory = int(size * node.share)
            cluster.start_agent(node.name, memory=memory, prefix=("taskset", "-c", str(node.core)))
        cluster.wait_for_agents()
        done = cluster.run("plan", *asked, "--json")
        if done.code:
            sys.exit(done.err or done.out)
        plan = json.loads(done.out)
        kept = home / "measured.json"
        before = kept.read_text() if kept.exists() else ""
        with cluster.serve(*asked) as server, server.client() as client:
            client.chat("hello", max_tokens=TOKENS, temperature=0)  # to warm up
            speeds = [
                client.chat("hello", max_tokens=TOKENS, temperature=0).timings.tokens_per_s
                for _ in range(answers)
            ]
            until(lambda: kept.exists() and kept.read_text() != before, "it is kept")
    return Run(
        1 / plan["predicted"]["tokens_per_s_single"],
        1 / median(speeds),
        {s["node"]: s["layers"][1] - s["layers"][0] for s in plan["stages"]},
    )


@contextlib.contextmanager
def busy(core: int) -> Iterator[None]:
    """A program that never rests, on one core."""
    command = ("taskset", "-c", str(core), sys.executable, "-c", "while True: pass")
    with subprocess.Popen(command) as program:
        try:
            yield
        finally:
            program.kill()


if __name__ == "__main__":
    main()
