"""Sizes of a model that is to be served, in all its variants, as the machines compute them."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from google.protobuf.message import DecodeError

from coordinator.fleet import local
from coordinator.fleet.members import Members
from coordinator.models.catalog import Source
from coordinator.planning.engines import DEFAULT
from coordinator.planning.filling import DRAFT_RATE
from coordinator.planning.placement import Layout
from coordinator.planning.variants import ModelVariants, check_same
from coordinator.serving.options import ServeOptions
from unicluster.errors import InputError
from unicluster.v1.node_pb2 import Draft, InspectRequest, ModelLayout, StageSpec


@dataclass(frozen=True)
class Inspected:
    """Layouts of a model, of its GGUF, and of its draft model; None where there is none."""

    model: ModelLayout
    gguf: ModelLayout | None = None
    draft: ModelLayout | None = None

    def variants_for(self, generation: StageSpec) -> ModelVariants:
        """The variants as they are planned with these options of generation."""
        draft = self.draft
        if draft is None or not generation.piped:
            return self.variants
        guesses = partial(with_draft, draft=Layout.from_proto(draft), rate=DRAFT_RATE)
        return replace(self, draft=None).variants.map(guesses)

    def to_json(self) -> str:
        """For `from_json`."""
        layouts = (self.model, self.gguf, self.draft)
        return json.dumps(
            [
                None if each is None else base64.b64encode(each.SerializeToString()).decode()
                for each in layouts
            ]
        )

    @classmethod
    def from_json(cls, text: str) -> "Inspected":
        """Undoes `to_json`. Raises ValueError for anything else."""
        try:
            layouts = [
                None if each is None else ModelLayout.FromString(base64.b64decode(each))
                for each in json.loads(text)
            ]
            model, gguf, draft = layouts
        except (TypeError, DecodeError) as error:
            raise ValueError(f"no layouts: {error}") from error
        if model is None:
            raise ValueError("no layouts: the model's is missing")
        known = cls(model, gguf, draft)
        try:
            _ = known.variants
        except InputError as error:
            raise ValueError(f"no layouts: {error}") from error
        return known

    @property
    def variants(self) -> ModelVariants:
        gguf = Layout.from_proto(self.gguf) if self.gguf is not None else None
        variants = ModelVariants(Layout.from_proto(self.model), gguf)
        if self.draft is None:
            return variants
        return variants.map(partial(with_draft, draft=Layout.from_proto(self.draft)))

    @property
    def by_engine(self) -> dict[str, ModelLayout]:
        layouts = [self.model, *([self.gguf] if self.gguf is not None else [])]
        return {layout.engine or DEFAULT: layout for layout in layouts}


def with_draft(layout: Layout, draft: Layout, rate: float = 0.0) -> Layout:
    """Layout with a draft model on the head, as Layout.with_draft."""
    read = round(sum(draft.read_bytes)) + draft.head_read_bytes
    return layout.with_draft(draft.weight_bytes + draft.kv_bytes, read, rate)


async def inspected(
    options: ServeOptions,
    members: Members,
    revisions: Mapping[str, str],
    sources: Sequence[str],
) -> Inspected:
    """Asks the machines. `revisions`: of what is offered from here; `sources`: see StageSpec.

    Raises InputError where model and GGUF are not the same, or the draft has other tokens.
    """
    source, gguf = options.source, options.gguf

    async def ask(model: Source | Draft, **fields: Any) -> ModelLayout:
        request = InspectRequest(
            model=model.model,
            quant=model.quant,
            users=options.users,
            revision=revisions.get(model.model, ""),
            sources=sources,
            **fields,
        )
        return await members.inspect(request, options.nodes)

    layout = await ask(source, context=options.context, kv_bits=options.generation.kv_bits)
    as_gguf = drafting = None
    if gguf is not None:
        as_gguf = await ask(gguf, context=layout.context)
        names = source.display, gguf.display
        check_same(Layout.from_proto(layout), Layout.from_proto(as_gguf), names)
    if options.generation.HasField("draft"):
        drafting = await ask(
            options.generation.draft,
            context=layout.context,
            drafts_for=source.model,
            drafts_for_revision=layout.revision,
        )
    return Inspected(layout, as_gguf, drafting)


async def inspected_here(
    source: Source, generation: StageSpec, *, context: int = 0, users: int = 1
) -> Layout:
    """The layout of a model on this machine, with its draft model's bytes where it has one."""

    async def ask(model: Source | Draft, tokens: int, kv_bits: int = 0) -> Layout:
        request = InspectRequest(
            model=model.model, quant=model.quant, context=tokens, users=users, kv_bits=kv_bits
        )
        return Layout.from_proto(await local.inspect(request))

    layout = await ask(source, context, generation.kv_bits)
    if not generation.HasField("draft"):
        return layout
    draft = await ask(generation.draft, layout.context)
    return with_draft(layout, draft)
