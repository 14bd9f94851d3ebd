"""The generated pages of docs/, most of them from plans: `python -m bench.pages [PAGE ...]`.

Each page says by which command it is made. Figures of others are in docs/published.json.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.gguf_page import gguf_architectures
from coordinator.fleet import fleet
from coordinator.models.catalog import Entry, entries
from coordinator.models.inspect_child import layouts
from coordinator.models.question import ask
from coordinator.models.sizes import stored
from coordinator.planning.placement import Layout
from coordinator.planning.planner import plan
from coordinator.planning.shortfall import NoPlanError
from coordinator.planning.variants import ModelVariants
from unicluster.units import format_bytes

DOCS = Path(__file__).parent.parent / "docs"

FLEETS = {
    "RTX 4090": "rtx-4090-24",
    "Strix Halo 128": "framework-desktop-128",
    "M4 Max 128": "mac-studio-m4-max-128",
    "M3 Ultra 192": "mac-studio-m3-ultra-192",
    "M3 Ultra 256": "mac-studio-m3-ultra-256",
    "M3 Ultra 512": "mac-studio-m3-ultra-512",
    "2x M3 Ultra 512": "2x mac-studio-m3-ultra-512",
    "4x M3 Ultra 512": "4x mac-studio-m3-ultra-512",
    "4x Framework Desktop": "4x framework-desktop-128",
}
QUANTS = ("q8", "q4", "q2")


def published() -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((DOCS / "published.json").read_text("utf-8"))
    return figures


def memory() -> str:
    """docs/memory.md: sizes beside those that others state."""
    figures = published()
    lines = [
        "# What models weigh",
        "",
        "Written by `python -m bench.pages memory`. Our sizes are summed over the arrays of the",
        "model's own mlx-lm class, built from its config.json, cast and quantized as mlx-lm would.",
        "",
        "## Parameters",
        "",
        f"Beside {figures['parameters']['source']}.",
        "",
        "| model | ours | published | difference | because published counts |",
        "|---|---:|---:|---:|---|",
    ]
    for model, stated in figures["parameters"]["models"].items():
        ours, count = stored()[model]["parameters"], stated["count"]
        why = stated.get("besides", "")
        lines.append(f"| {model} | {ours:,} | {count:,} | {_percent(ours, count)} | {why} |")
    lines += [
        "",
        "Where nothing is said, the two are the same to within 0.001 %: the rest is buffers such",
        "as rotary frequencies, which some checkpoints store.",
        "",
        "## Memory",
        "",
        f"Beside the table of {figures['memory_gb']['source']}. Ours is weights, then all that one",
        "machine must offer for a context of 8192 (KV cache and reserve included).",
    ]
    for quant in ("q4", "q2"):
        lines += [
            "",
            f"### {quant}",
            "",
            "| model | bits a weight | weights, GB | with context, GB | quoted, GB "
            "| quoted against weights | bits quoted |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        lines += _memory_rows(figures["memory_gb"][quant], quant)
    return "\n".join([*lines, "", *_DIFFERENCES, ""])


_DIFFERENCES = (
    "Why they differ. A weight of MLX's q4 takes 4.5 bits: 4, and a 16-bit scale and bias for each",
    "64 weights; of its q2, 2.5. The last column is what the quoted figure allows a weight. Those",
    "between 4.5 and 4.9 fit GGUF's Q4_K_M (DeepSeek-R1's is 404 GB, 4.82 bits) and rounding;",
    "those above are of small models and leave room for a context; those below (Llama 4, Qwen3",
    "235B) are less than any plain 4-bit format with scales takes, so some layers must have fewer",
    "bits, or the figure is a guess. DeepSeek-R1's 176 GB at q2 is a mix of formats of about 2.1",
    "bits. MLX's q2 says what would fit, not what is wise: answers get visibly worse.",
)


def _memory_rows(quoted: dict[str, float], quant: str) -> Iterator[str]:
    requests = [ask(model, quant, 8192, 1).request for model in quoted]
    for (model, stated), answer in zip(quoted.items(), layouts(requests), strict=True):
        layout = Layout.from_proto(answer)
        weights = layout.weight_bytes
        needed = layout.needed(weights + layout.kv_bytes)
        bits, theirs = weights * 8 / layout.parameters, stated * 1e9 * 8 / layout.parameters
        yield (
            f"| {model} | {bits:.2f} | {weights / 1e9:.1f} | {needed / 1e9:.1f} | {stated} "
            f"| {_percent(stated * 1e9, weights)} | {theirs:.2f} |"
        )


def machines(models: Sequence[Entry] | None = None) -> str:
    """docs/machines.md: what runs on which machine."""
    heads = " | ".join(FLEETS)
    lines = [
        "# What runs on which machine",
        "",
        "Written by `python -m bench.pages machines`: `unicluster plan MODEL --quant Q --fleet F`,",
        "for one user and a context of 8192, objective latency. A number is predicted tokens a",
        "second, and in brackets the machines used, if more than one; a negative amount is what",
        "is missing on one machine. Speeds assume what `coordinator/planning/placement.py` says,",
        "and are measured nowhere yet: [published.md](published.md) has how far off they are. Each",
        "machine has the faster engine, MLX or llama.cpp with a GGUF of about the same bits; on",
        "Strix Halo MLX computes on the CPU alone, on one thread: that is what is left for models",
        "whose GGUFs can't be cut.",
        "",
        f"| model | | {heads} |",
        f"|---|---|{'---:|' * len(FLEETS)}",
    ]
    return "\n".join([*lines, *machine_rows(entries() if models is None else models), ""])


def machine_rows(models: Sequence[Entry]) -> Iterator[str]:
    fleets = [fleet.parse(text) for text in FLEETS.values()]
    wanted = [(m, q) for m in models for q in QUANTS if q in m.quants]
    requests = [ask(model.id, quant, 8192, 1).request for model, quant in wanted]
    for (model, quant), answer in zip(wanted, layouts(requests), strict=True):
        variants = ModelVariants.with_hypothetical_gguf(answer)
        cells = " | ".join(_cell(variants, hardware) for hardware in fleets)
        yield f"| {model.id} | {quant} | {cells} |"


def _cell(variants: ModelVariants, hardware: fleet.Fleet) -> str:
    try:
        placed = plan(variants, hardware.machines, network=hardware.network, alternatives=_none)
    except NoPlanError as error:
        return f"-{format_bytes(error.missing)}"
    used = f" ({len(placed.stages)})" if len(placed.stages) > 1 else ""
    return f"{placed.tokens_per_s_single:.3g}{used}"


def published_page() -> str:
    """docs/published.md: predictions beside results of others."""
    figures = published()["speeds"]
    lines = [
        "# Predicted and published",
        "",
        "Written by `python -m bench.pages published`. Tokens a second, one user, decode.",
        "The assumptions (80 % of the memory's bandwidth, 0.1 ms a layer, 0.3 ms a hop; see",
        "`coordinator/planning/placement.py`) are round figures, the same for all machines and",
        "models. They were settled before this table was made and not changed after, but with the",
        "published figures known: this is no blind test. `bandwidth` is the most that the memory",
        "would allow without them. The error is against the nearer end of a range.",
        "",
        "| what | fleet | published | predicted | error | bandwidth | source |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    requests = [ask(row["model"], row["quant"], 8192, 1).request for row in figures]
    impossible = []
    for row, answer in zip(figures, layouts(requests), strict=True):
        variants, hardware = (
            ModelVariants.with_hypothetical_gguf(answer),
            fleet.parse(row["fleet"]),
        )
        layout = variants.layout
        placed = plan(variants, hardware.machines, alternatives=_none, network=hardware.network)
        speed = placed.tokens_per_s_single
        most = hardware.machines[0].engines["ggml"].bandwidth / (
            sum(layout.layer_active_bytes) + layout.head_read_bytes
        )
        low, high = row["low"], row["high"]
        stated = f"{low}" if low == high else f"{low} to {high}"
        near = min(max(speed, low), high)
        error = _percent(speed, near) if speed != near else "within"
        lines.append(
            f"| {row['what']} | {row['fleet']} | {stated} | {speed:.1f} "
            f"| {error} | {most:.1f} | {row['source']} |"
        )
        if high > most and not row["fleet"].startswith(("2x", "4x")):
            impossible.append(
                f"{row['what']} on {row['fleet']}: {stated}, and {most:.1f} is the most"
            )
    lines += [
        "",
        "Partly or wholly above what bandwidth allows, so not measured with the weights as stated:",
        "",
        *(f"- {line}" for line in impossible),
        "",
        *_PUBLISHED_REMARKS,
        "",
    ]
    return "\n".join(lines)


_PUBLISHED_REMARKS = (
    "On two and four machines the plan stays on one: a single machine holds these models, and a",
    "pipeline's further stages add hops, never speed, for one user. llama.cpp's RPC figures show",
    "the same. Tensor parallelism over RDMA, which splits each layer, does get faster with more",
    "machines; unicluster has none. The prediction is furthest above what was measured for",
    "DeepSeek, whose experts are many small matrices: they seem to reach a smaller part of the",
    "bandwidth than few large ones. After a model was served, what was measured is used instead.",
    "",
    "Four Framework Desktops, predicted before looking for figures (none was found to compare):",
    "Llama 3.1 405B q4 0.87 tokens a second on two of them, DeepSeek-R1 q4 9.0 on all four,",
    "Qwen3-235B-A22B q4 13 on two.",
)


def _none(_: ModelVariants) -> tuple[()]:
    return ()


def _percent(one: float, other: float) -> str:
    share = (one / other - 1) * 100
    return f"{share:+.3f} %" if abs(share) < 0.1 else f"{share:+.1f} %"


PAGES = {
    "memory": memory,
    "machines": machines,
    "published": published_page,
    "gguf_architectures": gguf_architectures,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", choices=[*PAGES, []], help="default: all")
    for name in parser.parse_args().pages or PAGES:
        (DOCS / f"{name}.md").write_text(PAGES[name](), "utf-8")


if __name__ == "__main__":
    main()
