"""ggml: stages of llama.cpp's graphs, from a GGUF."""

import logging
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from gguf import TokenType
from mlx_lm.utils import load_config, load_tokenizer

from node.engines.engine import LoadedHead, LoadedStage, OnLoaded, ignore
from node.ggml.cut import Gguf
from node.ggml.cutting.kinds import check_cut
from node.ggml.layout import inspect, planned_bytes
from node.ggml.load import DEFAULT_CONTEXT, load, open_gguf
from node.ggml.stage_file import (
    Part,
    StageFile,
    disk_bytes,
    remove_others,
    stage_file,
    stage_path,
)
from node.ggml.tokenizer import TEMPLATE, tokenizer_of
from node.weights import caches
from node.weights.fetch import is_whole
from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.checkpoints.gguf import Header, read_header
from unicluster.checkpoints.ranges import Ranges, merged
from unicluster.checkpoints.small_files import check_small_files
from unicluster.errors import InputError
from unicluster.units import format_bytes
from unicluster.v1.node_pb2 import InspectRequest, LoadProgress, ModelLayout, StageSpec

log = logging.getLogger(__name__)

# transformers needs both to load a tokenizer.
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
NORMAL = int(TokenType.NORMAL)
# Of a vocabulary: some tokens are written otherwise when a model is converted.
MOST_OTHERS = 1 / 100


class GgmlEngine:
    """Engine over GGUFs, whose weights stay as they are in the file."""

    name = "ggml"
    head_makes_logits = False
    can_draft = False

    def inspect(self, checkpoint: Checkpoint, request: InspectRequest) -> ModelLayout:
        if request.kv_bits:
            raise InputError("--kv-bits: not for a GGUF; its caches are float16")
        if request.quant:
            raise InputError(f"--quant {request.quant}: the weights of a GGUF stay as they are")
        check_small_files(checkpoint.root, checkpoint.manifest.small)
        return inspect(checkpoint, request.context, request.users or 1)

    def ranges(self, checkpoint: Checkpoint, spec: StageSpec) -> Mapping[str, Ranges]:
        wanted = open_gguf(checkpoint).of_stage(spec.first_layer, spec.end_layer, spec.finishes)
        return {name: merged(parts) for name, parts in wanted.items()}

    def made_bytes(self, checkpoint: Checkpoint, spec: StageSpec) -> int:
        gguf, part = open_gguf(checkpoint), _part(spec)
        if _is_all(gguf, part) and is_whole(checkpoint):
            return 0
        folder = caches.stages(checkpoint.manifest.model)
        if stage_path(checkpoint, folder, part).exists():
            return 0
        return disk_bytes(gguf, part, checkpoint.root, folder)

    def load(
        self,
        checkpoint: Checkpoint,
        spec: StageSpec,
        on_progress: OnLoaded = ignore,
        *,
        prebuilt: bool = True,
    ) -> LoadedHead | LoadedStage:
        """Loads the stage; nothing is ever prebuilt, because llama.cpp computes at once."""
        first, end = spec.first_layer, spec.end_layer
        on_progress(LoadProgress(layers_total=end - first))
        gguf = open_gguf(checkpoint)
        part, folder = _part(spec), caches.stages(checkpoint.manifest.model)
        file: StageFile | None = None
        if _is_all(gguf, part) and is_whole(checkpoint):
            check_cut(gguf.header, first, end)
            whole = checkpoint.root / checkpoint.manifest.weights[0]
            loaded = load(gguf, checkpoint.root, whole, part)
        else:
            file = stage_file(gguf, checkpoint, folder, part)
            loaded = load(gguf, checkpoint.root, file, part)
        remove_others(folder, file.path if file is not None else None)
        count, size = end - first, loaded.weight_bytes
        kept = planned_bytes(gguf, part.context or DEFAULT_CONTEXT, part.users)[first:end]
        _compare(spec, size + loaded.workspace_bytes + sum(kept))
        on_progress(
            LoadProgress(layers_done=count, layers_total=count, bytes_done=size, bytes_total=size)
        )
        if loaded.front is not None:
            return LoadedHead(loaded.front, size, prebuilt=False)
        return LoadedStage(loaded.stage, size)

    def cache_settings(self, spec: StageSpec) -> str:
        """Context, users and devices decide how llama.cpp lays its caches out."""
        devices = [(share.name, share.layers) for share in spec.devices]
        of_llama = f"llama.cpp {version('llama-cpp-python')}, last {spec.finishes}"
        return f"{of_llama}, context {spec.context}, users {spec.users}, devices {devices}"

    def tokenizer(self, checkpoint: Checkpoint) -> Any:
        """Tokenizer and chat template: the repository's files, or else those in the GGUF."""
        names = checkpoint.manifest.weights
        if not names:
            raise InputError(f"{checkpoint.root}: there is no GGUF in it")
        file = checkpoint.root / names[0]
        header = read_header(file)
        if TOKENIZER_FILES - checkpoint.manifest.files.keys():
            return tokenizer_of(file, header)
        ends = _end_tokens(checkpoint, header)
        tokenizer = load_tokenizer(checkpoint.root, eos_token_ids=ends)
        if not _is_same_vocabulary(tokenizer, header):
            log.warning(
                "%s: the tokenizer beside it is of another vocabulary, so its own is used", file
            )
            return tokenizer_of(file, header)
        template = header.get(TEMPLATE)
        if tokenizer.has_chat_template or template is None:
            return tokenizer
        # At once, because the template says how tools and reasoning are marked.
        return load_tokenizer(checkpoint.root, {"chat_template": template}, eos_token_ids=ends)


def _compare(spec: StageSpec, nbytes: int) -> None:
    """Warns where a stage takes more than the plan counted."""
    if 0 < spec.memory < nbytes:
        log.warning(
            "layers %d to %d take %s, and %s were planned",
            *(spec.first_layer, spec.end_layer - 1),
            *(format_bytes(nbytes), format_bytes(spec.memory)),
        )


def _part(spec: StageSpec) -> Part:
    devices = tuple((share.name, share.layers) for share in spec.devices)
    layers = spec.first_layer, spec.end_layer
    return Part(*layers, spec.finishes, spec.context, spec.users, devices)


def _is_all(gguf: Gguf, part: Part) -> bool:
    return part.first == 0 and part.end == gguf.layers


def _is_same_vocabulary(tokenizer: Any, header: Header) -> bool:
    """Whether a tokenizer has the tokens of a GGUF at their numbers, but for special ones, which
    may be written otherwise, and rows of padding.
    """
    tokens = header.get("tokenizer.ggml.tokens", [])
    types = header.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    normal = [n for n, kind in zip(range(len(tokens)), types, strict=False) if kind == NORMAL]
    known = tokenizer.convert_ids_to_tokens([n for n in normal if n < len(tokenizer)])
    pairs = zip(normal, known, strict=False)
    wrong = sum(tokens[number] != token for number, token in pairs) + len(normal) - len(known)
    return len(tokenizer) <= len(tokens) and wrong <= len(normal) * MOST_OTHERS


def _end_tokens(checkpoint: Checkpoint, header: Header) -> set[int]:
    """Tokens that end an answer, besides those that the tokenizer names."""
    ends = {header.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    if "config.json" in checkpoint.manifest.files:
        stated = load_config(checkpoint.root).get("eos_token_id")
        ends |= set(stated) if isinstance(stated, list) else {stated}
    return {int(token) for token in ends if token is not None}
