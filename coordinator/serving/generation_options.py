"""How a model is served, beyond where its layers lie: the options of `serve` for the head."""

import argparse
from dataclasses import dataclass

from coordinator.models.catalog import Source, resolve
from unicluster.errors import InputError

KV_BITS = (4, 8)
# So many tokens and one more are checked in one trip through the machines.
MOST_DRAFTED = 15


@dataclass(frozen=True)
class Serving:
    """What `serve` was asked for and the head does."""

    lanes: int = 0  # batches that take turns; 0: one a stage
    kv_bits: int = 0  # of the KV caches; 0: as they are
    lookup: bool = False  # guess ahead from the text so far
    draft: Source | None = None  # or by a smaller model
    draft_tokens: int = 0  # at most that many at a time; 0: as the head thinks fit


def add_serving_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lanes",
        type=int,
        default=0,
        metavar="N",
        help="batches of answers that take turns on the machines (default: one a machine)",
    )
    add_kv_bits(parser)
    parser.add_argument(
        "--draft",
        metavar="MODEL",
        help="a smaller model with the same tokens, loaded beside the first layers, guesses ahead",
    )
    parser.add_argument(
        "--lookup", action="store_true", help="guess ahead from what the text has said before"
    )
    parser.add_argument(
        "--draft-tokens",
        type=int,
        default=0,
        metavar="N",
        help="guess at most so many tokens ahead; how many, follows what was right (default: 8)",
    )


def add_kv_bits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-bits",
        type=int,
        choices=KV_BITS,
        default=0,
        help="quantize KV caches (default: they are not)",
    )


def serving_of(args: argparse.Namespace) -> Serving:
    """What was asked for. Raises InputError for what makes no sense."""
    if args.lanes < 0:
        raise InputError(f"--lanes {args.lanes}: at least 1, or 0 for one a machine")
    guesses = args.lookup or args.draft is not None
    if args.lookup and args.draft is not None:
        raise InputError("--draft and --lookup: give one of them")
    if args.draft_tokens and not guesses:
        raise InputError("--draft-tokens: only with --draft or --lookup")
    if not 0 <= args.draft_tokens <= MOST_DRAFTED:
        raise InputError(f"--draft-tokens {args.draft_tokens}: between 1 and {MOST_DRAFTED}")
    if args.lanes and (guesses or args.kv_bits):
        raise InputError(
            "--lanes: with --draft, --lookup or --kv-bits each answer has a lane of its own"
        )
    return Serving(
        lanes=args.lanes,
        kv_bits=args.kv_bits,
        lookup=args.lookup,
        draft=resolve(args.draft) if args.draft is not None else None,
        draft_tokens=args.draft_tokens,
    )
