"""Choosers: what the head has a last stage choose tokens by, and what comes back of it."""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np

from node.mlx.tensors import decode_tree
from node.ring.choices import STEPS, may_be
from unicluster.errors import StageError
from unicluster.v1.stage_pb2 import Choice, Frame


class Chooser(Protocol):
    """Chooses an answer's tokens here, of logits, unless the last stage has."""

    def ask(self, vocabulary: int) -> Choice:
        """How the next token is to be chosen, of so many; called once for each token."""

    def settle(self, token: int | None) -> None:
        """The token that was chosen; None: it is to be chosen here."""


class _Unread:
    """For tokens of a prompt, whose successors are known: one number comes back for each."""

    def ask(self, vocabulary: int) -> Choice:
        return Choice()

    def settle(self, token: int | None) -> None:
        pass


UNREAD = _Unread()


def check_chosen(frame: Frame, asked: Sequence[Choice], vocabulary: int) -> None:
    """Raises StageError for chosen tokens of a returned frame that are none for what was asked.

    None at all are right: then all logits have to be there, of whose shape the last stage's engine
    knows.
    """
    chosen = frame.chosen
    if not chosen:
        return
    if len(chosen) != len(asked):
        raise StageError(f"{len(chosen)} tokens were chosen for {len(asked)}")
    if (largest := max(chosen)) > vocabulary:
        raise StageError(f"token {largest - 1} was chosen of {vocabulary}")
    for token, choice in zip(chosen, asked, strict=True):
        if token and not may_be(choice, token - 1):
            raise StageError(f"token {token - 1} was chosen, which nobody asked for")
    unsure = sum(not token for token in chosen)
    if len(frame.hidden) != bool(unsure):
        raise StageError(f"{len(frame.hidden)} arrays of logits for {unsure} tokens")
    if unsure:
        tensor = frame.hidden[0].tensor
        if tensor.dtype not in STEPS or list(tensor.shape) != [unsure, vocabulary]:
            raise StageError(
                f"logits of {tensor.dtype[:20]} {list(tensor.shape)[:8]}, "
                f"not of {[unsure, vocabulary]}"
            )


def settle(
    frame: Frame, choosers: Sequence[Chooser], shape: tuple[int, ...], vocabulary: int
) -> mx.array | None:
    """Tells choosers what was chosen; returns logits (batch, tokens, vocabulary).

    Those of chosen tokens are zeros, and all of the size 1 where every token is chosen. None if
    nothing was chosen, and the frame has all logits.
    """
    if not frame.chosen:
        for chooser in choosers:
            chooser.settle(None)
        return None
    tokens = [number - 1 if number else None for number in frame.chosen]
    for chooser, token in zip(choosers, tokens, strict=True):
        chooser.settle(token)
    if not frame.hidden:
        return mx.zeros((*shape, 1))
    received: mx.array = decode_tree(frame.hidden)
    chosen = len(received)  # the place of a row of zeros
    rows = iter(range(chosen))
    order = np.array([chosen if token is not None else next(rows) for token in tokens])
    padded = mx.concatenate([received, mx.zeros((1, vocabulary), received.dtype)])
    return padded[mx.array(order)].reshape(*shape, vocabulary)
