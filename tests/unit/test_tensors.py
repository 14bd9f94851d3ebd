from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from node.mlx.tensors import decode_array, decode_tree
from node.ring.bounds import FrameError
from node.ring.leaves import ITEM_BYTES
from tests.support.wire import over_the_wire
from unicluster.v1.tensor_pb2 import Leaf, Tensor

BITS = np.arange(64, dtype=np.uint8)  # as any dtype: 16 values of 4 bytes, 8 of 8, ...

DTYPES = [
    *(mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.int8, mx.int16, mx.int32, mx.int64),
    *(mx.float16, mx.bfloat16, mx.float32, mx.complex64),
]


def bits_of(array: mx.array) -> bytes:
    return np.array(array.view(mx.uint8)).tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_array_comes_back_bit_for_bit(dtype: mx.Dtype) -> None:
    array = mx.array(BITS).view(dtype).reshape(2, -1)

    back = over_the_wire(array)

    assert (back.dtype, back.shape, bits_of(back)) == (dtype, array.shape, BITS.tobytes())


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_what_is_no_number_keeps_its_bits(dtype: mx.Dtype) -> None:
    array = mx.array([float("nan"), float("inf"), float("-inf"), -0.0, 1e-40], dtype)

    assert bits_of(over_the_wire(array)) == bits_of(array)


def test_bools() -> None:
    array = mx.array([[True, False, True]])

    back = over_the_wire(array)

    assert back.dtype == mx.bool_
    assert back.tolist() == array.tolist()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize(
    "seen",
    [
        lambda a: a.T,
        lambda a: a[:, ::2],
        lambda a: a[1:, 3:],
        lambda a: mx.broadcast_to(a, (2, 4, 8)),
    ],
    ids=["transposed", "strided", "sliced", "broadcast"],
)
def test_an_array_that_is_a_view_travels_in_row_major_order(seen: Any, dtype: mx.Dtype) -> None:
    view = seen(mx.arange(32).astype(dtype).reshape(4, 8))

    assert over_the_wire(view).tolist() == view.tolist()


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1, 1)])
def test_empty_and_scalar_shapes_survive(shape: tuple[int, ...]) -> None:
    assert over_the_wire(mx.zeros(shape)).shape == shape


def test_a_bare_array_is_a_tree() -> None:
    back = over_the_wire(mx.array([1, 2, 3]))

    assert back.tolist() == [1, 2, 3]


def test_a_tree_comes_back_with_lists_for_tuples() -> None:
    tree = {"hidden": mx.ones((1, 2)), "rest": (mx.zeros(3), [7, 0.5, "x", None, True])}

    back = over_the_wire(tree)

    assert back["hidden"].tolist() == [[1, 1]]
    assert back["rest"][0].tolist() == [0, 0, 0]
    assert back["rest"][1] == [7, 0.5, "x", None, True]


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        (Tensor(dtype="float8", shape=[1], data=b"x"), "unknown dtype 'float8'"),
        (Tensor(dtype="float32", shape=[3], data=bytes(8)), "reshape"),
        (Tensor(dtype="float32", shape=[1], data=bytes(3)), "multiple of element size"),
    ],
    ids=["dtype", "shape", "length"],
)
def test_what_does_not_add_up_is_refused(tensor: Tensor, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        decode_array(tensor)


ABSURD = {
    "a list of a thousand million": [Leaf(key="999999999", json="1")],
    "an index that only Python takes for one": [Leaf(key="1_000_000_000", json="1")],
    "an index with a sign": [Leaf(key="+999999999", json="1")],
    "a list with one member of two": [Leaf(key="a.0", json="1"), Leaf(key="a.5", json="1")],
    "a deep tree": [Leaf(key=".".join("a" * 1000), json="1")],
    "a long name": [Leaf(key="a" * 1_000_000, json="1")],
    "many dimensions": [Leaf(tensor=Tensor(dtype="uint8", shape=[1] * 200_000, data=b"x"))],
    "more numbers than bytes": [Leaf(tensor=Tensor(dtype="uint8", shape=[2**40], data=b"x"))],
    "an unknown dtype": [Leaf(tensor=Tensor(dtype="float8", shape=[1], data=b"x"))],
    "a long number": [Leaf(json="1" * 1000)],
    "a deep value": [Leaf(json="[" * 200)],
}


@pytest.mark.parametrize("leaves", ABSURD.values(), ids=ABSURD)
def test_an_absurd_tree_is_refused_before_it_is_built(leaves: list[Leaf]) -> None:
    with pytest.raises(FrameError):
        decode_tree(leaves)


KEYS = st.text("0129a_.-+ \u0663", max_size=12)
SHAPES = st.lists(st.integers(-2, 2**40) | st.integers(0, 3), max_size=12)
VALUES = st.text('0123456789.eE+-[]{}"ntrufalse', max_size=300)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.builds(Leaf, key=KEYS, json=VALUES)
        | st.builds(
            Leaf,
            key=KEYS,
            tensor=st.builds(
                Tensor,
                dtype=st.sampled_from([*ITEM_BYTES, "", "float8"]),
                shape=SHAPES,
                data=st.binary(max_size=64),
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_leaves_are_a_tree_or_refused(leaves: list[Leaf]) -> None:
    try:
        tree = decode_tree(leaves)
    except (FrameError, ValueError):
        return
    assert len(tree_flatten(tree)) <= 4 * len(leaves)
