"""Chooses the engine of a checkpoint; no other module of `node` does."""

from node.engines.engine import Engine
from unicluster.checkpoints.checkpoint import Checkpoint, is_gguf
from unicluster.errors import InputError


def choose(checkpoint: Checkpoint, requested: str = "") -> Engine:
    """The engine `requested` by name (see StageSpec), or else that of the checkpoint's files.

    Raises InputError for an unknown engine, or one that is not installed.
    """
    model = checkpoint.manifest.model
    name = requested or ("ggml" if any(map(is_gguf, checkpoint.manifest.weights)) else "mlx")
    if name == "mlx":
        from node.engines.mlx_engine import MLXEngine

        return MLXEngine()
    if name == "ggml":
        try:
            from node.engines.ggml_engine import GgmlEngine  # an extra
        except ImportError as error:
            reason = "llama.cpp is not installed: pip install 'unicluster[ggml]'"
            raise InputError(f"{model}: {reason}") from error
        return GgmlEngine()
    raise InputError(f"{model}: no engine {name!r}: it is mlx or ggml")
