"""How far caches of a plan's layers can be rolled back, in a phrase for each engine."""

from coordinator.planning.engines import DEFAULT, ENGINES
from coordinator.planning.placement import Layout, Plan
from coordinator.planning.variants import ModelVariants


def reuse_lines(plan: Plan, variants: ModelVariants) -> list[str]:
    """Limits of reusing cached prompts and of guessing; none where anything can be rolled back."""
    used = [variant for variant in variants.layouts if variant.engine in plan.engines]
    lines = {variant.engine: line for variant in used if (line := _limits(variant))}
    if len(plan.engines) == 1:
        return list(lines.values())
    return [f"{ENGINES[engine].title}: {line}" for engine, line in lines.items()]


def _limits(layout: Layout) -> str:
    if layout.recurrent and layout.engine == DEFAULT:
        return "a cached prompt only as a whole, because of recurrent layers"
    if layout.recurrent:
        return (
            "of recurrent layers only whole copies, kept where messages begin and end; guesses "
            "don't fill the pipe"
        )
    if not layout.window:
        return ""
    which = "a cached prompt" if layout.engine == DEFAULT else "a prompt saved to disk or host"
    return f"{which} beyond the windows of {layout.window} tokens only as a whole"
