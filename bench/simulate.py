"""Where throughput saturates: the scheduler in simulated time over planned clusters.

    python -m bench.simulate             writes docs/simulated.md
    python -m bench.simulate --measure   first compares with real stages on this machine

The costs of stages and links are the planner's. The comparison is with two and three stages of a
10 M model: what a stage takes, alone and undisturbed, is measured and put into the simulation,
which must then foretell what several users and pipelined prompts get.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import simulation
from bench.simulation import Cluster, StageCost
from coordinator.fleet import fleet
from coordinator.models.inspect_child import layouts
from coordinator.models.question import ask
from coordinator.planning import links
from coordinator.planning.links import Network
from coordinator.planning.placement import Layout, Plan, Stage, decode_seconds, prefill_seconds
from coordinator.planning.planner import plan
from node.generation.config import chunk_tokens
from node.worker.__main__ import SWITCH_INTERVAL

DOCS = Path(__file__).parent.parent / "docs"
MEASURED = DOCS / "simulated.json"

MODEL, QUANT, CONTEXT = "deepseek-r1", "q4", 8192
MACHINE = "framework-desktop-128"
STAGES = (4, 8, 16)
LINKS = {"1 GbE": "1gbe", "2.5 GbE": "2.5gbe", "10 GbE": "10gbe", "Thunderbolt 5": "tb5"}
USERS = (1, 2, 4, 8, 16, 32, 64)
TOKENS = 96
PROMPT = 4096
# Of the most that any number of users gets: from there on it is called saturated.
NEARLY = 0.9


@dataclass(frozen=True)
class Planned:
    """A plan and what the simulation needs to know of it."""

    layout: Layout
    plan: Plan
    network: Network

    def cluster(self, users: int) -> Cluster:
        stages = self.plan.stages
        return Cluster(
            costs=[_cost(self.layout, stage) for stage in stages],
            links=[
                self.network.between(one.machine.name, other.machine.name)
                for one, other in zip(stages, [*stages[1:], stages[0]], strict=True)
            ],
            hidden_bytes=self.layout.hidden_bytes,
            users=users,
            prefill_step=chunk_tokens(self.layout.hidden_bytes),
        )


def _cost(layout: Layout, stage: Stage) -> StageCost:
    machine = stage.machine
    tail = decode_seconds(layout, machine, layout.head_read_bytes, 0) if stage.head else 0.0

    def decode(answers: int) -> float:
        return stage.seconds_per_token - tail + (answers - 1) * stage.batch_seconds

    def prefill(tokens: int) -> float:
        seconds = prefill_seconds(layout, machine, stage.first, stage.end, tokens)
        assert seconds is not None  # the machines here state what they compute
        return seconds + links.TCP_S  # a chunk of nothing still is one

    return StageCost(decode, prefill, lambda answers: tail)


def planned(stages: Sequence[int] = STAGES, kinds: Sequence[str] = tuple(LINKS)) -> Iterator[Any]:
    """(stages, kind of link, plan) for each."""
    inspected = layouts([ask(MODEL, QUANT, CONTEXT, max(USERS)).request])[0]
    layout = Layout.from_proto(inspected)
    for count in stages:
        for kind in kinds:
            machines = fleet.with_links(fleet.parse(f"{count}x {MACHINE}"), [LINKS[kind]])
            # At the speed of the GPU, which only ggml reaches so far.
            fast = [
                replace(machine, engines={layout.engine: machine.engines["ggml"]})
                for machine in machines.machines
            ]
            placed = plan(layout, fast, "throughput", network=machines.network)
            yield count, kind, Planned(layout, placed, machines.network)


def decode_row(count: int, kind: str, planned: Planned) -> str:
    """Tokens a second of so many users, and how many are nearly enough."""
    speeds = [simulation.speed(planned.cluster(users), users, TOKENS) for users in USERS]
    enough = next(
        users for users, speed in zip(USERS, speeds, strict=True) if speed >= NEARLY * max(speeds)
    )
    cells = [f"{speed:.1f}" for speed in speeds]
    return f"| {count} | {kind} | {' | '.join(cells)} | {enough} |"


def prefill_row(count: int, kind: str, planned: Planned) -> str:
    """TTFT in seconds and tokens a second, after prompts that calibrate the chunk size."""
    cluster = planned.cluster(1)
    for _ in range(8):
        seconds = simulation.first_token(cluster, PROMPT)
    limit = planned.plan.prefill_tokens_per_s or 0
    return f"| {count} | {kind} | {seconds:.2f} | {PROMPT / seconds:.0f} | {limit:.0f} |"


def page() -> str:
    """docs/simulated.md."""
    every = list(planned())
    users = [f"{count} user{'s' * (count > 1)}" for count in USERS]
    lines = [
        "# Many machines, many users, simulated",
        "",
        "Written by `python -m bench.simulate`. The head's scheduling (node/generation: scheduler,",
        "lanes, chunk sizes, mlx-lm's batches) runs in simulated time over stages that take the",
        f"planner's seconds: {MODEL} {QUANT} with a context of {CONTEXT} for {max(USERS)} users,",
        f"over {MACHINE} machines, as `unicluster plan --objective throughput` cuts it,",
        "a lane a stage. What the planner does not know, this does not either: it takes each user",
        "of a lane to read experts of their own, and attention in prefill to take no time.",
        "",
        "## Tokens a second, all users together",
        "",
        f"*Saturated*: the fewest users that get {NEARLY:.0%} of the most.",
        "",
        f"| stages | link | {' | '.join(users)} | saturated |",
        f"|---:|---|{'---:|' * (len(USERS) + 1)}",
        *(decode_row(*each) for each in every),
        "",
        f"## A prompt of {PROMPT} tokens, alone",
        "",
        "*At most*: the planner's bound, were all stages busy all the time with chunks as large as",
        "a frame may be.",
        "",
        "| stages | link | s to the first token | tokens/s | at most |",
        "|---:|---|---:|---:|---:|",
        *(prefill_row(*each) for each in every),
        "",
        "## Checked against real stages",
        "",
        *_comparison(json.loads(MEASURED.read_text("utf-8"))),
    ]
    return "\n".join(lines) + "\n"


def _comparison(data: dict[str, Any]) -> Iterator[str]:
    yield f"`python -m bench.simulate --measure` on {data['cores']} cores that all stages share,"
    yield f"load {data['load']:.1f} at the end: a 10 M llama, float32, mTLS. Each row's costs were"
    yield f"measured in the same {data['rounds']} rounds as what they predict; medians."
    if data["load"] > 2 * data["cores"]:
        yield "**The machine had far more other work than cores meanwhile: this says little yet.**"
    yield ""
    yield "| stages | | measured | simulated | off by |"
    yield "|---:|---|---:|---:|---:|"
    for row in data["rows"]:
        measured, simulated = row["measured"], row["simulated"]
        off = f"{simulated / measured - 1:+.0%}"
        yield f"| {row['stages']} | {row['what']} | {measured:.3g} | {simulated:.3g} | {off} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="compare with this machine first")
    parser.add_argument("--rounds", type=int, default=3, help="of --measure")
    options = parser.parse_args()
    if options.measure:
        from bench.compared import compared  # it starts workers

        sys.setswitchinterval(SWITCH_INTERVAL)
        data = asyncio.run(compared(options.rounds))
        MEASURED.write_text(json.dumps(data, indent=1) + "\n")
        print("\n".join(_comparison(data)))
    (DOCS / "simulated.md").write_text(page(), "utf-8")
    sys.stdout.flush()
    os._exit(0)  # MLX aborts a process that ends while another thread has streams


if __name__ == "__main__":
    main()
