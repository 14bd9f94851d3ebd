"""MLX: stages of mlx-lm's own model classes, from safetensors."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from mlx_lm.utils import load_config, load_tokenizer

from node.engines.engine import LoadedHead, LoadedStage, OnLoaded, ignore
from node.engines.mlx_layout import inspect
from node.mlx.hollow import HollowModel
from node.mlx.lazy import load_lazy, load_parts, nbytes
from node.mlx.stage import MLXStage
from node.mlx.survey import survey
from node.weights.fetch import tensor_ranges
from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.checkpoints.ranges import Ranges
from unicluster.v1.node_pb2 import InspectRequest, LoadProgress, ModelLayout, StageSpec


class MLXEngine:
    """Engine over safetensors, with mlx-lm's model classes."""

    name = "mlx"
    head_makes_logits = True
    can_draft = True

    def inspect(self, checkpoint: Checkpoint, request: InspectRequest) -> ModelLayout:
        users = request.users or 1
        return inspect(checkpoint, request.quant, request.context, users, request.kv_bits)

    def ranges(self, checkpoint: Checkpoint, spec: StageSpec) -> Mapping[str, Ranges]:
        surveyed = survey(checkpoint.root, spec.quant)
        tensors = surveyed.of_stage(spec.first_layer, spec.end_layer, spec.finishes)
        return tensor_ranges(checkpoint, tensors)

    def made_bytes(self, checkpoint: Checkpoint, spec: StageSpec) -> int:
        """None: weights are loaded from the checkpoint's files."""
        return 0

    def load(
        self,
        checkpoint: Checkpoint,
        spec: StageSpec,
        on_progress: OnLoaded = ignore,
        *,
        prebuilt: bool = True,
    ) -> LoadedHead | LoadedStage:
        lazy = load_lazy(checkpoint.root, spec.quant)
        first, end = spec.first_layer, spec.end_layer
        hollow = HollowModel(lazy.model, lazy.model_type, first, end, has_lm_head=spec.finishes)
        count = len(hollow.layers)
        # The last part of a head is the whole model: what is outside the layers comes with it.
        parts = (*hollow.layers, *(hollow.outside if first > 0 else (lazy.model,)))
        total = nbytes(lazy.model) if first == 0 else sum(nbytes(part) for part in parts)
        done = 0
        on_progress(LoadProgress(layers_total=count, bytes_total=total))
        for loaded, size in enumerate(load_parts(parts), start=1):
            done = min(done + size, total)
            on_progress(
                LoadProgress(
                    layers_done=min(loaded, count),
                    layers_total=count,
                    bytes_done=done,
                    bytes_total=total,
                )
            )
        if first == 0:
            return LoadedHead(hollow, total, prebuilt)
        return LoadedStage(MLXStage(hollow, prebuilt=prebuilt), total)

    def cache_settings(self, spec: StageSpec) -> str:
        return f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, kv_bits {spec.kv_bits}"

    def tokenizer(self, checkpoint: Checkpoint) -> Any:
        ends = load_config(checkpoint.root).get("eos_token_id")
        return load_tokenizer(checkpoint.root, eos_token_ids=ends)
