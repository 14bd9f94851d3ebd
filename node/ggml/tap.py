"""Puts hidden states into llama.cpp's computation, and takes a layer's result out of it.

llama.cpp asks a callback of every tensor whether it is wanted, some 20 times a layer.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from node.ggml.library import Floats, read_tensor, tensor_elements, tensor_name, write_tensor
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

    def open(self, inputs: Floats, into: Floats) -> None:
        """Sets input and output arrays of the next computation."""
        self._inputs, self._into = inputs, into
        self._put = self._got = 0

    def check(self) -> None:
        """Raises StageError unless all rows went in and came out."""
        both = (self._entry, self._put, self._inputs), (self._final, self._got, self._into)
        for name, rows, array in both:
            wanted = len(array)
            if name and rows != wanted:
                raise StageError(
                    f"llama.cpp had {rows} of {wanted} rows of {name.decode()}: this version "
                    "builds the model otherwise than those known here"
                )

    def _answer(self, address: int, ask: bool, _data: Any) -> bool:
        """Whether a tensor is wanted; and once it is computed, whether to go on."""
        name = tensor_name(address)
        if ask:
            if self.watcher is not None:
                self.watcher(address)
            return name in self._names
        count = tensor_elements(address)
        # An exception would be lost in a callback: the counts tell.
        if name == self._entry:
            if at := self._place(self._inputs, self._put, count, self._widths[0]):
                write_tensor(address, at, count * 4)
                self._put += count // self._widths[0]
            return True
        if at := self._place(self._into, self._got, count, self._widths[1]):
            read_tensor(address, at, count * 4)
            self._got += count // self._widths[1]
        return False

    def _place(self, array: Floats, row: int, count: int, width: int) -> int:
        """The address of the rows from `row` on; 0 where `count` numbers don't fit there."""
        if count % width or row + count // width > len(array):
            return 0
        return int(array.ctypes.data) + row * width * 4
