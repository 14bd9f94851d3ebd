"""Puts hidden states into llama.cpp's computation, and takes a layer's result out of it.

llama.cpp asks a callback of every tensor whether it is wanted, some 20 times a layer.
"""

import ctypes
from typing import Any

import numpy as np

from node.ggml.library import Floats, read_tensor, tensor_name, tensor_shape, write_tensor
from unicluster.errors import StageError

_Callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


class Tap:
    """Overwrites the tensor `entry`, and gets the rows of `width` floats of the tensor `final`.

    After `final` nothing more is computed. Either name may be empty: then that is not done.
    `callback` is for llama.cpp; it must live as long as the context.
    """

    def __init__(self, entry: str, final: str, width: int) -> None:
        self.callback = _Callback(self._answer)
        self._entry, self._final = entry.encode(), final.encode()
        self._names = {name for name in (self._entry, self._final) if name}
        self._width = width
        self._inputs: Floats = np.empty((0, width), np.float32)
        self._into = self._inputs
        self._put = self._got = 0

    def open(self, inputs: Floats, into: Floats) -> None:
        """Sets input and output arrays of the next computation."""
        self._inputs, self._into = inputs, into
        self._put = self._got = 0

    def check(self) -> None:
        """Raises StageError unless all rows went in and came out."""
        wanted = len(self._inputs)
        for name, rows in ((self._entry, self._put), (self._final, self._got)):
            if name and rows != wanted:
                raise StageError(
                    f"llama.cpp had {rows} of {wanted} rows of {name.decode()}: this version "
                    "builds the model otherwise than those known here"
                )

    def _answer(self, address: int, ask: bool, _data: Any) -> bool:
        """Whether a tensor is wanted; and once it is computed, whether to go on."""
        name = tensor_name(address)
        if ask:
            return name in self._names
        width, rows = tensor_shape(address)
        # An exception would be lost in a callback: the counts tell.
        if name == self._entry:
            if self._fits(self._inputs, self._put, rows, width):
                write_tensor(address, self._at(self._inputs, self._put), rows * width * 4)
                self._put += rows
            return True
        if self._fits(self._into, self._got, rows, width):
            read_tensor(address, self._at(self._into, self._got), rows * width * 4)
            self._got += rows
        return False

    def _fits(self, array: Floats, at: int, rows: int, width: int) -> bool:
        return width == self._width and at + rows <= len(array)

    def _at(self, array: Floats, row: int) -> int:
        return int(array.ctypes.data) + row * self._width * 4
