"""The options of `serve` and `plan` that tell of engines: `--gguf` and `--engine`."""

import argparse

from coordinator.models.catalog import ENGINES, Source, checked_engine, resolve
from coordinator.serving.generation_options import Serving
from unicluster.errors import InputError


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gguf",
        metavar="MODEL",
        help="the same model as a GGUF, for machines on which llama.cpp is faster",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", *ENGINES),
        default="auto",
        help="only this engine; ggml is for GGUFs (default: whichever is faster)",
    )


def models_of(args: argparse.Namespace, serving: Serving) -> tuple[Source, Source | None]:
    """What is to be served: a model, and the same as a GGUF where both are to be used.

    Raises InputError for options that contradict each other.
    """
    source = resolve(args.model, args.quant)
    if args.gguf is None:
        return checked_engine(source, args.engine), None
    gguf = resolve(args.gguf)
    check_gguf(args.engine, serving.kv_bits)
    return (gguf, None) if args.engine == "ggml" else (source, gguf)


def check_gguf(engine: str, kv_bits: int) -> None:
    """Raises InputError for options that leave a GGUF without use."""
    if engine == "mlx":
        raise InputError("--engine mlx: without llama.cpp there is no use for --gguf")
    if kv_bits:
        raise InputError(f"--kv-bits {kv_bits}: not with --gguf, whose caches stay as they are")
