import io
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from google.protobuf.message import Message
from google.protobuf.proto import serialize_length_prefixed
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList, make_prompt_cache

from node.engines.mlx_layout import inspect
from node.mlx.lazy import load_lazy
from tests.support.deadlines import scaled
from tests.support.tiny import ARCHITECTURES, tiny_config, write_model
from unicluster.checkpoints.fingerprint import whole_directory
from unicluster.errors import InputError
from unicluster.v1.node_pb2 import InspectRequest


@pytest.fixture(scope="module", params=ARCHITECTURES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp(request.param), tiny_config(request.param))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("moe"), tiny_config("qwen3_moe"))


def stored(path: Path) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    for file in path.glob("model*.safetensors"):
        weights |= mx.load(str(file))  # type: ignore[arg-type]
    return weights


def test_layers_and_head_sum_to_what_is_stored(path: Path) -> None:
    layout = inspect(whole_directory(path))

    assert sum(layout.layer_bytes) + layout.head_bytes == sum(
        w.nbytes for w in stored(path).values()
    )
    assert len(layout.layer_bytes) == 6
    assert layout.quant == "float32"


def test_each_layer_is_what_is_stored_of_it(path: Path) -> None:
    layers = [
        sum(weight.nbytes for name, weight in stored(path).items() if f"layers.{index}." in name)
        for index in range(6)
    ]

    assert list(inspect(whole_directory(path)).layer_bytes) == layers


def test_quantized_sizes_are_those_of_the_quantized_arrays(path: Path) -> None:
    model = load_lazy(path, "q4").model
    arrays = [array for _, array in tree_flatten(model.parameters())]
    mx.eval(arrays)

    layout = inspect(whole_directory(path), "q4")

    assert layout.quant == "q4"
    assert sum(layout.layer_bytes) + layout.head_bytes == sum(array.nbytes for array in arrays)
    assert sum(layout.layer_bytes) < sum(inspect(whole_directory(path)).layer_bytes) / 2


def filled_kv_bytes(path: Path, context: int, users: int) -> list[int]:
    """Bytes of each layer's cache after that many tokens went through the model, evaluated."""
    model = load_lazy(path).model
    cache = make_prompt_cache(model)
    prompt = mx.zeros((users, context - 1), mx.int32)
    for tokens in (prompt, prompt[:, :1]):
        model(tokens, cache=cache)
        mx.eval([entry.state for entry in cache])
    return [sum(array.nbytes for array in held(entry)) for entry in cache]


def held(cache: object) -> list[mx.array]:
    """The arrays a cache keeps, room for more tokens included."""
    if isinstance(cache, CacheList):
        return [array for member in cache.caches for array in held(member)]
    return [value for value in vars(cache).values() if isinstance(value, mx.array)]


@pytest.mark.parametrize(("context", "users"), [(300, 1), (40, 3), (2, 1), (17, 2)])
def test_kv_bytes_are_those_of_filled_caches(path: Path, context: int, users: int) -> None:
    layout = inspect(whole_directory(path), context=context, users=users)

    assert list(layout.kv_bytes_per_layer) == filled_kv_bytes(path, context, users)


def test_a_sliding_window_bounds_the_kv_bytes(tmp_path: Path) -> None:
    path = write_model(tmp_path, tiny_config("gemma3"))

    short, long = (inspect(whole_directory(path), context=context) for context in (512, 4096))

    grown = [b / a for a, b in zip(short.kv_bytes_per_layer, long.kv_bytes_per_layer, strict=True)]
    assert grown == [1, 1, 8, 1, 1, 8]  # every third layer sees all tokens


def test_of_a_mixture_only_the_chosen_experts_are_active(moe: Path) -> None:
    layout = inspect(whole_directory(moe))

    expert = 3 * 32 * 64 * 4  # gate, up and down, 32 wide on a hidden size of 64, float32
    idle = [
        size - active
        for size, active in zip(layout.layer_bytes, layout.layer_active_bytes, strict=True)
    ]
    assert idle == [2 * expert] * 6  # two of four are chosen


def test_dense_layers_of_a_mixture_are_active_as_a_whole(tmp_path: Path) -> None:
    path = write_model(tmp_path, tiny_config("deepseek_v3"))

    layout = inspect(whole_directory(path))

    assert layout.layer_active_bytes[0] == layout.layer_bytes[0]
    assert all(
        active < size
        for active, size in zip(layout.layer_active_bytes[1:], layout.layer_bytes[1:], strict=True)
    )


def test_quantized_experts_are_idle_too(moe: Path) -> None:
    whole, small = inspect(whole_directory(moe)), inspect(whole_directory(moe), "q4")

    for layout in (whole, small):
        idle = layout.layer_bytes[0] - layout.layer_active_bytes[0]
        assert 0 < idle < layout.layer_bytes[0]
    assert small.layer_active_bytes[0] < whole.layer_active_bytes[0]


def test_the_hidden_state_on_the_wire(path: Path) -> None:
    assert inspect(whole_directory(path)).hidden_bytes == 64 * 4


def test_the_context_is_the_models_own_unless_asked(tmp_path: Path) -> None:
    path = write_model(tmp_path, tiny_config("llama"))

    layout = inspect(whole_directory(path))

    assert (layout.context, layout.max_context) == (4096, 4096)


def test_a_long_context_is_not_taken_unasked(tmp_path: Path) -> None:
    config = tiny_config("llama") | {"max_position_embeddings": 1_000_000}
    path = write_model(tmp_path, config)

    assert inspect(whole_directory(path)).context == 8192
    assert inspect(whole_directory(path), context=100_000).context == 100_000


def test_more_context_than_the_model_is_made_for_is_refused(moe: Path) -> None:
    with pytest.raises(InputError, match=r"context: 4097 tokens, and .* is made for at most 4096"):
        inspect(whole_directory(moe), context=4097)


def test_inspecting_reads_and_computes_nothing(moe: Path) -> None:
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()

    layout = inspect(whole_directory(moe), "q4", context=4096, users=1000)

    assert layout.layer_bytes[0] > 2**14
    assert mx.get_peak_memory() - before < 2**12


def delimited(message: Message) -> bytes:
    stream = io.BytesIO()
    serialize_length_prefixed(message, stream)
    return stream.getvalue()


def run(request: InspectRequest) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-m", "node.inspect"],
        input=delimited(request),
        capture_output=True,
        timeout=scaled(60),
    )


def test_as_a_program(moe: Path) -> None:
    ran = run(InspectRequest(model=str(moe), quant="q4", context=64, users=2))

    assert (ran.returncode, ran.stderr) == (0, b"")
    assert ran.stdout == delimited(inspect(whole_directory(moe), "q4", 64, 2))


def test_as_a_program_it_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    ran = run(InspectRequest(model=str(tmp_path)))

    assert (ran.returncode, ran.stdout) == (InputError.exit_code, b"")
    assert (
        ran.stderr.decode() == f"{tmp_path}: no config.json in it, so this is no model directory\n"
    )
