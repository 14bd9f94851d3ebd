"""The options of `serve` and `plan` that choose among engines: `--gguf` and `--engine`."""

import click

from coordinator.models.catalog import Source, checked_engine, model_names, resolve
from coordinator.planning.engines import ENGINES, for_checkpoint
from unicluster.command_line import Option
from unicluster.errors import InputError


def engine_options() -> list[Option]:
    return [
        Option(
            "--gguf",
            "the same model as a GGUF, for machines on which llama.cpp is faster",
            metavar="MODEL",
            complete=model_names,
        ),
        Option(
            "--engine",
            "only this engine; ggml is for GGUFs (default: whichever is faster)",
            type=click.Choice(("auto", *ENGINES)),
            default="auto",
        ),
    ]


def chosen_models(
    model: str, quant: str | None, gguf: str | None, engine: str, kv_bits: int
) -> tuple[Source, Source | None]:
    """The model to be served, and the same as a GGUF where both engines are to be used.

    Raises InputError for options that contradict each other.
    """
    source = resolve(model, quant)
    if gguf is None:
        return checked_engine(source, engine), None
    gguf_source = resolve(gguf)
    check_gguf(engine, kv_bits)
    return (
        (gguf_source, None) if engine == for_checkpoint(gguf=True).name else (source, gguf_source)
    )


def check_gguf(engine: str, kv_bits: int) -> None:
    """Raises InputError for options that leave a GGUF without use."""
    reader = for_checkpoint(gguf=True)
    if engine not in ("auto", reader.name):
        raise InputError(f"--engine {engine}: without {reader.library} there is no use for --gguf")
    if kv_bits and not reader.quantizes_kv:
        raise InputError(f"--kv-bits {kv_bits}: not with --gguf, whose caches stay as they are")
