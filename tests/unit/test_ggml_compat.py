"""Contracts with what is not public of llama.cpp and llama-cpp-python: see node/ggml/library.py."""

import ctypes

import psutil
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

pytest.importorskip("llama_cpp")

from node.ggml import library, repeated
from unicluster.checkpoints.gguf import TYPES


def test_llama_cpps_libraries_lie_in_one_folder() -> None:
    piece = "llama_cpp.llama_cpp._lib._name no longer leads to the folder of libllama"
    assert any(library.library_folder().glob("*llama.*")), piece
    assert library.shared_library("ggml-base").ggml_type_size, piece
    assert library.shared_library("ggml").ggml_backend_dev_count, piece


def test_the_layout_of_a_tensor() -> None:
    base = library.shared_library("ggml-base")
    base.ggml_init.restype = base.ggml_new_tensor_2d.restype = ctypes.c_void_p
    base.ggml_get_name.restype = ctypes.c_char_p

    class Parameters(ctypes.Structure):
        _fields_ = (("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no", ctypes.c_bool))

    context = ctypes.c_void_p(base.ggml_init(Parameters(1 << 20, None, False)))
    try:
        sizes = ctypes.c_int64(7), ctypes.c_int64(3)
        tensor = base.ggml_new_tensor_2d(context, library.F32, *sizes)
        base.ggml_set_name(ctypes.c_void_p(tensor), b"l_out-3")

        piece = "struct ggml_tensor is laid out otherwise than library.Tensor"
        assert library.tensor_name(tensor) == b"l_out-3", piece
        assert library.tensor_elements(tensor) == 7 * 3, piece
        assert library.tensor_sources(tensor) == [], piece
        assert library.Tensor.from_address(tensor).type == library.F32, piece
        assert ctypes.sizeof(library.Tensor) <= int(base.ggml_tensor_overhead()), piece
    finally:
        base.ggml_free(context)


def test_the_layout_of_a_type() -> None:
    assert library.to_floats(b"\0\x3c\0\xc0", library.F16, 2).tolist() == [1, -2], (
        "struct ggml_type_traits is laid out otherwise than library._TypeTraits"
    )


# Of Q8_1, which is never in a file, the gguf package has the size of long ago.
@pytest.mark.parametrize("kind", sorted(GGML_QUANT_SIZES.keys() - {GGMLQuantizationType.Q8_1}))
def test_llama_cpp_and_the_gguf_package_agree_on_a_type(kind: GGMLQuantizationType) -> None:
    base = library.shared_library("ggml-base")
    base.ggml_type_size.restype = ctypes.c_size_t
    base.ggml_blck_size.restype = ctypes.c_int64
    _, block, block_bytes = TYPES[int(kind)]
    assert (base.ggml_blck_size(int(kind)), base.ggml_type_size(int(kind))) == (block, block_bytes)


def test_the_layout_of_a_device() -> None:
    piece = "struct ggml_backend_dev_props is laid out otherwise than library._DeviceProperties"
    (cpu,) = [device for device in library.devices() if device.kind == "cpu"]

    assert (cpu.name, cpu.pci) == ("CPU", ""), piece
    assert cpu.description, piece
    assert 0 < cpu.free <= cpu.total, piece
    assert abs(cpu.total - psutil.virtual_memory().total) < 0.1 * cpu.total, piece


def test_nodes_of_a_graph_are_marked_to_be_computed() -> None:
    base = library.shared_library("ggml-base")
    base.ggml_new_tensor_1d.restype = base.ggml_sqr.restype = ctypes.c_void_p
    memory = repeated._base().ggml_init(repeated._Memory(1 << 20, None, False))
    try:
        source = base.ggml_new_tensor_1d(ctypes.c_void_p(memory), library.F32, ctypes.c_int64(4))
        node = base.ggml_sqr(ctypes.c_void_p(memory), ctypes.c_void_p(source))
        graph = repeated._base().ggml_new_graph_custom(memory, 16, False)

        before = library.Tensor.from_address(node).flags
        repeated._base().ggml_build_forward_expand(graph, node)
        after = library.Tensor.from_address(node).flags
    finally:
        repeated._base().ggml_free(memory)

    assert (before, after) == (0, repeated.COMPUTE), "GGML_TENSOR_FLAG_COMPUTE has another value"
