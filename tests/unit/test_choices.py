"""Tokens chosen where the logits are: the ones that the head would choose, or none."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from node.generation.sampling import Sampling
from node.pipeline.choosers import check_chosen, settle
from node.ring.bounds import FrameError
from node.ring.choices import check_choices, choose, choose_tokens
from unicluster.errors import StageError
from unicluster.v1.stage_pb2 import Choice, Frame
from unicluster.v1.tensor_pb2 import Leaf, Tensor

VOCABULARY = 5000
SAMPLINGS = {
    "greedy": Sampling(),
    "temperature": Sampling(temperature=0.8, seed=1),
    "hot": Sampling(temperature=2.0, seed=1),
    "cold": Sampling(temperature=0.01, seed=1),
    "top_p": Sampling(temperature=0.8, top_p=0.9, seed=2),
    "low top_p": Sampling(temperature=1.0, top_p=1e-6, seed=2),
    "top_k": Sampling(temperature=0.8, top_k=40, seed=3),
    "top_k of one": Sampling(temperature=0.8, top_k=1, seed=3),
    "top_k of all": Sampling(temperature=0.8, top_k=VOCABULARY, seed=3),
    "min_p": Sampling(temperature=1.5, min_p=0.05, seed=4),
    "min_p of 1": Sampling(temperature=1.5, min_p=1.0, seed=4),
    "all": Sampling(temperature=0.7, top_p=0.95, top_k=20, min_p=0.01, seed=5),
}


def peaked(rng: np.random.Generator) -> Any:
    """Logits as models have them: a few high ones, and a long tail."""
    logits = rng.standard_normal(VOCABULARY) * 2
    logits[rng.integers(VOCABULARY, size=8)] += rng.uniform(4, 14, size=8)
    return logits.astype(np.float32)


def flat(rng: np.random.Generator) -> Any:
    return (rng.standard_normal(VOCABULARY) / 50).astype(np.float32)


def tied(rng: np.random.Generator) -> Any:
    """Few different numbers, and tokens that are forbidden."""
    logits = rng.integers(-8, 4, VOCABULARY).astype(np.float32)
    logits[rng.integers(VOCABULARY, size=100)] = -np.inf
    return logits


def by_head(sampling: Sampling, rows: list[Any]) -> list[int]:
    """Tokens that a batch's own sampler chooses, one after the other."""
    sampler, chosen = sampling.sampler(), []
    for row in rows:
        logits = mx.array(row)[None]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        drawn: Any = mx.argmax(logprobs, axis=-1) if sampler is None else sampler(logprobs)
        chosen.append(drawn.item())
    return chosen


@pytest.mark.parametrize("kind", [peaked, flat, tied])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_token_chosen_elsewhere_is_the_head_s(name: str, kind: Any) -> None:
    rng = np.random.default_rng(7)
    rows = [kind(rng) for _ in range(40)]
    sampling = SAMPLINGS[name]
    chooser = sampling.chooser(needs_logits=False)

    chosen = [choose(row, chooser.ask(VOCABULARY)) for row in rows]

    wanted = by_head(sampling, rows)
    sure = [
        (token, right) for token, right in zip(chosen, wanted, strict=True) if token is not None
    ]
    assert all(token == right for token, right in sure)
    if kind is peaked and name not in ("hot", "cold", "min_p of 1"):
        assert len(sure) > len(rows) // 2


@pytest.mark.parametrize("name", SAMPLINGS)
def test_unsure_and_sure_tokens_in_turns_are_those_of_the_head_alone(name: str) -> None:
    rng = np.random.default_rng(8)
    rows = [kind(rng) for _ in range(10) for kind in (peaked, flat)]
    sampling = SAMPLINGS[name]
    chooser, got = sampling.chooser(needs_logits=False), []
    for row in rows:
        chooser.settle(choose(row, chooser.ask(VOCABULARY)))
        logits = mx.array(row)[None]
        token: Any = chooser(logits - mx.logsumexp(logits, axis=-1, keepdims=True)).item()
        got.append(token)

    assert got == by_head(sampling, rows)


def test_a_resumed_answer_goes_on_with_the_numbers_of_the_first() -> None:
    sampling = SAMPLINGS["temperature"]
    first = sampling.chooser(needs_logits=False)
    draws = [first.ask(VOCABULARY).draw for _ in range(6)]

    resumed = sampling.chooser(needs_logits=False, drawn=4)

    assert [resumed.ask(VOCABULARY).draw for _ in range(2)] == draws[4:]


@pytest.mark.parametrize("odd", [np.nan, np.inf])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_nothing_is_chosen_of_logits_that_are_no_numbers(name: str, odd: float) -> None:
    logits = peaked(np.random.default_rng(9))
    logits[17] = odd

    assert choose(logits, SAMPLINGS[name].chooser(needs_logits=False).ask(VOCABULARY)) is None


