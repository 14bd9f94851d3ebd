"""Quantized KV caches: mlx-lm's tokens, in fewer bytes, on all stages."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from node.engines.mlx_layout import inspect
from node.generation.engine import GenerationEngine
from node.speculation.drafting import Lookup, Speculation
from tests.support import zoo
from tests.support.engines import THREAD, Completion, Split, ask, listen, of_tokens, until
from tests.support.tiny import EOS, VOCAB, tiny_config, write_model
from unicluster.checkpoints.fingerprint import whole_directory
from unicluster.errors import InputError

PROMPTS = [[(7 * i * i + 3 * k) % 200 + 1 for i in range(20 * k + 1)] for k in range(4)]
STEP = 16  # tokens of a chunk: mlx-lm quantizes after the first
KV_BYTES = 50_000_000


def configuration(model_type: str) -> dict[str, Any]:
    """Heads of 64, or of 32 which is no multiple of mlx-lm's group size."""
    if model_type == "llama":
        return tiny_config("llama") | {"head_dim": 64}
    config = zoo.config(model_type)
    fields = {"vocab_size": VOCAB, "eos_token_id": EOS, "hidden_size": 128, "block_dim": 128}
    return config | fields | {"head_dim": 32, "torch_dtype": "float32"}


@pytest.fixture(scope="module", params=["llama", "lfm2"])
def split(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Split]:
    folder = tmp_path_factory.mktemp("models")
    path = write_model(folder / request.param, configuration(request.param))
    split = asyncio.run(Split.open(path))
    with split.model:
        yield split


def options(split: Split, bits: int) -> dict[str, Any]:
    """Options of mlx-lm's functions for KV caches of `bits`."""
    group = 64 if split.name == "llama" else 32
    return {"kv_bits": bits, "kv_group_size": group, "quantized_kv_start": 0}


async def hear(engine: GenerationEngine, prompt: list[int]) -> Completion:
    return await listen(await engine.submit(of_tokens(prompt)))


@pytest.mark.parametrize("bits", [4, 8])
async def test_answers_are_those_of_mlx_lm_with_the_same_bits(split: Split, bits: int) -> None:
    engine = await split.engine(users=2, kv_bits=bits, prefill_step=STEP)

    answers = await asyncio.gather(*(ask(engine, prompt) for prompt in PROMPTS))

    engine.close()
    asked = options(split, bits) | {"prefill_step_size": STEP}
    assert answers == [(await split.whole.alone(prompt, **asked)).tokens for prompt in PROMPTS]
    await split.until_free()


async def test_guessing_ahead_goes_with_it(split: Split) -> None:
    plain = await split.engine(kv_bits=8, users=1)
    alone = [await ask(plain, prompt) for prompt in PROMPTS]
    plain.close()
    engine = await split.engine(kv_bits=8, users=1, speculation=Speculation(Lookup, 6))

    assert [await ask(engine, prompt) for prompt in PROMPTS] == alone

    engine.close()


async def weighed(engine: GenerationEngine) -> int:
    """Bytes of what is kept, once the stages have said so; taken for all there is until then."""
    await until(lambda: 0 < engine.describe().kept_bytes < KV_BYTES)
    return engine.describe().kept_bytes


@pytest.mark.sweep
async def test_kept_caches_are_as_small(split: Split) -> None:
    sizes = []
    for bits in (0, 8, 4):
        engine = await split.engine(kv_bits=bits, kv_bytes=KV_BYTES, users=1)
        first = await hear(engine, PROMPTS[3])
        sizes.append(await weighed(engine))
        second = await hear(engine, [*PROMPTS[3], *first.tokens, *PROMPTS[1]])
        assert second.finish is not None
        assert second.finish.usage.cached_tokens >= len(PROMPTS[3])
        engine.close()

    plain, eight, four = sizes
    assert four < eight < plain


async def test_mlx_lm_s_own_functions_quantize_caches_on_the_stages(split: Split) -> None:
    def generate(model: Any) -> str:
        return mlx_lm.generate(
            model, split.tokenizer, PROMPTS[1], max_tokens=12, **options(split, 8)
        )

    over_stages = await THREAD.run(lambda: generate(split.model))

    assert over_stages == await THREAD.run(lambda: generate(split.whole.model))


# What a plan counts


def test_a_layout_counts_fewer_bytes(tmp_path: Path) -> None:
    checkpoint = whole_directory(write_model(tmp_path / "it", configuration("llama")))

    plain, eight, four = (
        inspect(checkpoint, context=1024, kv_bits=bits).kv_bytes_per_layer for bits in (0, 8, 4)
    )

    # Of float32, with two float32 more for each group of 64 numbers.
    assert [eight[0] / plain[0], four[0] / plain[0]] == [(8 + 1) / 32, (4 + 1) / 32]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tiny_config("gemma3"), "it has sliding windows, which mlx-lm can't quantize"),
        (zoo.config("rwkv7"), "it has no KV caches that mlx-lm can quantize"),
        (zoo.config("llama4"), "it can't use quantized KV caches: "),
        (tiny_config("llama"), "it can't use quantized KV caches: "),  # heads of 16
    ],
)
def test_what_cannot_be_quantized_is_refused(
    tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    checkpoint = whole_directory(write_model(tmp_path / "it", config))

    with pytest.raises(InputError, match=f"^--kv-bits 8: .*{reason}") as raised:
        inspect(checkpoint, kv_bits=8, context=64)
    assert "\n" not in str(raised.value)
