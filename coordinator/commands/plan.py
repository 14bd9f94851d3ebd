"""`unicluster plan MODEL`: does it fit, where does each layer go, and how fast will it be."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import click
from rich.text import Text

from coordinator.commands.compare import compare
from coordinator.commands.serve_line import serve_line
from coordinator.fleet import fleet
from coordinator.fleet.fleet import Fleet
from coordinator.fleet.measured import Measurements
from coordinator.fleet.members import Members
from coordinator.models import inspect_child
from coordinator.models.catalog import QUANTS, model_names
from coordinator.models.question import RequestedModel, alternatives, ask, variants_of, with_gguf
from coordinator.planning.filling import DRAFT_RATE, LOOKUP_RATE, fills_pipe
from coordinator.planning.placement import Layout, Objective, Plan
from coordinator.planning.planner import plan
from coordinator.planning.rivals import rivals
from coordinator.planning.shortfall import Alternatives, NoPlanError, scaled
from coordinator.planning.variants import ModelVariants
from coordinator.serving.engine_options import check_gguf, engine_options
from coordinator.serving.generation_options import AUTO, LOOKUP, OFF, kv_bits_option, speculations
from coordinator.serving.inspected import with_draft
from coordinator.serving.options import objective_option
from coordinator.terminal.plan import fleet_table, plan_table, rivals_table
from unicluster.cluster.known_machines import nodes_option, peer_option
from unicluster.command_line import Argument, Command, Option
from unicluster.errors import InputError
from unicluster.terminal.console import Console
from unicluster.terminal.waiting import doing
from unicluster.trust.identity import default_name
from unicluster.trust.store import Store
from unicluster.v1.node_pb2 import InspectRequest, ModelLayout


@dataclass(frozen=True)
class Question:
    """A requested model, its sizes, and the machines to plan it for."""

    requested: RequestedModel
    variants: ModelVariants
    fleet: Fleet
    alternatives: Alternatives


@dataclass(frozen=True)
class PlanOptions:
    """The command line of `unicluster plan`."""

    model: str | None
    quant: str | None
    context: int
    users: int
    kv_bits: int | None
    speculate: str | None
    gguf: str | None
    engine: str
    objective: Objective
    fleet: str | None
    link: tuple[str, ...]
    memory: tuple[str, ...]
    nodes: str | None
    peer: tuple[str, ...]
    json: bool
    compare: bool


def run(**options: Any) -> int:
    args = PlanOptions(**options)
    if args.compare:
        return compare(args.peer, Console())
    if args.model is None:
        raise InputError("no model named: `unicluster models` lists those known")
    if args.context < 0 or args.context == 1:
        raise InputError(f"--context {args.context}: at least 2 tokens")
    if args.users < 1:
        raise InputError(f"--users {args.users}: at least 1")
    requested = _requested(args, args.model)
    if args.fleet is not None:
        stated = fleet.parse(args.fleet)
        requested = replace(requested, hypothetical_gguf=requested.gguf is None)
        with doing(f"Inspecting {requested.display}"):
            variants = variants_of(requested, _inspect_here(requested.requests))
        question = Question(requested, variants, stated, alternatives(requested, _inspect_here))
    else:
        question = asyncio.run(_question_to_cluster(requested, args.peer))
    machines = fleet.with_memory(fleet.with_links(question.fleet, args.link), args.memory)
    question = replace(question, fleet=machines)
    if args.speculate not in (None, OFF, AUTO, LOOKUP):
        question = _with_draft(question, args.speculate)
    nodes = [name.strip() for name in args.nodes.split(",")] if args.nodes is not None else None
    try:
        with doing("Planning"):
            best = plan(
                question.variants,
                machines.machines,
                args.objective,
                model=requested.display,
                nodes=nodes,
                network=machines.network,
                alternatives=question.alternatives,
            )
    except NoPlanError as error:
        if not args.json:
            raise
        print(json.dumps(refused(question, args.objective, error), indent=1))
        return error.exit_code
    if args.speculate in (AUTO, LOOKUP) and fills_pipe(
        best, question.variants, auto=args.speculate == AUTO
    ):
        best = replace(best, guess_rate=LOOKUP_RATE)
    if args.json:
        print(json.dumps(planned(question, best), indent=1))
        return 0
    line = serve_line(
        args.model,
        best,
        question.variants,
        quant=requested.quant,
        kv_bits=args.kv_bits or 0,
        speculate=args.speculate or "",
        gguf=args.gguf,
        engine=args.engine,
        nodes=args.nodes if args.fleet is None else None,
    )
    _show(question, best, nodes, line)
    return 0


def _with_draft(question: Question, name: str) -> Question:
    """The question with a smaller model on the head, whose guesses fill the pipe."""
    layout = question.variants.layout
    with doing(f"Inspecting {name}"):
        (draft,) = _inspect_here(ask(name, None, layout.context, layout.users).requests)
    add = partial(with_draft, draft=Layout.from_proto(draft), rate=DRAFT_RATE)
    return replace(question, variants=question.variants.map(add))


def _requested(args: PlanOptions, model: str) -> RequestedModel:
    kv_bits = args.kv_bits or 0
    requested = ask(model, args.quant, args.context, args.users, kv_bits)
    if args.gguf is not None:
        check_gguf(args.engine, kv_bits)
        requested = with_gguf(requested, args.gguf)
    return replace(requested, engine=args.engine)


def planned(question: Question, best: Plan) -> dict[str, Any]:
    """A plan for programs. Bytes, tokens per second, and milliseconds."""
    stages = [
        {
            "node": stage.machine.name,
            "layers": [stage.first, stage.end],
            "weight_bytes": stage.weight_bytes,
            "kv_bytes": stage.kv_bytes,
            "reserve_bytes": stage.reserve_bytes,
            "usable_bytes": stage.machine.reach(stage.engine),
            "head": stage.head,
            "engine": stage.engine,
            "ms_per_token": stage.seconds_per_token * 1e3,
        }
        for stage in best.stages
    ]
    predicted: dict[str, Any] = {
        "tokens_per_s_single": best.tokens_per_s_single,
        "tokens_per_s_throughput": best.tokens_per_s_aggregate,
        "prefill_tokens_per_s": best.prefill_tokens_per_s,
    }
    if best.guess_rate:
        predicted["guessing"] = {
            "gain": best.guessing_gain,
            "frames": best.guessing_frames,
            "assumed_rate": best.guess_rate,
        }
    return _facts(question, best.objective, stages, predicted, 0, ())


def refused(question: Question, objective: Objective, error: NoPlanError) -> dict[str, Any]:
    """The facts of a model that does not fit, in the shape of `planned`."""
    speeds = ("tokens_per_s_single", "tokens_per_s_throughput", "prefill_tokens_per_s")
    nothing = dict.fromkeys(speeds)
    return _facts(question, objective, [], nothing, error.missing, error.suggestions)


def _facts(
    question: Question,
    objective: Objective,
    stages: list[dict[str, Any]],
    predicted: dict[str, Any],
    shortfall: int,
    suggestions: Sequence[str],
) -> dict[str, Any]:
    layout = question.variants.layout
    return {
        "model": question.requested.display.split(" ")[0],
        "quant": question.requested.quant or layout.quant,
        "context": layout.context,
        "users": layout.users,
        "objective": objective,
        "fits": bool(stages),
        "stages": stages,
        "total_weight_bytes": layout.weight_bytes,
        "layer_bytes": list(layout.layer_bytes),
        "embed_bytes": layout.embed_bytes,
        "head_bytes": layout.head_bytes - layout.embed_bytes,
        "kv_bytes_per_layer": list(layout.kv_bytes_per_layer),
        "predicted": predicted,
        "shortfall_bytes": shortfall,
        "suggestions": list(suggestions),
    }


def _show(question: Question, best: Plan, nodes: list[str] | None, serve: str) -> None:
    console, machines = Console(), question.fleet.machines
    allowed = [m for m in machines if nodes is None or m.name in nodes]
    console.print(plan_table(best, question.variants, question.requested.display))
    if serve:
        console.print(Text("serve it    ", "dim").append(serve, "not dim"), soft_wrap=True)
    with doing("Planning without this and that machine"):
        others = rivals(question.variants, allowed, best, question.fleet.network)
    if others:
        console.print()
        console.print(rivals_table(others))
    console.print()
    console.print(fleet_table(machines))


def _inspect_here(requests: Sequence[InspectRequest]) -> Sequence[ModelLayout]:
    if not inspect_child.possible_here():
        raise InputError(
            "a model's sizes come from its mlx-lm class, and there is no MLX here: "
            "pip install 'unicluster[cpu]', or plan without --fleet where a machine has it"
        )
    return inspect_child.layouts(requests)


async def _question_to_cluster(requested: RequestedModel, peers: Sequence[str]) -> Question:
    """The machines that are there, with what was measured on them."""
    cluster = Store().require()
    async with Members(cluster, cluster.issue(default_name()), peers) as members:
        with doing("Looking for machines"):
            await members.find()
            machines = await members.machines()
        options: Alternatives
        if (
            requested.request.config_json
            and requested.gguf is None
            and inspect_child.possible_here()
        ):
            variants = variants_of(requested, _inspect_here(requested.requests))
            options = alternatives(requested, _inspect_here)
        else:
            with doing(f"Inspecting {requested.display}"):
                answers = [await members.inspect(requested.request)]
                if requested.gguf is not None:
                    requested.gguf.context = answers[0].context
                    answers.append(await members.inspect(requested.gguf))
            variants = variants_of(requested, answers)
            options = scaled(quants=bool(requested.quant) or not variants.layout.quantized)
    known = Measurements.load().fleet(machines, requested.display, variants)
    return Question(requested, variants, known, options)


command = Command(
    run,
    arguments=[
        Argument(
            "model",
            "a known name (`unicluster models`), a config.json, a directory, owner/name, or demo",
            required=False,
            complete=model_names,
        )
    ],
    sections={
        "Model": [
            Option(
                "--quant",
                "quantize (default: q4 of a known name)",
                type=click.Choice(QUANTS),
            ),
            Option(
                "--context",
                "of each user (default: 8192)",
                type=int,
                default=0,
                metavar="TOKENS",
            ),
            Option("--users", "answers at the same time (default: 1)", type=int, default=1),
            kv_bits_option(),
            Option(
                "--speculate",
                "predict guesses that fill the pipe, those of `serve --speculate`: by `lookup` "
                "or `auto`, or of a smaller MODEL on the head (default: none)",
                metavar="WHAT",
                complete=speculations,
            ),
            *engine_options(),
        ],
        "Machines": [
            Option(
                "--fleet",
                "hypothetical machines, such as '2x mac-studio-m3-ultra-512, dgx-spark-128', or "
                "a YAML file (default: the machines of the cluster)",
                metavar="LIST|FILE",
                complete=fleet.fleet_names,
            ),
            Option(
                "--link",
                "1gbe, 2.5gbe, 5gbe, 10gbe, tb4 or tb5, between all machines or those two",
                multiple=True,
                metavar="[A:B=]KIND",
                complete=fleet.link_names,
            ),
            Option(
                "--memory",
                "usable memory of each machine, or of that one",
                multiple=True,
                metavar="[NAME=]SIZE",
            ),
            nodes_option("only these machines (default: all)"),
            peer_option("an agent that multicast does not reach"),
        ],
        "The plan": [
            objective_option(),
            Option("--json", "for programs", is_flag=True),
            Option("--compare", "predicted against measured, of the model served", is_flag=True),
        ],
    },
    examples=[
        "unicluster plan deepseek-r1 --quant q4",
        "unicluster plan deepseek-r1 --fleet '2x mac-studio-m3-ultra-512' --link tb5",
        "unicluster plan --compare",
    ],
)
