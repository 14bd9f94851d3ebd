"""From a fault to the next token of a running answer, with the parts of that time.

`python -m bench.recovery`: agents here, one more than the model needs, `serve` and a client with
default settings. A worker in the ring is killed, or a machine vanishes: its agent and worker are
stopped in mid-answer, so that nothing of them is heard any more, and go on afterwards. It counts
the answers that are the same as without a fault: caches are computed in chunks afterwards, and a
quantized model may settle a near tie otherwise then. Figures are medians of `--rounds`.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

from tests.support.cluster import AgentProgram, LocalCluster, ServeProgram, until
from tests.support.real_model import MISSING, gguf_file
from unicluster.client.answers import Delta, Status
from unicluster.client.client import Client
from unicluster.client.metrics import Recoveries

PROMPT = "Tell me a story about a dog."
STRUCK_AT = 40  # tokens
PARTS = ("detect_s", "plan_s", "load_s", "replay_s")


@dataclass(frozen=True)
class Setting:
    """A model, as `serve` takes it, and the memory of agents of which `stages` hold it."""

    model: str
    memory: str
    context: int
    stages: int


@dataclass(frozen=True)
class Round:
    """Seconds from the fault to the next token, and what the server counted meanwhile."""

    seconds: float
    counted: Recoveries
    same: bool  # the text, as without a fault


def settings(name: str) -> Setting:
    if name == "demo":
        return Setting("demo", "7400000", 1024, 3)
    if (file := gguf_file()) is None:
        sys.exit(MISSING)
    return Setting(str(file), "140MB", 1024, 2)


def answer(client: Client, tokens: int, strike: Callable[[], None]) -> tuple[list[int], float]:
    """The tokens of an answer, and the seconds from the strike to the next one after the gap."""
    statuses: list[Status] = []
    got: list[int] = []
    struck = after = 0.0
    options = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "no_reuse": True}
    for event in client.stream(PROMPT, on_status=statuses.append, **options):  # type: ignore[arg-type]
        if not isinstance(event, Delta):
            continue
        got += event.token_ids
        if not struck and len(got) >= STRUCK_AT:
            struck = time.monotonic()
            strike()
        elif statuses and not after:
            after = time.monotonic()
    return got, after - struck if after else 0.0


def suspended(agent: AgentProgram) -> list[psutil.Process]:
    """The machine's processes, which do nothing more until they are resumed."""
    processes = [psutil.Process(agent.pid), agent.worker]
    for process in processes:
        process.suspend()
    return processes


def has_spares(cluster: LocalCluster) -> bool:
    """Whether all agents that are to have a spare worker have one, with its libraries imported.

    It waits then, and uses no core.
    """
    spares = [a.spare_workers for a in cluster.agents.values() if a.spare]
    return all(spares) and all(
        worker.status() == psutil.STATUS_SLEEPING and worker.cpu_percent(0.2) < 5
        for workers in spares
        for worker in workers
    )


def struck(cluster: LocalCluster, server: ServeProgram, kind: str, tokens: int) -> Round:
    """One round; raises SystemExit where the answer does not go on to its last token."""
    until(lambda: server.describe().state == "ready", "the model is served")
    until(lambda: has_spares(cluster), "spare workers wait")
    *_, last = (cluster.agents[stage.node] for stage in server.describe().stages)
    asleep: list[psutil.Process] = []

    def strike() -> None:
        if kind == "worker":
            last.worker.kill()
        else:
            asleep.extend(suspended(last))

    with server.client() as client:
        undisturbed, _ = answer(client, tokens, lambda: None)
        before = client.measure().recoveries
        try:
            got, seconds = answer(client, tokens, strike)
        finally:
            for process in asleep:
                process.resume()
        counted = client.measure().recoveries
    if len(got) != len(undisturbed) or not seconds:
        sys.exit(f"{kind}: the answer did not break off, or did not go on")
    since = {
        name: getattr(counted, name) - getattr(before, name)
        for name in (*PARTS, "replayed_tokens", "resumed", "failed")
    }
    return Round(seconds, Recoveries(**since), got == undisturbed)


def row(kind: str, rounds: Sequence[Round]) -> str:
    seconds = sorted(each.seconds for each in rounds)
    parts = [median(getattr(each.counted, part) for each in rounds) for part in PARTS]
    replayed = median(each.counted.replayed_tokens for each in rounds)
    figures = " | ".join(f"{part:.2f}" for part in parts)
    return (
        f"| {kind} | {median(seconds):.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f}) "
        f"| {figures} | {replayed:.0f} | {sum(each.same for each in rounds)} of {len(rounds)} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("demo", "smollm2"), default="demo")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-spare", dest="spare", action="store_false", help="as of join")
    parser.add_argument("--tokens", type=int, default=300)
    options = parser.parse_args()
    setting = settings(options.model)
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder)) as cluster:
        names = [f"m{index}" for index in range(setting.stages + 1)]
        cluster.start_agents(*names, memory=setting.memory, spare=options.spare)
        with cluster.serve(setting.model, "--context", str(setting.context)) as server:
            print(f"{options.model}, {len(server.describe().stages)} stages, seconds")
            print("| fault | to the next token | detect | plan | load | replay | replayed | same |")
            for kind in ("worker", "host"):
                rounds = [
                    struck(cluster, server, kind, options.tokens) for _ in range(options.rounds)
                ]
                print(row(kind, rounds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