def test_two_that_are_equally_likely_are_left_to_the_head() -> None:
    logits = np.array([1, 5, 5, 2], np.float32)

    assert choose(logits, Choice()) is None
    assert choose(logits, Choice(temperature=1, top_k=1, draw=0.5)) is None


def test_half_precision_leaves_close_ones_to_the_head() -> None:
    close = np.array([20.0, 20.1, 3.0], np.float32)

    assert choose(close, Choice()) == 1
    assert choose(close, Choice(), step=2.0**-7) is None
    assert choose(np.array([20.0, 28.0], np.float32), Choice(), step=2.0**-7) == 1


# Among allowed tokens

ALLOWED = {"one": 1, "a few": 12, "most": VOCABULARY - 40}


def with_mask(choice: Choice, mask: Any) -> Choice:
    choice.all, choice.allowed = True, np.packbits(mask, bitorder="little").tobytes()
    return choice


@pytest.mark.parametrize("allowed", ALLOWED)
@pytest.mark.parametrize("kind", [peaked, flat, tied])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_an_allowed_token_chosen_elsewhere_is_the_head_s(
    name: str, kind: Any, allowed: str
) -> None:
    rng = np.random.default_rng(11)
    rows = [kind(rng) for _ in range(20)]
    tokens = [rng.permutation(VOCABULARY)[: ALLOWED[allowed]] for _ in rows]
    masks = [np.isin(np.arange(VOCABULARY), each) for each in tokens]
    sampling = SAMPLINGS[name]
    chooser = sampling.chooser(needs_logits=False)

    chosen = [
        choose(row, with_mask(chooser.ask(VOCABULARY), mask))
        for row, mask in zip(rows, masks, strict=True)
    ]

    masked = [
        np.where(mask, row, np.float32(-np.inf)) for row, mask in zip(rows, masks, strict=True)
    ]
    wanted = by_head(sampling, masked)
    sure = [
        (token, right) for token, right in zip(chosen, wanted, strict=True) if token is not None
    ]
    assert all(token == right for token, right in sure)
    if allowed == "one":  # logits of -inf among the allowed are left to the head
        assert len(sure) == sum(bool(np.isfinite(row).any()) for row in masked)
    if kind is peaked and allowed == "a few" and name not in ("hot", "cold", "min_p of 1"):
        assert len(sure) > len(rows) // 2


def test_a_stage_that_does_not_know_of_masks_leaves_the_choice_to_the_head() -> None:
    """To one of an older version the field is not there."""
    logits = peaked(np.random.default_rng(1))[None, None]
    choice = with_mask(Choice(), np.arange(VOCABULARY) < 3)
    choice.ClearField("allowed")
    answer = frame(logits, [choice])

    choose_tokens(answer)

    assert not answer.chosen
    assert answer.hidden[0].tensor.data == logits.tobytes()


def test_a_constrained_answer_s_token_comes_back_alone_beside_a_free_one_s() -> None:
    rng = np.random.default_rng(3)
    logits = np.stack([peaked(rng) for _ in range(2)])[:, None]
    mask = np.arange(VOCABULARY) % 7 == 3
    wants = [with_mask(Choice(), mask), Choice()]
    answer = frame(logits, wants)

    choose_tokens(answer)

    check_chosen(answer, wants, VOCABULARY)
    assert not answer.hidden
    best = np.where(mask, logits[0, 0], -np.inf).argmax()
    assert list(answer.chosen) == [best + 1, logits[1, 0].argmax() + 1]


# In frames


def tensor(array: Any) -> Tensor:
    return Tensor(dtype=array.dtype.name, shape=array.shape, data=array.tobytes())


def frame(logits: Any, choices: list[Choice]) -> Frame:
    return Frame(hidden=[Leaf(tensor=tensor(logits))], choices=choices)


def test_only_the_logits_that_are_wanted_come_back() -> None:
    rng = np.random.default_rng(1)
    logits = np.stack([peaked(rng) for _ in range(4)])[:, None]
    wants = [Choice(), Choice(all=True), Choice(), Choice(all=True)]
    answer = frame(logits, wants)

    choose_tokens(answer)

    best = logits[:, 0].argmax(axis=1)
    assert list(answer.chosen) == [best[0] + 1, 0, best[2] + 1, 0]
    assert not answer.choices
    check_chosen(answer, wants, VOCABULARY)
    choosers = [Sampling().chooser(each.all) for each in wants]
    settled = np.array(settle(answer, choosers, (4, 1), VOCABULARY))
    assert np.array_equal(settled[[1, 3]], logits[[1, 3]])
    tokens: list[Any] = [c(mx.array(row)).item() for c, row in zip(choosers, settled, strict=True)]
    assert tokens == best.tolist()


