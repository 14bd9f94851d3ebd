"""Tiny random GGUFs of every architecture: cut, they give the whole one's logits, bit for bit."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

from node.ggml.cutting.architectures import KNOWN, NOT_CAUSAL, REFUSED
from node.ggml.cutting.kinds import check_cut, forbidden_cuts, why_uncut
from node.ggml.layout import cache_bytes
from node.ggml.load import open_gguf
from tests.support.any_gguf import SPECS, Spec, derived, save_random
from tests.support.ggml_stages import CHUNKS, TOKENS, Tiny, make, same, through, unsplit
from tests.support.gguf_variants import SHORT, VARIANTS
from unicluster.checkpoints.fingerprint import whole
from unicluster.errors import StageError
from unicluster.v1.stage_pb2 import CacheOp

# They come in the order of a batch, and at other places: the sums of tiny random models with
# large logits differ by so much.
NEAR = 1e-3
KV_LINE = r"(?:llama_kv_cache|llama_memory_recurrent|llama_dsv4\w*): (?:.*layers = \d+, )?size ="


def tiny(folder: Path, architecture: str, spec: Spec | None = None) -> Tiny:
    file = folder / f"{architecture}.gguf"
    save_random(file, derived(folder, architecture, spec))
    return Tiny(file, open_gguf(whole(file)), folder)


def allowed(model: Tiny) -> list[int]:
    return sorted(set(range(1, model.gguf.layers)) - set(forbidden_cuts(model.gguf.header)))


def fits(model: Tiny, bounds: tuple[int, ...]) -> bool:
    """Whether no stage has a number of layers that llama.cpp takes for another model's."""
    try:
        for first, end in pairwise(bounds):
            check_cut(model.gguf.header, first, end)
    except StageError:
        return False
    return True


def check(model: Tiny, bounds: tuple[int, ...], wanted: list[Any]) -> None:
    hops, ops = model.stages(*bounds), [make()]
    for chunk, logits in zip(CHUNKS, wanted, strict=True):
        got = through(hops, [chunk], 1, *ops)[0]
        ops = []
        assert np.isfinite(got).all()
        assert same(got, logits), f"cut {bounds}, {len(chunk)} tokens"
    for hop in hops:
        hop.stage.close()


@pytest.mark.parametrize("architecture", sorted(SPECS))
def test_a_cut_model_gives_the_logits_of_the_whole(tmp_path: Path, architecture: str) -> None:
    model = tiny(tmp_path, architecture)
    (wanted,) = unsplit(model.file, [CHUNKS])
    cuts = allowed(model)
    middle = cuts[len(cuts) // 2 : len(cuts) // 2 + 1]
    assert bool(cuts) != bool(why_uncut(model.gguf.header))

    check(model, (0, *middle, model.gguf.layers), wanted)


@pytest.mark.parametrize("variant", SHORT)
def test_a_variant_cut_gives_the_logits_of_the_whole(tmp_path: Path, variant: str) -> None:
    model = tiny(tmp_path, *VARIANTS[variant])
    (wanted,) = unsplit(model.file, [CHUNKS])
    cuts = allowed(model)

    check(model, (0, cuts[len(cuts) // 2], model.gguf.layers), wanted)


@pytest.mark.sweep
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_at_the_first_the_last_and_all_cuts(tmp_path: Path, variant: str) -> None:
    model = tiny(tmp_path, *VARIANTS[variant])
    (wanted,) = unsplit(model.file, [CHUNKS])
    cuts, count = allowed(model), model.gguf.layers
    assert cuts

    for bounds in ((0, cuts[0], count), (0, cuts[-1], count), (0, *cuts, count), (0, count)):
        assert fits(model, bounds)
        check(model, bounds, wanted)


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", sorted(SPECS))
def test_every_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture, architecture: str) -> None:
    model = tiny(tmp_path, architecture)
    (wanted,) = unsplit(model.file, [CHUNKS])
    cuts, count = allowed(model), model.gguf.layers
    every = [(0, cut, count) for cut in cuts] + [(0, *cuts, count), (0, count)]

    for bounds in every:
        if fits(model, bounds):
            check(model, bounds, wanted)

    caplog.set_level("DEBUG", "unicluster.llama")
    caplog.clear()
    model.stages(0, count)
    said = [float(size) for size in re.findall(rf"{KV_LINE} +([\d.]+) MiB", caplog.text)]
    counted = sum(cache_bytes(model.gguf, 256, 2)) / 2**20
    assert counted == pytest.approx(sum(said), abs=0.011 * len(said))  # said with two digits


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", sorted(SPECS))
def test_sequences_of_unequal_length(tmp_path: Path, architecture: str) -> None:
    model = tiny(tmp_path, architecture)
    rows = [TOKENS[:9], TOKENS[20:37], TOKENS[5:10]]
    decoded = [[TOKENS[i + step] for i in range(3)] for step in range(4)]
    alone = unsplit(
        model.file, [[row, *([step[i]] for step in decoded)] for i, row in enumerate(rows)]
    )
    cuts = [cut for cut in allowed(model) if fits(model, (0, cut, model.gguf.layers))]
    hops = model.stages(0, *cuts[:1], model.gguf.layers, users=4)
    for number, row in enumerate(rows, start=1):
        through(hops, [row], number, make(number))

    ops = [CacheOp(cache=9, merge=CacheOp.Merge(sources=[1, 2, 3]))]
    for step, tokens in enumerate(decoded, start=1):
        got = through(hops, [[token] for token in tokens], 9, *ops)
        ops = []
        for i, logits in enumerate(alone):
            worst = float(np.abs(got[i] - logits[step]).max())
            assert worst <= NEAR * float(np.abs(logits[step]).max())


def test_all_that_can_be_cut_is_tried() -> None:
    cut = {name for name, rule in KNOWN.items() if not rule.uncut}

    assert cut <= SPECS.keys() <= KNOWN.keys()
    assert len(cut) >= 100
    assert not KNOWN.keys() & (NOT_CAUSAL | REFUSED.keys())
