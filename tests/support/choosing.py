"""A model of mlx-lm as the head of two stages sees it: tokens are chosen where the logits are."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from node.mlx.tensors import encode_tree
from node.pipeline.choosers import Chooser, check_chosen, settle
from node.ring.choices import check_choices, choose_tokens
from tests.support.tiny import VOCAB
from unicluster.v1.stage_pb2 import Frame


class Choosing:
    """Serves each call's choices as a last stage does. It counts masks and tokens chosen by them.

    older: as a stage that does not know of masks.
    """

    chooses = True
    vocabulary = VOCAB

    def __init__(self, model: Any, *, older: bool = False) -> None:
        self.masks = 0
        self.chosen = 0
        self._model = model
        self._older = older

    def __call__(
        self, inputs: mx.array, cache: Any = None, choosers: Sequence[Chooser] = ()
    ) -> mx.array:
        logits: mx.array = self._model(inputs, cache=cache)
        if not choosers:
            return logits
        choices = [chooser.ask(VOCAB) for chooser in choosers]
        frame = Frame.FromString(Frame(choices=choices).SerializeToString())
        self.masks += sum(bool(choice.allowed) for choice in choices)
        if self._older:
            for choice in frame.choices:
                choice.ClearField("allowed")
        encode_tree(logits, frame.hidden)
        check_choices(frame, inputs.size)
        choose_tokens(frame)
        check_chosen(frame, choices, VOCAB)
        if frame.chosen:
            pairs = zip(frame.chosen, choices, strict=True)
            self.chosen += sum(bool(token and choice.allowed) for token, choice in pairs)
        settled = settle(frame, choosers, inputs.shape, VOCAB)
        return logits if settled is None else settled

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
