"""Which engine computes what in a plan, and why, in phrases with figures."""

from collections.abc import Sequence

from coordinator.planning.engines import DEFAULT, ENGINES
from coordinator.planning.placement import Plan, Stage, reads
from coordinator.planning.variants import ModelVariants
from unicluster.units import format_rate


def engine_lines(plan: Plan, variants: ModelVariants) -> list[str]:
    """Lines about the engines of a plan; none where only the default engine can be used."""
    if variants.gguf is None:
        return _of_one_variant(variants)
    if variants.hypothetical and variants.gguf.engine not in plan.engines:
        return []
    lines = ["; ".join(_reasons(plan, variants, engine) for engine in plan.engines)]
    if variants.hypothetical:
        lines.append(_hypothetical(variants.gguf.quant))
    return lines


def _of_one_variant(variants: ModelVariants) -> list[str]:
    engine = ENGINES[variants.layout.engine]
    if engine.name == DEFAULT:
        return []
    name = f"{engine.title} ({engine.library})"
    if variants.hypothetical:
        return [f"{name}, as requested", _hypothetical(variants.layout.quant)]
    return [f"{name}, because the model is a GGUF"]


def _hypothetical(quant: str) -> str:
    return f"assuming a GGUF of about the same size ({quant}); serve it with --gguf"


def _reasons(plan: Plan, variants: ModelVariants, engine: str) -> str:
    """`ggml on a, b (reads 205 GB/s there, MLX 102), c (the only one there)`."""
    reasons: dict[str, list[str]] = {}
    for stage in plan.stages:
        if stage.engine == engine:
            reasons.setdefault(_why(stage, variants), []).append(stage.machine.name)
    parts = [f"{listed(names)}{reason}" for reason, names in reasons.items()]
    return f"{engine} on {', '.join(parts)}"


def _why(stage: Stage, variants: ModelVariants) -> str:
    used, other = sorted(variants.layouts, key=lambda variant: variant.engine != stage.engine)
    if not stage.machine.can(other.engine):
        return " (it offers no other)"
    ours, theirs = reads(used, stage.machine), reads(other, stage.machine)
    name = ENGINES[other.engine].title
    if abs(ours - theirs) < 0.005 * ours:
        return f" (reads {format_rate(ours)} there, like {name})"
    rate, slower = format_rate(ours), format_rate(theirs)
    if rate.split()[1] == slower.split()[1]:
        slower = slower.split()[0]
    return f" (reads {rate} there, {name} {slower})"


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
