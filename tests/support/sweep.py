"""Every architecture of the installed mlx-lm, cut in every way, against the unsplit model.

`python -m tests.support.sweep` prints a verdict for each; `--table` writes docs/architectures.md.
"""

import argparse
import io
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from node.mlx.compat_caches import Caches, commit
from node.mlx.crossing import forbidden_cuts, lm_head_modules
from node.mlx.dataflow import trace_dataflow
from node.mlx.hollow import HollowModel
from node.mlx.prebuilt import Build, StepBuilder, kind_of_leaves
from node.mlx.tensors import decode_tree
from tests.support import zoo
from tests.support.wire import on_the_wire
from unicluster.errors import StageError

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"

# Prefill in two chunks, the first within the windows of 8 and the second across their end; then
# decode until rotating caches have gone round.
TOKENS = mx.array([[(7 * i * i + 3) % 90 + 1 for i in range(20)]])
CHUNKS = [TOKENS[:, :7], TOKENS[:, 7:12], *(TOKENS[:, i : i + 1] for i in range(12, 20))]


@dataclass(frozen=True)
class Verdict:
    """The sweep's verdict on one configuration.

    dtypes: those in which every cut tried gave the unsplit model's logits.
    splits: how many were tried. refused: the cuts not offered, with the reason.
    caches: class names. trimmable: always, until full (its window), or never.
    skipped: mlx-lm's own error where it can't run the model here; not_run: in that dtype.
    differs: splits whose logits were others.
    """

    name: str
    dtypes: tuple[str, ...] = ()
    splits: int = 0
    refused: str = ""
    caches: tuple[str, ...] = ()
    trimmable: str = ""
    skipped: str = ""
    not_run: str = ""
    differs: tuple[str, ...] = ()

    @property
    def word(self) -> str:
        if self.skipped:
            return "skipped"
        if self.differs:
            return "differs"
        return "refused" if not self.splits else "identical"


