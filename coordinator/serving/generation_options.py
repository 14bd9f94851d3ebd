"""Options of generation, each declared once: a field of StageSpec, by its name."""

from typing import Any

import click

from coordinator.models.catalog import model_names, resolve
from unicluster.command_line import Option
from unicluster.errors import InputError
from unicluster.units import format_bytes, parse_bytes
from unicluster.v1.node_pb2 import Draft, StageSpec

KV_BITS = (4, 8)
# So many tokens and one more are checked in one trip through the machines.
MOST_DRAFTED = 15
MOST_DISK_BYTES = 2**50
# Values of --speculate beside names of models.
AUTO, OFF, LOOKUP = "auto", "off", "lookup"


def generation_options() -> list[Option]:
    """Options of `serve`, `bench --local` and `demo`; `take_generation` reads them."""
    return [
        Option(
            "--lanes",
            "batches of answers that take turns on the machines (default: one a machine)",
            type=int,
            metavar="N",
        ),
        kv_bits_option(),
        Option(
            "--draft",
            "speculative decoding: a smaller model with the same tokens, on the head",
            metavar="MODEL",
            complete=model_names,
        ),
        Option("--lookup", "speculative decoding from what the text has said before", is_flag=True),
        Option(
            "--speculate",
            "fill the pipe with guesses of one token each: `lookup` from the text so far, "
            "a smaller MODEL's, `auto`: by lookup where that helps, or `off` (default: auto)",
            metavar="WHAT",
            complete=speculations,
        ),
        Option(
            "--draft-tokens",
            "draft at most so many tokens; fewer when few are accepted (default: 8)",
            type=int,
            metavar="N",
        ),
        Option(
            "--cache-disk",
            "keep caches of prompts on disk, at most so many bytes on each machine, in the "
            "directory of `join --cache-dir` (default: none)",
            metavar="50GB",
        ),
    ]


def speculations(text: str) -> list[str]:
    """Values of --speculate that begin with a text."""
    own = [name for name in (AUTO, OFF, LOOKUP) if name.startswith(text)]
    return [*own, *model_names(text)]


def kv_bits_option() -> Option:
    return Option(
        "--kv-bits", "quantize KV caches (default: they are not)", type=click.Choice(KV_BITS)
    )


def take_generation(options: dict[str, Any]) -> StageSpec:
    """Takes the options of generation out of a command's, and returns a StageSpec of them alone.

    It is the template of each stage's: a new option is declared above and in the proto, and read
    where it acts. Raises InputError for invalid values and contradictions.
    """
    values = {name: options.pop(name) for option in generation_options() if (name := option.name)}
    cache_disk = values.pop("cache_disk")
    draft, speculate = values.pop("draft"), values.pop("speculate")
    verified_at_once = draft is not None or values["lookup"]
    auto = speculate == AUTO or (speculate is None and not verified_at_once)
    piped = speculate not in (None, OFF, AUTO)
    if (piped or speculate == AUTO) and verified_at_once:
        raise InputError("--speculate: not with --draft or --lookup, which verify in one frame")
    if piped and values["draft_tokens"]:
        raise InputError("--draft-tokens: not with --speculate: each guess is a frame of its own")
    _check(draft, **values)
    if piped and speculate == LOOKUP:
        values["lookup"] = True
    elif piped:
        draft = speculate
    spec = StageSpec(
        **values, piped=piped, auto_speculation=auto, cache_disk=_disk_bytes(cache_disk)
    )
    if draft is not None:
        source = resolve(draft)
        spec.draft.CopyFrom(Draft(model=source.model, quant=source.quant))
    return spec


def _disk_bytes(text: str | None) -> int:
    """Bytes of --cache-disk; 0: nothing is kept on disk. Raises InputError."""
    size = parse_bytes(text) if text is not None else 0
    if not 0 <= size <= MOST_DISK_BYTES:
        raise InputError(f"--cache-disk {text}: between 0 and {format_bytes(MOST_DISK_BYTES)}")
    return size


def _check(
    draft: str | None,
    *,
    lanes: int | None,
    kv_bits: int | None,
    lookup: bool,
    draft_tokens: int | None,
    **_: Any,
) -> None:
    """Raises InputError for what contradicts itself."""
    if lanes is not None and lanes < 0:
        raise InputError(f"--lanes {lanes}: at least 1, or 0 for one a machine")
    drafts = lookup or draft is not None
    if lookup and draft is not None:
        raise InputError("--draft and --lookup: give one of them")
    if draft_tokens and not drafts:
        raise InputError("--draft-tokens: only with --draft or --lookup")
    if not 0 <= (draft_tokens or 0) <= MOST_DRAFTED:
        raise InputError(f"--draft-tokens {draft_tokens}: between 1 and {MOST_DRAFTED}")
    if lanes and (drafts or kv_bits):
        raise InputError(
            "--lanes: with --draft, --lookup or --kv-bits each answer has a lane of its own"
        )
