"""The shape of a dialogue, which all skills share, and words to put into it."""

from collections.abc import Callable
from random import Random

from bench.demo_model import facts
from bench.demo_model.facts import words

Dialogue = list[tuple[str, str]]
"""Pairs of what the user says and the right answer."""

Skill = Callable[[Random], Dialogue]
"""Draws one short dialogue."""


CONSONANTS = words("b c d f g h k l m n p r s t v w z ch sh st tr br")


def article(noun: str) -> str:
    return "an" if noun[0].lower() in "aeiou" else "a"


def made_up(rng: Random) -> str:
    """A word that no dictionary has: copying it can't be learned by heart."""
    word = "".join(rng.choice(CONSONANTS) + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))
    return word + rng.choice(["", "n", "r", "l", "x", "m", "ck"])


def any_word(rng: Random) -> str:
    known = (*facts.WORDS, *facts.ANIMALS, *facts.CAPITALS.values(), *facts.PEOPLE)
    return rng.choice([rng.choice(known), made_up(rng)])