def test_a_greedy_token_comes_back_alone() -> None:
    logits = peaked(np.random.default_rng(1))[None, None]
    answer = frame(logits, [Choice()])

    choose_tokens(answer)

    assert answer.ByteSize() < 10
    chooser = Sampling().chooser(needs_logits=False)
    settled = settle(answer, [chooser], (1, 1), VOCABULARY)
    assert settled is not None
    assert chooser(settled[:, 0]).tolist() == [logits.argmax()]


def test_all_logits_come_back_where_all_are_wanted() -> None:
    logits = peaked(np.random.default_rng(1))[None, None]
    answer = frame(logits, [Choice(all=True)])

    choose_tokens(answer)

    assert not answer.chosen
    assert answer.hidden[0].tensor.data == logits.tobytes()
    assert settle(answer, [Sampling().chooser(True)], (1, 1), VOCABULARY) is None


BAD_CHOICES = {
    "2 choices for 1": Frame(choices=[Choice(), Choice()]),
    "a result that is held": Frame(choices=[Choice()], hold=True),
    "temperature nan": Frame(choices=[Choice(temperature=float("nan"))]),
    "temperature inf": Frame(choices=[Choice(temperature=float("inf"))]),
    "temperature -1": Frame(choices=[Choice(temperature=-1)]),
    "top_p 1.5": Frame(choices=[Choice(top_p=1.5)]),
    "min_p nan": Frame(choices=[Choice(min_p=float("nan"))]),
    "draw 1": Frame(choices=[Choice(draw=1)]),
    "draw -0.1": Frame(choices=[Choice(draw=-0.1)]),
}


@pytest.mark.parametrize("said", BAD_CHOICES)
def test_a_choice_that_can_t_be_is_refused(said: str) -> None:
    with pytest.raises(FrameError, match=said):
        check_choices(BAD_CHOICES[said], 1)


def logits_of(*shape: int, dtype: str = "float32") -> list[Leaf]:
    return [Leaf(tensor=Tensor(dtype=dtype, shape=shape, data=bytes(4 * int(np.prod(shape)))))]


BAD_MASKS = {
    "a mask of 1 bytes for 12 tokens": b"\1",
    "a mask of 3 bytes for 12 tokens": b"\1\1\0",
    "a mask allows tokens beyond 12": b"\1\x10",
    "a mask allows no token": bytes(2),
}


@pytest.mark.parametrize("said", BAD_MASKS)
def test_a_mask_that_is_not_of_the_logits_is_refused(said: str) -> None:
    logits = np.zeros((2, 1, 12), np.float32)

    with pytest.raises(FrameError, match=said):
        choose_tokens(frame(logits, [Choice(), Choice(all=True, allowed=BAD_MASKS[said])]))


WANTED = [Choice(), Choice(all=True), Choice(temperature=1)]
BAD_ANSWERS = {
    "1 tokens were chosen for 3": Frame(chosen=[1]),
    "token 9 was chosen of 9": Frame(chosen=[10, 0, 1], hidden=logits_of(1, 9)),
    "nobody asked for": Frame(chosen=[1, 1, 1]),
    "0 arrays of logits for 1": Frame(chosen=[1, 0, 1]),
    "2 arrays of logits for 1": Frame(chosen=[1, 0, 1], hidden=logits_of(1, 9) * 2),
    "logits of float32 \\[1, 8\\]": Frame(chosen=[1, 0, 1], hidden=logits_of(1, 8)),
    "logits of float32 \\[2, 9\\]": Frame(chosen=[1, 0, 1], hidden=logits_of(2, 9)),
    "logits of int32": Frame(chosen=[1, 0, 1], hidden=logits_of(1, 9, dtype="int32")),
}


@pytest.mark.parametrize("said", BAD_ANSWERS)
def test_an_answer_that_can_t_be_is_refused(said: str) -> None:
    with pytest.raises(StageError, match=said):
        check_chosen(BAD_ANSWERS[said], WANTED, 9)


@pytest.mark.parametrize("token", [0, 2, 8])
def test_a_token_that_the_mask_forbids_is_refused(token: int) -> None:
    asked = [Choice(all=True, allowed=b"\x82\0")]
    check_chosen(Frame(chosen=[1 + 1]), asked, 9)
    check_chosen(Frame(chosen=[7 + 1]), asked, 9)

    with pytest.raises(StageError, match=f"token {token} was chosen, which nobody asked for"):
        check_chosen(Frame(chosen=[token + 1]), asked, 9)


def test_tokens_that_nobody_asked_for_are_refused() -> None:
    with pytest.raises(StageError, match="1 tokens were chosen for 0"):
        check_chosen(Frame(chosen=[1]), [], 9)