def judge(name: str) -> Verdict | None:
    """Runs one configuration; None for a module that is no model."""
    try:
        with redirect_stdout(io.StringIO()):
            if not zoo.is_model(name):
                return None
            whole = Whole.run(name, mx.float32)
    except (Exception, SystemExit) as error:
        return Verdict(name, skipped=_first_line(error))
    caches = tuple(dict.fromkeys(_kind(entry) for entry in whole.cache))
    facts: dict[str, Any] = {"caches": caches, "trimmable": whole.trimmable}
    try:
        found = trace_dataflow(zoo.build(name), name)
    except StageError as error:
        return Verdict(name, refused=str(error), **facts)
    forbidden = forbidden_cuts(found)
    refused = "; ".join(f"before layer {cut}: {reason}" for cut, reason in forbidden.items())
    count = len(found.layers)
    allowed = [cut for cut in range(1, count) if cut not in forbidden]
    splits = list(_splits(allowed, count))
    differs = list(_differing(whole, splits))
    if lm_head_modules(found) is not None:
        at_the_end = _differing(whole, splits[-1:], has_lm_head=True)
        differs += [f"finished by the last stage: {s}" for s in at_the_end]
    dtypes = ["float32"]
    try:
        half = Whole.run(name, mx.bfloat16)
    except Exception as error:
        facts["not_run"] = f"bfloat16: {_first_line(error)}"
    else:
        dtypes.append("bfloat16")
        differs += [f"bfloat16 {s}" for s in _differing(half, splits[len(allowed) // 2 :][:1])]
    return Verdict(name, tuple(dtypes), len(splits), refused, differs=tuple(differs), **facts)


@dataclass
class Whole:
    """The unsplit model's answer."""

    name: str
    dtype: mx.Dtype
    cache: list[Any]
    logits: list[mx.array]
    trimmable: str

    @classmethod
    def run(cls, name: str, dtype: mx.Dtype) -> "Whole":
        model = zoo.build(name, dtype)
        cache = make_prompt_cache(model)
        logits, trims = [], []
        for chunk in CHUNKS:
            logits.append(model(chunk, cache=cache))
            mx.eval(logits[-1])
            trims.append(all(entry.is_trimmable() for entry in cache))
        trimmable = "always" if all(trims) else "until full" if trims[0] else "never"
        if mx.isnan(logits[-1]).any():
            raise ValueError("its logits are no numbers")
        return cls(name, dtype, cache, logits, trimmable)


def _splits(allowed: list[int], count: int) -> Iterator[tuple[int, ...]]:
    """Every cut in two, a cut in three, and as many stages as there can be."""
    for cut in allowed:
        yield 0, cut, count
    if len(allowed) > 1:
        yield 0, allowed[0], allowed[-1], count
    if len(allowed) > 2:
        yield 0, *allowed, count


def _differing(
    whole: Whole, splits: list[tuple[int, ...]], *, has_lm_head: bool = False
) -> Iterator[str]:
    """`has_lm_head`: the last stage makes the logits."""
    stages: dict[tuple[int, int], HollowModel] = {}
    for bounds in splits:
        for ends in pairwise(bounds):
            if ends not in stages:
                model, last = zoo.build(whole.name, whole.dtype), ends[1] == bounds[-1]
                stages[ends] = HollowModel(
                    model, whole.name, *ends, has_lm_head=has_lm_head and last
                )
        try:
            logits = run_stages([stages[ends] for ends in pairwise(bounds)])
        except Exception as error:
            yield f"{bounds}: {_first_line(error)}"
            continue
        same = [mx.array_equal(a, b).item() for a, b in zip(logits, whole.logits, strict=True)]
        if not all(same):
            yield f"{bounds}: forwards {[i for i, s in enumerate(same) if not s]}"


def run_stages(stages: list[HollowModel]) -> list[mx.array]:
    """Logits for CHUNKS through stages that share only what would go over the wire."""
    caches = [stage.cache_view.make() for stage in stages]
    logits = []
    for turn, chunk in enumerate(CHUNKS):
        out = _run(stages[0].front, chunk, caches[0], turn)
        for stage, cache in zip(stages[1:], caches[1:], strict=True):
            out = _run(
                stage.forward_logits if stage.has_lm_head else stage.forward, out, cache, turn
            )
        if stages[-1].has_lm_head:
            logits.append(out)
            continue

        def final_logits(
            received: Any, _: Caches, tokens: mx.array = chunk
        ) -> tuple[mx.array, list[Any]]:
            return stages[0].final_logits(tokens, received, caches[0]), []

        logits.append(_run(final_logits, out, [], turn))
    return logits


def _run(build: Build, tree: Any, caches: Caches, turn: int) -> Any:
    """One part of a forward. Decode steps are prebuilt, and every third is then not used."""
    leaves = on_the_wire(tree)
    step = StepBuilder().build(kind_of_leaves(leaves), caches, build) if turn > 2 else None
    if step is None or turn % 3 == 0:
        step = None
        result, extra = build(decode_tree(leaves), caches)
    else:
        step.placeholder.fill(leaves)
        commit(caches, step.shadows)
        result, extra = step.result, step.extra
    mx.eval(result, extra)
    return result


def verdicts_in_table() -> dict[str, str]:
    """The verdict of each configuration in docs/architectures.md."""
    return {name: cells[0] for name, cells in _rows().items()}


def representatives() -> list[str]:
    """For each verdict and kind of caches in the table one configuration.

    The first of its kind, and of those that run in bfloat16 where there are any.
    """
    chosen: dict[tuple[str, str, str], str] = {}
    rows = _rows()
    for name in sorted(rows, key=lambda name: "bfloat16" not in rows[name][1]):
        verdict, _, caches, trimmable = rows[name][:4]
        chosen.setdefault((verdict, caches, trimmable), name)
    return list(chosen.values())


def _rows() -> dict[str, list[str]]:
    """The cells beside each name in the table."""
    lines = [line.removeprefix("| ").split(" | ") for line in TABLE.read_text().splitlines()]
    return {cells[0]: cells[1:] for cells in lines if len(cells) > 4 and cells[0] != "module"}


def table(verdicts: list[Verdict]) -> str:
    """docs/architectures.md."""
    words = Counter(verdict.word for verdict in verdicts)
    counted = ", ".join(f"{count} {word}" for word, count in sorted(words.items()))
    lines = [
        "# Architectures",
        "",
        "Written by `python -m tests.support.sweep --table` with mlx-lm "
        f"{version('mlx-lm')}: {counted}.",
        "",
        "Each is a tiny random model of a module of mlx-lm, cut in two at every layer, in three,",
        "and into one stage a layer. *Identical*: prefill in two chunks and decode past the",
        "windows give the unsplit model's logits, bit for bit; also where the last stage makes",
        "them instead of the head, as it can where only a hidden state crosses cuts. *Skipped*:",
        "mlx-lm itself can't run it on this CPU; its own error is given. *Refused*: it can't be",
        "cut, and says why.",
        "What can trim its cache never needs a copy of it to verify guesses or reuse a prompt.",
        "",
        "| module | verdict | dtypes | caches | can trim | remarks |",
        "|---|---|---|---|---|---|",
    ]
    for v in verdicts:
        remarks = "; ".join(filter(None, (v.skipped, v.refused, *v.differs, v.not_run)))
        cells = (v.name, v.word, ", ".join(v.dtypes), ", ".join(v.caches), v.trimmable, remarks)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="configurations; all if none is named")
    parser.add_argument("--table", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    verdicts = []
    for name in options.names or zoo.names():
        started = time.perf_counter()
        if (verdict := judge(name)) is not None:
            verdicts.append(verdict)
            seconds = time.perf_counter() - started
            remarks = verdict.skipped or verdict.refused or " ".join(verdict.differs)
            print(f"{verdict.word:10} {name:30} {seconds:5.1f} s  {remarks}", flush=True)
    if options.table:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(table(verdicts))
    sys.exit(any(verdict.differs for verdict in verdicts))


def _kind(entry: Any) -> str:
    members = getattr(entry, "caches", None)
    name = type(entry).__name__
    return f"{name}({', '.join(_kind(m) for m in members)})" if members else name


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"


if __name__ == "__main__":
    main()
