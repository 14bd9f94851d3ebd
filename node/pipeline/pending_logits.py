"""Pending logits: an object that stands for an array and waits for it when it is first used."""

from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx


class FrameProgress(Protocol):
    """Progress of a frame round the ring."""

    @property
    def slowest_s(self) -> float | None:
        """Seconds of the machine that computed longest; None until the frame is back."""


class PendingLogits:
    """Logits (batch, tokens, vocabulary) of a frame that may still be in the pipe.

    Prefill throws the logits away, so its chunks follow one another without waiting;
    decode indexes them, and waits. `discard` is called if nobody ever used them. `progress` is
    that of the frame.
    """

    def __init__(
        self,
        resolve: Callable[[], mx.array],
        discard: Callable[[], None] | None = None,
        progress: "FrameProgress | None" = None,
    ) -> None:
        self.progress = progress
        self._resolve: Callable[[], mx.array] | None = resolve
        self._discard = discard
        self._array: mx.array | None = None

    def __mlx_array__(self) -> mx.array:
        if self._array is None:
            resolve, self._resolve = self._resolve, None
            if resolve is None:
                raise RuntimeError("these logits were already lost to an error")
            self._array = resolve()
        return self._array

    def __getitem__(self, key: Any) -> mx.array:
        return self.__mlx_array__()[key]

    def __len__(self) -> int:
        return len(self.__mlx_array__())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.__mlx_array__(), name)

    def __del__(self) -> None:
        if self._resolve is not None and self._discard is not None:
            self._discard()


def _operator(name: str) -> Any:
    def apply(self: PendingLogits, *args: Any) -> Any:
        return getattr(self.__mlx_array__(), name)(*args)

    return apply


# Python looks operators up on the class, past __getattr__.
for _name in (
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__"),
    *("__rtruediv__", "__pow__", "__matmul__", "__neg__", "__abs__", "__eq__", "__ne__"),
    *("__lt__", "__le__", "__gt__", "__ge__", "__iter__", "__repr__"),
):
    setattr(PendingLogits, _name, _operator(_name))
PendingLogits.__hash__ = object.__hash__  # type: ignore[method-assign]
