"""The variants of a model, one for each engine that can load it, and which may share a ring.

Stages behind the head may be of either engine, cut where both allow it. An MLX head takes hidden
states back and computes the norm and the lm_head itself. A ggml head can't: the last stage of its
ring must give logits, which one of MLX can if they are made of the last hidden state alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from coordinator.planning.engines import ENGINES
from coordinator.planning.machine import Machine
from coordinator.planning.placement import Layout
from unicluster.errors import InputError
from unicluster.v1.node_pb2 import ModelLayout


@dataclass(frozen=True)
class ModelVariants:
    """A model as it is asked for, and the same model as a GGUF, if there is one.

    hypothetical: nobody has that GGUF; it is taken to have about the same bits.
    """

    layout: Layout
    gguf: Layout | None = None
    hypothetical: bool = False

    @classmethod
    def with_hypothetical_gguf(cls, layout: ModelLayout) -> "ModelVariants":
        """An inspected model with a GGUF of about the same bits, if there could be one."""
        gguf = Layout.from_proto(layout.gguf) if layout.HasField("gguf") else None
        return cls(Layout.from_proto(layout), gguf, hypothetical=gguf is not None)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return (self.layout,) if self.gguf is None else (self.layout, self.gguf)

    def only(self, engine: str) -> "ModelVariants":
        """The variant of one engine, or of whichever there are: `auto`.

        Raises InputError where there is none.
        """
        matching = [layout for layout in self.layouts if engine in ("auto", layout.engine)]
        if not matching:
            kind = "no GGUF: give one with --gguf" if ENGINES[engine].reads_gguf else "a GGUF"
            raise InputError(f"--engine {engine}: the model is {kind}")
        gguf = matching[1] if len(matching) > 1 else None
        return ModelVariants(
            matching[0], gguf, self.hypothetical and ENGINES[matching[-1].engine].reads_gguf
        )

    def map(self, change: Callable[[Layout], Layout]) -> "ModelVariants":
        """The variants, each with the same change."""
        gguf = change(self.gguf) if self.gguf is not None else None
        return replace(self, layout=change(self.layout), gguf=gguf)

    def rings(self) -> "list[RingVariants]":
        """All kinds of rings there may be; of equals the first is preferred."""
        if self.gguf is None:
            return [RingVariants((self.layout,))]
        model, gguf = self.layout, self.gguf
        if model.hidden_size != gguf.hidden_size:
            # MLX's layers hand on more than a hidden state.
            return [RingVariants((model,)), RingVariants((gguf,))]
        apart = tuple(sorted({*model.forbidden_cuts, *gguf.forbidden_cuts}))

        def mixed(*variants: Layout) -> RingVariants:
            return RingVariants(
                tuple(replace(variant, forbidden_cuts=apart) for variant in variants)
            )

        # Where both can be cut alike, a ring of one engine alone is among the mixed ones.
        rings = [] if apart == model.forbidden_cuts else [RingVariants((model,))]
        rings.append(mixed(model, gguf.without_lm_head()))
        if apart != gguf.forbidden_cuts or not model.added_lm_head_bytes:
            rings.append(RingVariants((gguf,)))
        if model.added_lm_head_bytes:
            rings.append(mixed(gguf, model.with_lm_head()))
        return rings


@dataclass(frozen=True)
class RingVariants:
    """The variants that stages of one ring may load; the first is the head's."""

    variants: tuple[Layout, ...]

    @property
    def head(self) -> Layout:
        return self.variants[0]

    def takes(self, machine: Machine) -> bool:
        """Whether a machine could have a part in it."""
        return any(machine.can(variant.engine) for variant in self.variants)


def check_same(model: Layout, gguf: Layout, names: tuple[str, str]) -> None:
    """Raises InputError unless both are variants of one model; `names` are how people call them."""
    name, other = names
    if ENGINES[model.engine].reads_gguf:
        raise InputError(f"--gguf {other}: {name} is a GGUF itself")
    if not ENGINES[gguf.engine].reads_gguf:
        raise InputError(f"--gguf {other}: it is no GGUF")
    if not model.hidden_size:
        raise InputError(
            f"--gguf {other}: the layers of {name} hand on more than a hidden state, which GGUF "
            "stages can't take: leave --gguf out"
        )
    for what, ours, theirs in (
        ("layers", model.layers, gguf.layers),
        ("numbers in a hidden state", model.hidden_size, gguf.hidden_size),
    ):
        if ours != theirs:
            raise InputError(
                f"--gguf {other}: it is another model: it has {theirs} {what}, and {name} {ours}"
            )
