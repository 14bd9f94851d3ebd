"""Results of a run as a table."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def table(found: Mapping[str, Any]) -> str:
    """Counts, the distribution of recovery times, and all that is wrong."""
    total, answers = sum(found["faults"].values()), sum(found["answers"].values())
    asked = answers + found["refused"]
    lines = [f"{total} faults in {found['seconds']:.0f} s, seed {found['seed']}", ""]
    lines += _counts(found["faults"])
    lines += ["", f"{sum(found['reached'].values())} failpoints acted", ""]
    lines += [
        "",
        f"{asked} requests, of which {answers} ({100 * answers / max(asked, 1):.0f} %) met a "
        f"running model, and {found['refused']} were refused",
        "",
    ]
    lines += _counts(found["answers"])
    lines += ["", "seconds                      count  median  9 of 10  longest"]
    lines += [_spread("silence of a disturbed answer", found["gaps"])]
    lines += [_spread(part.removesuffix("_s"), each) for part, each in found["parts"].items()]
    lines += ["", *(f"  {n:4} x {text}" for text, n in Counter(found["errors"]).most_common(12))]
    lines += [f"serve ended, and was started anew: {words}" for words in found["gave_up"]]
    lines += [f"WRONG: {what}" for what in found["wrong"]]
    return "\n".join(lines)


def _counts(counts: Mapping[str, int]) -> list[str]:
    return [f"  {name:34}{count:6}" for name, count in sorted(counts.items())]


def _spread(name: str, seconds: Sequence[float]) -> str:
    if not seconds:
        return f"{name:30}{0:4}"
    ordered = sorted(seconds)
    late = ordered[int(0.9 * (len(ordered) - 1))]
    return (
        f"{name:30}{len(ordered):4}{statistics.median(ordered):8.2f}{late:9.2f}{ordered[-1]:9.2f}"
    )
