"""Constrained answers whose tokens are chosen where the logits are: as if chosen at the head."""

import asyncio
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from node.constraints import mask
from node.constraints.mask import Allowed, Filter, packed_mask
from node.generation.sampling import Sampling
from node.ring.choices import may_be
from node.speculation.drafting import Lookup, Speculation
from tests.support.choosing import Choosing
from tests.support.constrained import POINT
from tests.support.engines import Completion, Script, Tiny, listen
from tests.support.tiny import MARKS, VOCAB, tiny_config, write_model
from unicluster.v1 import chat_pb2
from unicluster.v1.chat_pb2 import Constraint, GenerateRequest, Reasoning, Resume

THINK, THOUGHT, *_ = range(258, 258 + len(MARKS))
SCHEMA = Constraint(json_schema=json.dumps(POINT))
PROMPT = list(b"a prompt")
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "seed": 5}


@pytest.fixture(autouse=True)
def _masks_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is."""
    monkeypatch.setattr(mask, "QUICK_S", float("inf"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return write_model(folder / "llama", tiny_config("llama"), marks=True)


def asked(constraint: Constraint | None = SCHEMA, **fields: Any) -> GenerateRequest:
    sampling = chat_pb2.Sampling(**fields.pop("sampling", {}))
    fields = {"token_ids": PROMPT, "max_tokens": 300} | fields
    return GenerateRequest(constraint=constraint, sampling=sampling, **fields)


async def answers(
    tiny: Tiny, model: Any, requests: list[GenerateRequest], **options: Any
) -> list[Completion]:
    """As many at once as there are `users`."""
    users = options.setdefault("users", 4)
    engine = await tiny.engine(model, context=512, **options)
    places = asyncio.Semaphore(users)

    async def answer(request: GenerateRequest) -> Completion:
        async with places:
            return await listen(await engine.submit(request))

    try:
        return await asyncio.gather(*map(answer, requests))
    finally:
        engine.close()


SPECULATIONS = {"": None, "lookup": Speculation(Lookup, 6)}


@pytest.mark.parametrize("speculation", SPECULATIONS.values(), ids=SPECULATIONS)
@pytest.mark.parametrize("users", [1, 4])
async def test_texts_are_those_chosen_at_the_head(
    path: Path, users: int, speculation: Speculation | None
) -> None:
    """Beside free ones, and ones that need all logits at the head."""
    tiny = await Tiny.load(path)
    choosing = Choosing(tiny.model)
    requests = [
        asked(),
        asked(sampling=SAMPLED),
        asked(Constraint(regex="[ab]{9}c"), sampling={"temperature": 1.0, "top_k": 40, "seed": 2}),
        asked(sampling={"repetition_penalty": 1.2, "temperature": 0.0}),
        asked(None, max_tokens=20),
        asked(logprobs=2),
    ]

    here = await answers(tiny, None, requests, users=users, speculation=speculation)
    there = await answers(tiny, choosing, requests, users=users, speculation=speculation)

    assert [each.tokens for each in there] == [each.tokens for each in here]
    assert [each.reason for each in there] == [each.reason for each in here]
    assert there[5].logprobs == here[5].logprobs
    jsonschema.validate(json.loads(there[1].text), POINT)
    assert there[2].text.strip("ab") == "c"
    assert choosing.chosen > 0


async def test_a_stage_that_knows_no_masks_sends_the_logits(path: Path) -> None:
    tiny = await Tiny.load(path)
    older = Choosing(tiny.model, older=True)

    here = await answers(tiny, None, [asked(), asked(sampling=SAMPLED)])
    there = await answers(tiny, older, [asked(), asked(sampling=SAMPLED)])

    assert [each.tokens for each in there] == [each.tokens for each in here]
    assert older.masks
    assert not older.chosen


async def test_reasoning_is_free_and_what_follows_is_not(path: Path) -> None:
    """Within a budget, at whose end the model's mark is forced."""
    tiny = await Tiny.load(path)
    said = [THINK, *b"hmm, well, let me think about it", THOUGHT, *b"not JSON"]
    request = asked(reasoning=Reasoning(most_tokens=6))
    model = Choosing(Script(said, prompt=len(PROMPT)))

    (here,) = await answers(tiny, Script(said, prompt=len(PROMPT)), [request])
    (there,) = await answers(tiny, model, [request])

    assert there.tokens == here.tokens
    assert 0 < len(there.reasoning) < 10
    jsonschema.validate(json.loads(there.text), POINT)
    assert model.chosen > 0


async def test_a_resumed_answer_goes_on_as_it_would_have(path: Path) -> None:
    tiny = await Tiny.load(path)
    request = asked(sampling=SAMPLED)
    (whole,) = await answers(tiny, None, [request])
    rest = GenerateRequest()
    rest.CopyFrom(request)
    rest.resume.CopyFrom(Resume(token_ids=whole.tokens[:5]))
    choosing = Choosing(tiny.model)

    (resumed,) = await answers(tiny, choosing, [rest])

    assert resumed.tokens[-len(whole.tokens[5:]) :] == whole.tokens[5:]
    assert choosing.chosen > 0


async def test_slow_masks_are_made_while_the_frame_travels(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask, "QUICK_S", -1.0)
    tiny = await Tiny.load(path)
    choosing = Choosing(tiny.model)

    here = await answers(tiny, None, [asked(), asked(sampling=SAMPLED)])
    there = await answers(tiny, choosing, [asked(), asked(sampling=SAMPLED)])

    assert [each.tokens for each in there] == [each.tokens for each in here]
    assert not choosing.masks


# Masks


class Fixed(Filter):
    """Lets pass what it was made with; None: all."""

    def __init__(self, mask: list[bool] | None) -> None:
        super().__init__(0, len(mask or ()))
        self._fixed = None if mask is None else np.array(mask)
        self.follow([])

    def allowed(self, drafts: Any) -> int:
        return len(drafts)

    def _take(self, token: int) -> None:
        pass

    def _next_mask(self) -> Allowed | None:
        return self._fixed


def test_what_all_filters_let_pass_is_packed() -> None:
    one, other = Fixed([True, False, True, True]), Fixed([True, True, False, True, True])

    assert packed_mask([Fixed(None)], 12) is None
    assert packed_mask([one], 12) == b"\x0d\0"
    assert packed_mask([Fixed(None), other], 12) == b"\x1b\0"
    assert packed_mask([one, other], 12) == packed_mask([other, one], 12) == b"\x09\0"
    assert packed_mask([one, other], 2) == b"\x01"  # the logits may be fewer
    assert packed_mask([one, Fixed([False, True])], 12) == b""


def test_a_choice_without_any_allowed_token_is_left_to_the_head() -> None:
    chooser = Sampling().chooser(needs_logits=False, filters=[Fixed([False] * 4)])
    chooser.mask_next()

    choice = chooser.ask(VOCAB)

    assert choice.all
    assert not choice.allowed


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=3)])
def test_a_mask_is_sent_once_and_only_where_it_is_known(sampling: Sampling) -> None:
    chooser = sampling.chooser(needs_logits=False, filters=[Fixed([True, False, True])])
    chooser.mask_next()

    first, second = chooser.ask(VOCAB), chooser.ask(VOCAB)

    assert first.all
    assert [may_be(first, token) for token in range(4)] == [True, False, True, False]
    assert second.all
    assert not second.allowed


def test_where_every_token_may_come_no_mask_is_sent() -> None:
    chooser = Sampling().chooser(needs_logits=False, filters=[Fixed(None)])
    chooser.mask_next()

    assert not chooser.ask(VOCAB).all
