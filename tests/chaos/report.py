"""Results of a run as a table of 80 columns."""

import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tests.chaos.points import KINDS

WIDTH = 80
# Without as many, a run proves nothing. At a load of 23 on two cores there were thrice as many.
LEAST = {"faults": 40, "answers that are whole and right": 1, "answers that went on": 1}
# Different each time, and of no use in a count.
_ADDRESS = re.compile(r" \([\w.:\[\]]+:\d+\)")


def table(found: Mapping[str, Any], wanted: int) -> str:
    """Counts, the distribution of recovery times, and all that is wrong.

    wanted: faults, of which a slow machine has fewer.
    """
    total, answers = sum(found["faults"].values()), sum(found["answers"].values())
    asked = answers + found["refused"]
    places = set(found["acted"])
    lines = [f"{total} faults in {found['seconds']:.0f} s, seed {found['seed']}", ""]
    lines += _counts(_kinds(found["faults"]))
    known = {point for kind in KINDS for point in kind}
    lines += ["", f"failpoints acted at {len(places & known)} of {len(known)} places"]
    if asleep := sorted(known - places):
        lines += _wrapped("not reached: ", ", ".join(asleep))
    lines += [
        "",
        f"{asked} requests: {100 * answers / max(asked, 1):.0f} % met a running model, "
        f"{found['refused']} were refused",
        "",
    ]
    lines += _counts(found["answers"])
    lines += ["", f"{'seconds':30}{'count':>5}{'median':>9}{'9 of 10':>9}{'longest':>9}"]
    lines += [_spread("silence of a disturbed answer", found["gaps"])]
    lines += [_spread(part.removesuffix("_s"), each) for part, each in found["parts"].items()]
    lines.append("")
    for text, number in _alike(found["errors"]):
        lines += _wrapped(f"{number:4} x ", text)
    for words, number in _alike(Counter(found["gave_up"])):
        lines += _wrapped(f"{number:4} x `serve` ended, and was started anew: ", words)
    if total < wanted:
        lines.append(f"{wanted} faults were wanted, and there was time for {total}")
    for what in found["wrong"]:
        lines += _wrapped("WRONG: ", what)
    for what in too_little(found):
        lines += _wrapped("TOO LITTLE: ", what)
    if not found["wrong"]:
        lines.append("nothing wrong, cut off, repeated, standing still or left")
    return "\n".join(lines)


def too_little(found: Mapping[str, Any]) -> list[str]:
    """Why a run proves nothing, a line each; none where it does."""
    had = (
        sum(found["faults"].values()),
        found["answers"].get("whole and right", 0),
        len(found["parts"]["detect_s"]),
    )
    return [
        f"{number} {what}, and {least} are the least that says anything"
        for number, (what, least) in zip(had, LEAST.items(), strict=True)
        if number < least
    ]


def _alike(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """The most frequent texts, those that differ in an address taken together."""
    alike: Counter[str] = Counter()
    for text, number in counts.items():
        alike[_ADDRESS.sub("", text)] += number
    return alike.most_common(12)


def _kinds(faults: Mapping[str, int]) -> Counter[str]:
    """Faults without the names of places in the code."""
    kinds: Counter[str] = Counter()
    for name, number in faults.items():
        kind, at, _ = name.partition(" at ")
        kinds[kind + at + "a place of the code" * bool(at)] += number
    return kinds


def _wrapped(begin: str, text: str) -> list[str]:
    return textwrap.wrap(begin + text, WIDTH, subsequent_indent="       ")


def _counts(counts: Mapping[str, int]) -> list[str]:
    return [f"  {name:45}{count:6}" for name, count in sorted(counts.items())]


def _spread(name: str, seconds: Sequence[float]) -> str:
    if not seconds:
        return f"{name:30}{0:5}"
    ordered = sorted(seconds)
    late = ordered[int(0.9 * (len(ordered) - 1))]
    return (
        f"{name:30}{len(ordered):5}{statistics.median(ordered):9.2f}{late:9.2f}{ordered[-1]:9.2f}"
    )
