"""Choosing tokens where the logits are: the token that the head would choose, or none.

The head draws a number in [0, 1) of the request's seed, for each token, and mlx-lm's samplers take
the token at that place of the distribution, in the order of token ids. So the last stage can do it
with numpy: all that it must know is how far MLX's float32 sums may be from exact ones. Where that
might change the choice it is not sure, and the head gets the logits.

Of a constrained answer the choice has the tokens that are allowed: the head would make the logits
of all others -inf, so they have no part in any sum.
"""

import math
from typing import Any

import numpy as np

from node.ring.bounds import FrameError
from unicluster.v1.stage_pb2 import Choice, Frame
from unicluster.v1.tensor_pb2 import Tensor

Floats = np.ndarray[Any, np.dtype[np.float32]]
Numbers = np.ndarray[Any, np.dtype[np.float64]]

# Greedy below this, where the division by the temperature leaves the range of a float.
GREEDY_BELOW = 1e-5
MOST_TEMPERATURE = 2.0
# Relative distance of neighbouring numbers of each dtype that logits may have.
STEPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# An addition to a float32 sum of at most 1 is off by half a step at most, and by no more than what
# is added. Sums are made twice: of the weights, and of all to divide by.
HALF_STEP = 2.0**-25
SUMS = 2
# Of exp and of divisions, in float32.
ROUNDING = 4e-6
# How far below the best the tokens are that may be kept (nats): tried until it is far enough.
REACHES = (8.0, 16.0, 32.0, math.inf)
# The logarithm of a vocabulary is less.
MOST_SPREAD = 16.0


def check_choices(frame: Frame, tokens: int) -> None:
    """Raises FrameError unless a frame's choices are one for each of `tokens`, in their ranges.

    Masks are checked beside the logits, whose number is not known before.
    """
    choices = frame.choices
    if frame.hold:
        raise FrameError("choices of tokens for a result that is held")
    if len(choices) != tokens:
        raise FrameError(f"{len(choices)} choices for {tokens} tokens")
    for choice in choices:
        if not (
            0 <= choice.temperature <= MOST_TEMPERATURE
            and 0 <= choice.top_p <= 1
            and 0 <= choice.min_p <= 1
            and 0 <= choice.draw < 1
        ):
            raise FrameError(
                f"a choice by temperature {choice.temperature:g}, top_p {choice.top_p:g}, "
                f"min_p {choice.min_p:g}, draw {choice.draw:g}"
            )


def _check_allowed(allowed: bytes, vocabulary: int) -> None:
    if len(allowed) != (vocabulary + 7) // 8:
        raise FrameError(f"a mask of {len(allowed)} bytes for {vocabulary} tokens")
    if vocabulary % 8 and allowed[-1] >> vocabulary % 8:
        raise FrameError(f"a mask allows tokens beyond {vocabulary}")
    if not allowed.strip(b"\0"):
        raise FrameError("a mask allows no token")


def leaves_to_stage(choice: Choice) -> bool:
    """Whether the stage that has the logits may choose, rather than the head alone."""
    return bool(choice.allowed) or not choice.all


