"""The forms in which a model can be loaded, one for each engine, and which may share a ring.

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
class Forms:
    """A model as it is asked for, and the same model as a GGUF, if there is one.

    assumed: the GGUF is one thought of, of about the same bits.
    """

    layout: Layout
    gguf: Layout | None = None
    assumed: bool = False

    @classmethod
    def thought_of(cls, found: ModelLayout) -> "Forms":
        """With a GGUF of about the same bits, if there could be one."""
        gguf = Layout.from_proto(found.gguf) if found.HasField("gguf") else None
        return cls(Layout.from_proto(found), gguf, assumed=gguf is not None)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return (self.layout,) if self.gguf is None else (self.layout, self.gguf)

    def only(self, engine: str) -> "Forms":
        """The form of one engine, or of whichever there are: `auto`.

        Raises InputError where there is none.
        """
        found = [layout for layout in self.layouts if engine in ("auto", layout.engine)]
        if not found:
            kind = "no GGUF: give one with --gguf" if ENGINES[engine].reads_gguf else "a GGUF"
            raise InputError(f"--engine {engine}: the model is {kind}")
        gguf = found[1] if len(found) > 1 else None
        return Forms(found[0], gguf, self.assumed and ENGINES[found[-1].engine].reads_gguf)

    def map(self, change: Callable[[Layout], Layout]) -> "Forms":
        """The same change to each."""
        gguf = change(self.gguf) if self.gguf is not None else None
        return replace(self, layout=change(self.layout), gguf=gguf)

    def rings(self) -> "list[Ring]":
        """All kinds of rings there may be; of equals the first is preferred."""
        if self.gguf is None:
            return [Ring((self.layout,))]
        model, gguf = self.layout, self.gguf
        apart = tuple(sorted({*model.forbidden_cuts, *gguf.forbidden_cuts}))

        def mixed(*forms: Layout) -> Ring:
            return Ring(tuple(replace(form, forbidden_cuts=apart) for form in forms))

        # Where both can be cut alike, a ring of one engine alone is among the mixed ones.
        found = [] if apart == model.forbidden_cuts else [Ring((model,))]
        found.append(mixed(model, gguf.unfinished()))
        if apart != gguf.forbidden_cuts or not model.finish_bytes:
            found.append(Ring((gguf,)))
        if model.finish_bytes:
            found.append(mixed(gguf, model.finished()))
        return found


@dataclass(frozen=True)
class Ring:
    """What stages of a ring may load; the first of the forms is the head's."""

    forms: tuple[Layout, ...]

    @property
    def head(self) -> Layout:
        return self.forms[0]

    def takes(self, machine: Machine) -> bool:
        """Whether a machine could have a part in it."""
        return any(machine.can(form.engine) for form in self.forms)


def check_same(model: Layout, gguf: Layout, names: tuple[str, str]) -> None:
    """Raises InputError unless both are forms of one model; `names` are how people call them."""
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
