"""A graph of llama.cpp's computed again, without a question about each of its tensors.

llama.cpp keeps the graph of a step for the next one of the same shape. Whoever wants a tensor from
the midst of it is asked about each, hundreds of times a token, in Python. So once a graph's nodes
are known, a backend of our own computes them: the same nodes in the same order, thus the same
numbers.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

from node.ggml.library import MAX_SRC, Tensor, device_count, llama, shared_library

# ggml.h: GGML_TENSOR_FLAG_COMPUTE, without which a node is skipped.
COMPUTE = 16
# ggml-backend.h: GGML_BACKEND_DEVICE_TYPE_CPU.
CPU = 0


class _Memory(ctypes.Structure):
    """struct ggml_init_params of ggml.h."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


@functools.cache
def _base() -> Any:
    library = shared_library("ggml-base")
    pointer, size, flag = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_bool
    for name, result, arguments in (
        ("ggml_init", pointer, [_Memory]),
        ("ggml_free", None, [pointer]),
        ("ggml_graph_overhead_custom", size, [size, flag]),
        ("ggml_new_graph_custom", pointer, [pointer, size, flag]),
        ("ggml_build_forward_expand", None, [pointer, pointer]),
        ("ggml_nbytes", size, [pointer]),
        ("ggml_backend_graph_compute", ctypes.c_int, [pointer, pointer]),
        ("ggml_backend_free", None, [pointer]),
        ("ggml_backend_get_device", pointer, [pointer]),
        ("ggml_backend_dev_backend_reg", pointer, [pointer]),
        ("ggml_backend_reg_get_proc_address", pointer, [pointer, ctypes.c_char_p]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def can_repeat() -> bool:
    """Whether llama.cpp computes all of a graph's nodes with one backend, that of the CPU."""
    return device_count() == 1


class Backend:
    """A backend of the CPU, beside that of llama.cpp."""

    def __init__(self) -> None:
        llama()
        make = shared_library("ggml").ggml_backend_init_by_type
        make.restype, make.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_char_p]
        self._backend = make(CPU, None)
        base = _base()
        registry = base.ggml_backend_dev_backend_reg(base.ggml_backend_get_device(self._backend))
        setter = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        self._set_threads = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(setter)

    def set_threads(self, threads: int) -> None:
        self._set_threads(self._backend, threads)

    def compute(self, graph: int) -> int:
        """ggml's status: 0 where all went well."""
        return int(_base().ggml_backend_graph_compute(self._backend, graph))

    def close(self) -> None:
        _base().ggml_backend_free(self._backend)


class Repeated:
    """All nodes of a graph that llama.cpp keeps, by their addresses, in its order.

    entries: so many of the first nodes come before new contents are put into the last of them; 0:
    nothing is put in. It is of use as long as llama.cpp's graph is.
    """

    def __init__(self, nodes: Sequence[int], entries: int) -> None:
        base = _base()
        # Room for each node and all of its sources.
        room = (MAX_SRC + 1) * len(nodes)
        size = base.ggml_graph_overhead_custom(room, False)
        self._memory = base.ggml_init(_Memory((2 if entries else 1) * size, None, True))
        self._first = self._graph(room, nodes[:entries]) if entries else 0
        self._all = self._graph(room, nodes)
        self._entries = list(map(Tensor.from_address, nodes[:entries]))

    def compute(self, backend: Backend, put: Callable[[], None]) -> int:
        """Computes all nodes, and calls `put` when its time has come. Returns ggml's status."""
        if not self._first:
            return backend.compute(self._all)
        if status := backend.compute(self._first):
            return status
        put()
        flags = [node.flags for node in self._entries]
        for node in self._entries:
            node.flags &= ~COMPUTE
        status = backend.compute(self._all)
        for node, before in zip(self._entries, flags, strict=True):
            node.flags = before
        return status

    def close(self) -> None:
        _base().ggml_free(self._memory)

    def _graph(self, room: int, nodes: Sequence[int]) -> int:
        base = _base()
        graph = int(base.ggml_new_graph_custom(self._memory, room, False))
        for node in nodes:
            # A node's sources come before it, so that one at a time keeps the order.
            if Tensor.from_address(node).flags & COMPUTE:
                base.ggml_build_forward_expand(graph, node)
        return graph


def overwrites_itself(address: int) -> bool:
    """Whether a node, computed twice, would be computed of its own result."""
    node = Tensor.from_address(address)
    if node.view_src:
        return True
    begin = node.data or 0
    end = begin + _base().ggml_nbytes(address)
    for source in node.src:
        if source:
            at = Tensor.from_address(source).data or 0
            if at < end and begin < at + _base().ggml_nbytes(source):
                return True
    return False
