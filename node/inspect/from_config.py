"""A lazy mlx-lm model, built from its config.json alone, without weights."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import quantize_model

from node.engines.mlx_layout import layout_of
from node.inspect.hypothetical_gguf import hypothetical_gguf
from node.mlx.compat import model_classes
from node.mlx.dataflow import trace_dataflow
from node.mlx.lazy import BITS, GROUP_SIZE, stored_quant
from node.weights.caches import folder, folders
from node.weights.store import DEMO
from unicluster.errors import InputError, NotFoundError, in_one_line
from unicluster.v1.node_pb2 import InspectRequest, ModelLayout

# Experts in the float format they were trained in, all else in 8 bits: how mlx-community
# converts gpt-oss and some others.
EXPERTS_MXFP4 = "mxfp4-q8"
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}

Predicate = Callable[[str, nn.Module], Any]


def inspect_config(request: InspectRequest) -> ModelLayout:
    """The layout of a checkpoint with the request's config, as stored or quantized on load.

    Raises InputError for a config of no model that mlx-lm knows, or a context too long.
    """
    try:
        config = json.loads(request.config_json or _config_of(request.model))
    except ValueError as error:
        raise InputError(f"{request.model}: its config is no JSON: {error}") from error
    model, quant = build(config, request.quant, request.model)
    found = trace_dataflow(model, str(config["model_type"]))
    layout = layout_of(
        model,
        found,
        config,
        quant,
        request.model,
        request.context,
        request.users or 1,
        request.kv_bits,
    )
    if not request.kv_bits and (gguf := hypothetical_gguf(layout, config)) is not None:
        layout.gguf.CopyFrom(gguf)
    return layout


def build(config: dict[str, Any], quant: str = "", name: str = "") -> tuple[nn.Module, str]:
    """Returns the lazy model and the name of its weights' quantization or dtype.

    `quant` is as in InspectRequest, or EXPERTS_MXFP4. Arrays have the shapes and dtypes of the
    checkpoint's; nothing may be evaluated.
    """
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{name}: its config has no model_type")
    # Random weights take their keys from a lazy chain, which would grow from model to model.
    mx.random.seed(0)
    try:
        model_class, args_class = model_classes(config)
        model: nn.Module = model_class(args_class.from_dict(config))
    except Exception as error:  # a class may stumble over its config in any way
        reason = in_one_line(error)
        raise InputError(f"{name}: mlx-lm can't build this config: {reason}") from error
    _sanitize(model, config)
    _cast(model, config)
    stored_config = _stored_quantization(config, name)
    if stored_config is not None and quant != EXPERTS_MXFP4:
        _quantize_as_stored(model, stored_config)
        stored = stored_quant({"quantization": stored_config}, model)
        if quant not in ("", "none", stored):
            raise InputError(f"{name}: its weights are already {stored}, not {quant}")
        return model, stored
    if quant in ("", "none"):
        return model, stored_quant({}, model)
    _quantize(model, config, quant)
    return model, quant


def _config_of(model: str) -> str:
    """The config.json of the demo, a directory here, or a hub repository."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    path = DEMO if model == "demo" else Path(model).expanduser()
    try:
        if not path.is_absolute():
            cache = folder(model).parent
            there = try_to_load_from_cache(model, "config.json")
            is_shared = cache == folders(model)[0].parent
            if is_shared or not isinstance(there, str):
                there = hf_hub_download(model, "config.json", cache_dir=cache)
            path = Path(there).parent
        return (path / "config.json").read_text("utf-8")
    except LocalEntryNotFoundError as error:
        reason = "the hub can't be reached; give its config.json, or a directory"
        raise NotFoundError(f"{model}: {reason}") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise NotFoundError(f"{model}: no such repository on the hub, or it is gated") from error
    except OSError as error:
        raise InputError(f"{path / 'config.json'}: {error.strerror or error}") from error


def _sanitize(model: nn.Module, config: dict[str, Any]) -> None:
    """Lets the class drop what the checkpoint won't have: some build a lm_head to drop it."""
    if not hasattr(model, "sanitize"):
        return
    # Transformers ties them unless a config says otherwise.
    tied = config.get("tie_word_embeddings", _text(config).get("tie_word_embeddings", True))
    weights = dict(tree_flatten(model.parameters()))
    if tied:
        weights = {k: v for k, v in weights.items() if not k.endswith("lm_head.weight")}
    model.sanitize(weights)


def _cast(model: nn.Module, config: dict[str, Any]) -> None:
    """Casts to the dtype of the checkpoint: mlx-lm's classes start in float32."""
    text = _text(config)
    names = (config.get("torch_dtype"), config.get("dtype"), text.get("torch_dtype"))
    name = next((n for n in (*names, text.get("dtype")) if n), "bfloat16")
    dtype = getattr(mx, str(name).removeprefix("torch."))
    castable = getattr(model, "cast_predicate", lambda _path: True)

    def cast(path: str, array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(dtype) if floating and castable(path) else array

    model.update(tree_map_with_path(cast, model.parameters()))


def _stored_quantization(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Quantization of the weights by the config, in mlx-lm's terms; None for plain floats."""
    if isinstance(quantization := config.get("quantization"), dict):
        return quantization
    original = config.get("quantization_config") or _text(config).get("quantization_config")
    if not original:
        return None
    method = original.get("quant_method")
    if method == "fp8":
        return None  # most classes turn it into plain floats when they load it
    if method == "mxfp4":
        return {**MXFP4, "experts_only": True}
    raise InputError(f"{name}: sizes of {method} weights can't be derived from config.json alone")


def _quantize_as_stored(model: nn.Module, quantization: dict[str, Any]) -> None:
    predicate: Predicate | None = getattr(model, "quant_predicate", None)

    def wanted(path: str, module: nn.Module) -> Any:
        if path in quantization:
            return quantization[path]
        if (
            not hasattr(module, "to_quantized")
            or module.weight.shape[-1] % quantization["group_size"]
        ):
            return False
        if quantization.get("experts_only"):
            return isinstance(module, SwitchLinear)
        return predicate is None or bool(predicate(path, module))

    nn.quantize(
        model,
        quantization["group_size"],
        quantization["bits"],
        mode=quantization.get("mode", "affine"),
        class_predicate=wanted,
    )


def _quantize(model: nn.Module, config: dict[str, Any], quant: str) -> None:
    of_model: Predicate | None = getattr(model, "quant_predicate", None)

    def mixed(path: str, module: nn.Module) -> Any:
        if isinstance(module, SwitchLinear):
            return MXFP4
        return True if of_model is None else of_model(path, module)

    if quant != EXPERTS_MXFP4 and quant not in BITS:
        raise InputError(f"no quantization {quant!r}: it is one of {', '.join(BITS)}")
    bits = BITS.get(quant, 8)
    predicate = mixed if quant == EXPERTS_MXFP4 else of_model
    with contextlib.redirect_stdout(None):
        quantize_model(model, config, GROUP_SIZE, bits, quant_predicate=predicate)


def _text(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("text_config") or {}
