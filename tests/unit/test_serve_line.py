"""The command that a plan prints, read back by `serve`."""

import shlex
from typing import Any

import pytest

from coordinator.commands.serve import command
from coordinator.commands.serve_line import FILE, serve_line
from coordinator.models.question import ask
from coordinator.planning.placement import Plan
from coordinator.planning.planner import plan
from coordinator.planning.variants import ModelVariants
from coordinator.serving.engine_options import chosen_models
from tests.support.fleets import GB, a_layout, a_machine


def planned(variants: ModelVariants, **about: Any) -> Plan:
    return plan(variants, [a_machine("box", 99 * GB, 100e9, **about)])


def parsed(line: str) -> dict[str, Any]:
    program, name, *words = shlex.split(line)
    assert (program, name) == ("unicluster", "serve")
    return dict(command.make_context("serve", words).params)


@pytest.mark.parametrize("quant", [None, "q4", "q8", "none"])
def test_serve_takes_the_model_that_was_planned(quant: str | None) -> None:
    variants = ModelVariants(a_layout([GB] * 4))
    requested = ask("deepseek-r1", quant, 0, 1)

    params = parsed(serve_line("deepseek-r1", planned(variants), variants, quant=requested.quant))

    source, gguf = chosen_models(params["model"], params["quant"], params["gguf"], "auto", 0)
    assert (source.display, gguf) == (requested.display, None)
    assert (params["context"], params["users"]) == (8192, 1)


def test_all_that_was_asked_for_is_in_it() -> None:
    variants = ModelVariants(a_layout([GB] * 4, users=3))
    best = plan(variants, [a_machine("a", 99 * GB, 100e9)], "throughput")
    line = serve_line(
        "/models/my llama", best, variants, kv_bits=8, gguf="x.gguf", engine="mlx", nodes="a,b"
    )

    params = parsed(line)
    wanted = {
        "model": "/models/my llama",
        "users": 3,
        "gguf": "x.gguf",
        "engine": "mlx",
        "nodes": "a,b",
        "objective": "throughput",
    }
    assert {name: params[name] for name in wanted} == wanted
    assert int(params["kv_bits"]) == 8


def test_a_gguf_that_was_assumed_has_to_be_named() -> None:
    layout = a_layout([GB] * 4, quant="q4")
    gguf = a_layout([GB] * 4, quant="q4")
    variants = ModelVariants(layout, gguf.__class__(**{**vars(gguf), "engine": "ggml"}), True)

    slow = planned(variants, backend="cpu", ggml_backend="cpu")
    assert slow.engines == ("ggml",)
    assert parsed(serve_line("m", slow, variants))["gguf"] == FILE
    fast = planned(variants, backend="metal")
    assert fast.engines == ("mlx",)
    assert parsed(serve_line("m", fast, variants))["gguf"] is None


def test_a_configuration_alone_cannot_be_served() -> None:
    variants = ModelVariants(a_layout([GB] * 4))
    assert serve_line("~/config.json", planned(variants), variants) == ""
