"""Checks that a draft model has the tokens of the model that it drafts for."""

from pathlib import Path

from node.engines.choose import choose
from node.weights import store
from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.errors import InputError
from unicluster.v1.node_pb2 import InspectRequest


def check_draft(request: InspectRequest, draft: Checkpoint) -> None:
    """Raises InputError unless `draft` can guess ahead for the model in `request.drafts_for`.

    One of them may have some more tokens, as models of one family do.
    """
    engine = choose(draft)
    if not engine.can_draft:
        raise InputError(f"--draft {request.model}: a GGUF can't guess ahead; MLX weights can")
    model = store.find(request.drafts_for, request.drafts_for_revision)
    if model is None:
        raise InputError(f"{request.drafts_for}: no longer on this machine")
    ours = engine.tokenizer(draft).get_vocab()
    theirs = choose(model).tokenizer(model).get_vocab()
    fewer, more = sorted((ours, theirs), key=len)
    if not fewer.items() <= more.items():
        raise InputError(
            f"--draft: its tokens are not those of {Path(request.drafts_for).name}; "
            "a draft must be of the same family"
        )
