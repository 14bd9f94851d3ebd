"""Layouts from configurations alone, by a short-lived child: MLX never enters this process."""

import importlib.util
from collections.abc import Sequence
from functools import partial

from coordinator.models import layout_cache
from coordinator.programs import INSPECT
from unicluster.checkpoints.inspecting import inspect_configs
from unicluster.v1.node_pb2 import InspectRequest, ModelLayout


def possible_here() -> bool:
    """Whether this machine has what the child needs."""
    return importlib.util.find_spec("mlx_lm") is not None


def layouts(requests: Sequence[InspectRequest]) -> list[ModelLayout]:
    """Layouts of models, cached or else as `inspect_configs` makes and refuses them."""
    return layout_cache.layouts(requests, partial(inspect_configs, INSPECT))
