"""Devices of a stage as parameters of llama.cpp's model."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from node.ggml.library import gpu_handles, llama
from unicluster.errors import StageError


class OnDevices:
    """The list of devices that a model is loaded on, and how its layers are split over them.

    shares: names with numbers of layers, in the order of layers; empty for llama.cpp's own choice.
    Raises StageError for a device that is not there, and for layers that are not `layers`.
    """

    def __init__(self, shares: Sequence[tuple[str, int]], layers: int) -> None:
        self._shares = shares
        if not shares:
            return
        if len(shares) > 1 and sum(count for _, count in shares) != layers:
            raise StageError(f"{len(shares)} devices are given other layers than the {layers} here")
        handles = gpu_handles([name for name, _ in shares])
        if len(shares) > 1 and len(handles) < len(shares):
            raise StageError("llama.cpp's split is of GPUs, and not of the CPU")
        # Ended by a null. An empty list is the CPU alone.
        self._list = (ctypes.c_void_p * (len(handles) + 1))(*handles, None)
        self._split = np.zeros(max(int(llama().llama_max_devices()), len(shares)), np.float32)
        self._split[: len(shares)] = [count for _, count in shares]
        # What follows the last layer, norm and lm_head, counts as one more.
        self._split[len(shares) - 1] += 1

    def apply(self, params: Any) -> None:
        """Sets the fields of `llama_model_params`, which point into this object."""
        if not self._shares:
            return
        params.devices = ctypes.addressof(self._list)
        params.split_mode = llama().LLAMA_SPLIT_MODE_LAYER
        if len(self._shares) > 1:
            params.tensor_split = self._split.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
