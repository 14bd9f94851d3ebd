"""Puts hidden states into llama.cpp's computation, and takes a layer's result out of it.

llama.cpp asks a callback of every tensor whether it is wanted, some 20 times a layer: of a graph
that it computes again, only of the first one (node/ggml/repeated.py).
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from node.ggml.library import Floats, read_tensor, tensor_elements, tensor_name, write_tensor
from node.ggml.repeated import Backend, Repeated, overwrites_itself
from unicluster.errors import StageError

_Callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


class Tap:
    """Overwrites the tensor `entry`, and gets the rows of the tensor `final`.

    widths: floats of a row of each; in llama.cpp a row may have several dimensions.

    `watcher` is called with the address of every tensor before it is computed; it must not raise.
    After `final` nothing more is computed. Either name may be empty: then that is not done.
    `callback` is for llama.cpp; it must live as long as the context.
    """

    def __init__(self, entry: str, final: str, widths: tuple[int, int]) -> None:
        self.callback = _Callback(self._answer)
        self._entry, self._final = entry.encode(), final.encode()
        self._names = {name for name in (self._entry, self._final) if name}
        self._widths = widths
        self._inputs: Floats = np.empty((0, widths[0]), np.float32)
        self._into: Floats = np.empty((0, widths[1]), np.float32)
        self._put = self._got = 0
        self.watcher: Callable[[int], None] | None = None
        self._known: _Known | None = None
        self._noted: _Known | None = None  # of the present computation, if it is of one graph
        self._repeating: Repeated | None = None
        self._asked = False
        self._status = 0

    def repeat(self, reused: Callable[[], int]) -> None:
        """From now on graphs that llama.cpp computes again are computed without asking.

        reused: how many times it has done so. All of a graph must be on the CPU.
        """
        self._known = _Known(reused)

    def open(self, inputs: Floats, into: Floats, *, alone: bool = False) -> None:
        """Sets input and output arrays of the next computation.

        alone: it is of one graph.
        """
        self._inputs, self._into = inputs, into
        self._put = self._got = self._status = 0
        self._asked, self._repeating = False, None
        self._noted = self._known if alone else None
        if self._known is not None and not alone:
            self._known.forget()

    def check(self) -> None:
        """Raises StageError unless all rows went in and came out."""
        if self._status:
            raise StageError(f"llama.cpp failed to compute a graph (status {self._status})")
        both = (self._entry, self._put, self._inputs), (self._final, self._got, self._into)
        for name, rows, array in both:
            wanted = len(array)
            if name and rows != wanted:
                raise StageError(
                    f"llama.cpp had {rows} of {wanted} rows of {name.decode()}: this version "
                    "builds the model otherwise than those known here"
                )
        if self._noted is not None:
            self._noted.complete()

    def set_threads(self, threads: int) -> None:
        """Sets the number of threads with which repeated graphs are computed."""
        if self._known is not None:
            self._known.backend.set_threads(threads)

    def close(self) -> None:
        """Frees everything. It is of no use afterwards."""
        if self._known is not None:
            self._known.close()

    def _answer(self, address: int, ask: bool, _data: Any) -> bool:
        """Whether a tensor is wanted; and once it is computed, whether to go on."""
        # An exception would be lost in a callback: the counts tell.
        if ask and not self._asked:
            self._asked = True
            self._repeating = self._noted.begin(address) if self._noted is not None else None
        if self._repeating is not None:
            return self._repeat(self._repeating, ask)
        name = tensor_name(address)
        if ask:
            if self.watcher is not None:
                self.watcher(address)
            if self._noted is not None:
                self._noted.note(address, is_entry=name == self._entry)
            return name in self._names
        if name == self._entry:
            self._fill(address)
            return True
        self._take(address)
        return False

    def _repeat(self, repeating: Repeated, ask: bool) -> bool:
        """Computes all at once when llama.cpp has computed the first node, and ends it there."""
        if ask or self._noted is None:
            return True
        known = self._noted
        self._status = repeating.compute(known.backend, lambda: self._fill(known.entry))
        if self._final and not self._status:
            self._take(known.last)
        return False

    def _fill(self, address: int) -> None:
        count = tensor_elements(address)
        if at := self._place(self._inputs, self._put, count, self._widths[0]):
            write_tensor(address, at, count * 4)
            self._put += count // self._widths[0]

    def _take(self, address: int) -> None:
        count = tensor_elements(address)
        if at := self._place(self._into, self._got, count, self._widths[1]):
            read_tensor(address, at, count * 4)
            self._got += count // self._widths[1]

    def _place(self, array: Floats, row: int, count: int, width: int) -> int:
        """The address of the rows from `row` on; 0 where `count` numbers don't fit there."""
        if count % width or row + count // width > len(array):
            return 0
        return int(array.ctypes.data) + row * width * 4


class _Known:
    """The nodes of the graph that llama.cpp has computed last."""

    def __init__(self, reused: Callable[[], int]) -> None:
        self.backend = Backend()
        self._reused = reused
        self._count = 0
        self._nodes: list[int] = []
        self._entries = 0
        self._complete = self._fixed = False
        self._repeated: Repeated | None = None

    @property
    def entry(self) -> int:
        """Address of the node that gets the input."""
        return self._nodes[self._entries - 1]

    @property
    def last(self) -> int:
        """Address of the last node."""
        return self._nodes[-1]

    def begin(self, first: int) -> Repeated | None:
        """The graph that is now to be computed; None where its nodes are not known.

        first: the address of its first node.
        """
        count = self._reused()
        # llama.cpp counts before it computes; any other graph would have been seen here.
        same = self._complete and count == self._count + 1 and first == self._nodes[0]
        self._count = count
        if not same:
            self.forget()
            return None
        if self._repeated is None and not self._fixed:
            self._fixed = overwrites_itself(first)  # which llama.cpp computes, and then we do
            if not self._fixed:
                self._repeated = Repeated(self._nodes, self._entries)
        if self._repeated is None:
            # Asked about again, and noted again.
            self._nodes, self._complete, self._entries = [], False, 0
        return self._repeated

    def note(self, node: int, *, is_entry: bool) -> None:
        """Notes the next node of a graph whose nodes are not known."""
        self._nodes.append(node)
        if is_entry:
            self._entries = len(self._nodes)

    def complete(self) -> None:
        """All nodes of the last graph have been noted, if any are."""
        self._complete = bool(self._nodes)

    def forget(self) -> None:
        """The last graph's nodes are of no use any more."""
        if self._repeated is not None:
            self._repeated.close()
        self._repeated = None
        self._nodes, self._entries = [], 0
        self._complete = self._fixed = False

    def close(self) -> None:
        self.forget()
        self.backend.close()
