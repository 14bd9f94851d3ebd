"""A stage needs those tensors of a checkpoint that the survey names, and no others."""

import io
import json
from collections.abc import Collection
from contextlib import redirect_stdout
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from node.mlx.crossing import forbidden_cuts, lm_head_modules
from node.mlx.hollow import HollowModel
from node.mlx.lazy import load_lazy
from node.mlx.survey import survey
from tests.support import sweep, zoo
from tests.support.sampled import sampled
from unicluster.checkpoints.safetensors import read_header
from unicluster.errors import StageError


@pytest.mark.parametrize("name", sampled(zoo.names(), sweep.representatives()))
def test_a_stage_reads_only_its_own_tensors(name: str, tmp_path: Path) -> None:
    """All other tensors of the file are made NaN before each stage is loaded.

    The last stage is tried as one that makes the logits too, where it can.
    """
    file = write_checkpoint(name, tmp_path)
    try:
        surveyed = survey(tmp_path)
    except StageError as error:
        pytest.skip(str(error))
    count = len(surveyed.layers)
    cuts = [cut for cut in range(1, count) if cut not in forbidden_cuts(surveyed.dataflow)]
    wanted = logits(load_lazy(tmp_path).model)
    content = file.read_bytes()

    def load(first: int, end: int, has_lm_head: bool) -> HollowModel:
        file.write_bytes(content)
        spoil(file, surveyed.of_stage(first, end, has_lm_head))
        lazy = load_lazy(tmp_path)
        stage = HollowModel(lazy.model, lazy.model_type, first, end, has_lm_head=has_lm_head)
        mx.eval([layer.parameters() for layer in stage.layers], lazy.model.parameters())
        return stage

    cut = cuts[len(cuts) // 2]
    head = load(0, cut, False)
    for has_lm_head in (False, True)[: 1 if lm_head_modules(surveyed.dataflow) is None else 2]:
        computed = sweep.run_stages([head, load(cut, count, has_lm_head)])

        assert all(mx.array_equal(one, other) for one, other in zip(computed, wanted, strict=True))
        assert len(computed) == len(wanted)


def write_checkpoint(name: str, folder: Path) -> Path:
    """The tiny model as mlx-lm would store it; skips what mlx-lm can't run here."""
    try:
        with redirect_stdout(io.StringIO()):
            if not zoo.is_model(name):
                pytest.skip("what models share, no model")
            model = zoo.build(name)
            logits(model)
    except (Exception, SystemExit) as error:
        pytest.skip(f"mlx-lm can't run it here: {error}")
    (folder / "config.json").write_text(json.dumps(zoo.config(name)))
    file = folder / "model.safetensors"
    mx.save_safetensors(str(file), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    return file


def logits(model: nn.Module) -> list[mx.array]:
    cache = make_prompt_cache(model)
    computed = []
    for chunk in sweep.CHUNKS:
        computed.append(model(chunk, cache=cache))
        mx.eval(computed[-1])
    return computed


def spoil(file: Path, kept: Collection[str]) -> None:
    """All ones are NaN in every float format."""
    tensors = read_header(file).tensors
    assert set(kept) <= tensors.keys()
    with file.open("r+b") as stream:
        for name in tensors.keys() - set(kept):
            first, end = tensors[name]
            stream.seek(first)
            stream.write(b"\xff" * (end - first))