def may_be(choice: Choice, token: int) -> bool:
    """Whether a stage may answer a choice by that token of the vocabulary."""
    if not choice.allowed:
        return not choice.all
    return bool(choice.allowed[token // 8] >> token % 8 & 1)


def choose_tokens(frame: Frame) -> None:
    """Replaces the logits of a frame by its choices, and by the logits of those not sure.

    A frame of which nothing can be chosen keeps its logits. Raises FrameError for masks that are
    not of these logits.
    """
    choices = list(frame.choices)
    del frame.choices[:]
    tensor = frame.hidden[0].tensor
    if len(frame.hidden) > 1 or tensor.dtype not in STEPS or not any(map(leaves_to_stage, choices)):
        return
    logits = _floats(tensor).reshape(len(choices), -1)
    for each in choices:
        if each.allowed:
            _check_allowed(each.allowed, logits.shape[1])
    step = STEPS[tensor.dtype]
    chosen = [choose(row, choice, step) for row, choice in zip(logits, choices, strict=True)]
    frame.chosen.extend(0 if token is None else token + 1 for token in chosen)
    unsure = [row for row, token in enumerate(chosen) if token is None]
    if not unsure:
        del frame.hidden[:]
        return
    if len(unsure) < len(choices):
        width = len(tensor.data) // len(choices)
        data = memoryview(tensor.data)
        tensor.data = b"".join(data[row * width : (row + 1) * width] for row in unsure)
    tensor.shape[:] = [len(unsure), logits.shape[1]]


def choose(logits: Floats, choice: Choice, step: float = STEPS["float32"]) -> int | None:
    """The token that mlx-lm chooses of logits (vocabulary,) in a dtype of that relative `step`.

    None if it is not sure, or if the logits are wanted.
    """
    if not leaves_to_stage(choice):
        return None
    if not choice.allowed:
        return _chosen(logits, choice, step)
    bits = np.frombuffer(choice.allowed, np.uint8)
    allowed = np.flatnonzero(np.unpackbits(bits, count=len(logits), bitorder="little"))
    place = _chosen(logits[allowed], choice, step)
    return None if place is None else int(allowed[place])


def _chosen(logits: Floats, choice: Choice, step: float) -> int | None:
    """The place of the chosen one among logits of tokens in ascending order, of any number."""
    if not len(logits):
        return None
    best = float(logits.max())
    if not math.isfinite(best) or np.isnan(logits).any():
        return None
    if len(logits) == 1:
        return 0
    # How close two logits may be that become the same, or change places, as logprobs.
    close = 4 * step * (abs(best) + MOST_SPREAD)
    if choice.temperature < GREEDY_BELOW:
        token = int(logits.argmax())
        return token if np.count_nonzero(logits >= best - close) == 1 else None
    if step > STEPS["float32"]:
        return None  # MLX would draw in as few bits
    return _drawn(logits, choice, best, close)


def _drawn(logits: Floats, choice: Choice, best: float, close: float) -> int | None:
    below = logits - np.float32(best)
    if 0 < choice.top_p < 1 or choice.min_p > 0 or 0 < choice.top_k < len(logits):
        kept = _kept(below, choice, close)
        if kept is None:
            return None
    else:
        kept = np.arange(len(logits))
    weights: Numbers = np.exp(below[kept].astype(np.float64) / choice.temperature)
    ends = np.cumsum(weights)
    total = float(ends[-1])
    place = choice.draw * total
    at = int(np.searchsorted(ends, place, side="right"))
    # The exponents are float32, divided by the temperature.
    off = total * (_sum_error(weights / total) + close / choice.temperature)
    first, last = (np.flatnonzero(weights)[end] for end in (0, -1))
    after_start = at <= first or place - ends[at - 1] > off
    before_end = at >= last or ends[min(at, len(ends) - 1)] - place > off
    return int(kept[min(at, last)]) if after_start and before_end else None


def _kept(below: Floats, choice: Choice, close: float) -> np.ndarray[Any, Any] | None:
    """Tokens that top_p, min_p and top_k keep, in ascending order; None if that is not sure.

    Each of them keeps the most likely ones. below: logits less the best.
    """
    weights = np.exp(below)
    total = float(weights.sum(dtype=np.float64))
    for reach in REACHES:
        tokens = np.flatnonzero(below >= -reach)
        tokens = tokens[np.argsort(-below[tokens], kind="stable")]
        whole = len(tokens) == len(below)
        levels = below[tokens].astype(np.float64)
        mass = np.exp(levels) / total
        bounds = []
        if 0 < choice.top_p < 1:
            above = np.cumsum(mass) - mass
            off = _sum_error(weights / total) + close
            least = int(np.count_nonzero(above < choice.top_p - off))
            most = int(np.count_nonzero(above < choice.top_p + off))
            bounds.append((max(least, 1), _ties(levels, most, close)))
        if choice.min_p > 0:
            lowest = math.log(choice.min_p)
            bounds.append(
                (
                    int(np.count_nonzero(levels >= lowest + close)),
                    int(np.count_nonzero(levels >= lowest - close)),
                )
            )
        if 0 < choice.top_k < len(below):
            count = min(choice.top_k, len(levels))
            level = levels[count - 1]
            least = int(np.count_nonzero(levels > level + close))
            ties = _ties(levels, count, close)
            bounds.append((count if ties == count else least, ties))
        least, most = (min(column) for column in zip(*bounds, strict=True))
        if most < len(tokens) or whole:
            return np.sort(tokens[:least]) if least == most and least else None
    return None


def _ties(levels: Numbers, count: int, close: float) -> int:
    """How many of descending levels are as high as the one at place `count`, or nearly so."""
    return int(np.count_nonzero(levels >= levels[count - 1] - close))


def _sum_error(parts: np.ndarray[Any, Any]) -> float:
    """How far float32 sums of parts of 1 may be off."""
    return SUMS * float(np.minimum(parts, HALF_STEP).sum(dtype=np.float64)) + ROUNDING


def _floats(tensor: Tensor) -> Floats:
    if tensor.dtype == "bfloat16":
        return (np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    kind: Any = np.float16 if tensor.dtype == "float16" else np.float32
    return np.frombuffer(tensor.data, kind).astype(np.float32, copy=False)
