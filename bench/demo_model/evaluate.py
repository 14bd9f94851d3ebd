"""Measures the demo model, skill by skill, on phrasings that it was not trained on.

    python -m bench.demo_model.evaluate

Greedy decoding with plain mlx-lm; an answer counts only if it is right to the letter.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import mlx_lm
from mlx_lm.sample_utils import make_sampler

from bench.demo_model import facts
from bench.demo_model.arithmetic import listed, operands, solve
from bench.demo_model.dialogue import Dialogue, article, made_up
from bench.demo_model.facts import words
from bench.demo_model.stories import story

MODEL = Path(__file__).parents[2] / "node" / "demo" / "model"
EACH = 40


class DemoModel:
    """The model in `folder`, answering one conversation at a time."""

    def __init__(self, folder: Path = MODEL) -> None:
        loaded: Any = mlx_lm.load(str(folder))
        self.model, self.tokenizer = loaded[:2]

    def answer(self, messages: list[dict[str, str]], max_tokens: int = 600) -> str:
        """The greedy answer to the last of these chat messages."""
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        text: str = mlx_lm.generate(
            self.model,
            self.tokenizer,
            prompt=prompt,
            max_tokens=max_tokens,
            sampler=make_sampler(temp=0.0),
        )
        return text

    def follows(self, dialogue: Dialogue) -> str | None:
        """The first wrong answer in this dialogue, or None. Its own answers are the history."""
        messages: list[dict[str, str]] = []
        for question, expected in dialogue:
            messages.append({"role": "user", "content": question})
            answer = self.answer(messages)
            if answer != expected:
                return answer
            messages.append({"role": "assistant", "content": answer})
        return None


PHRASINGS = {
    "arithmetic": "Would you compute {} for me?|I need the result of {}.|How many is {}?|"
    "hey, what's {} please?|Result of {}?",
    "count up": "Please count for me from {} to {}.|Count starting at {} up to {}.",
    "count down": "Please count backwards, from {} to {}.|Count downwards from {} to {}.",
    "count by twos": "Starting from {}, count by twos to {}.|By twos, count from {} to {}.",
    "capitals": "Could you name {}'s capital city?|Which one is the capital of {}?",
    "capitals, follow-up": "Ok, and of {}?|And that of {}?|What about that of {}?",
    "opposites": "Could you give me the opposite of {}?|What would be the opposite of {}?",
    "days and months": "Which {} is right after {}?|Name the {} that comes after {}.",
    "colours": "Could you say what colour {} is?|What is the usual colour of {}?",
    "names, remembered": "So what is my name?|Can you tell me my name?",
    "stories": "Please tell me a little story about {}.|I'd like a tiny story about {}.",
    "things outside": "Teach me about {}.|Can you explain {} to me?|What do you know of {}?",
}
SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
SPOKEN = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
OUTSIDE = ("string theory", "tax returns", "the French Revolution", "sonnets", "knitting", "radar")


def numeric_case(skill: str, rng: Random) -> Dialogue:
    if skill in SIGNS:
        sign = SIGNS[skill]
        a, b = operands(rng, sign)
        between = rng.choice([sign, f" {sign} ", f" {SPOKEN[sign]} "])
        asked = rng.choice(words(PHRASINGS["arithmetic"], "|"))
        return [(asked.format(f"{a}{between}{b}"), solve(a, sign, b))]
    a = rng.randint(0, 40)
    step = {"count up": 1, "count down": -1, "count by twos": 2}[skill]
    b = a + abs(step) * rng.randint(3, 15)
    if step < 0:
        a, b = b, a
    asked = rng.choice(words(PHRASINGS[skill], "|"))
    return [(asked.format(a, b), listed(range(a, b + step // abs(step), step)))]


def factual_case(skill: str, rng: Random) -> Dialogue:
    asked = rng.choice(words(PHRASINGS[skill], "|"))
    if skill.startswith("capitals"):
        (one, city), (two, other) = rng.sample(list(facts.CAPITALS.items()), 2)
        first = (f"What is the capital of {one}?", f"The capital of {one} is {city}.")
        last = (asked.format(two), f"The capital of {two} is {other}.")
        return [last] if skill == "capitals" else [first, last]
    if skill == "opposites":
        a, b = rng.choice(facts.OPPOSITES.split("|")).split()
        return [(asked.format(a), f"The opposite of {a} is {b}.")]
    if skill == "colours":
        thing, colour = rng.choice(list(facts.COLOURS.items()))
        return [(asked.format(thing), f"{thing[0].upper()}{thing[1:]} is {colour}.")]
    kind, names = rng.choice([("day", facts.DAYS), ("month", facts.MONTHS)])
    i = rng.randrange(len(names))
    after = names[(i + 1) % len(names)]
    return [(asked.format(kind, names[i]), f"{after} comes after {names[i]}.")]


def talk_case(skill: str, rng: Random) -> Dialogue:
    asked = rng.choice(words(PHRASINGS[skill], "|"))
    if skill == "stories":
        subject = rng.choice(list(facts.ANIMALS))
        text = story(rng, subject, "", "", long=False)
        return [(asked.format(f"{article(subject)} {subject}"), text)]
    if skill == "things outside":
        return [(asked.format(rng.choice(OUTSIDE)), facts.UNKNOWN)]
    name = rng.choice([*facts.PEOPLE, made_up(rng).capitalize()])
    hello = (f"Good day, my name is {name}.", f"Nice to meet you, {name}!")
    return [hello, ("What is 2 plus 2?", "2 + 2 = 4."), (asked, f"Your name is {name}.")]


CASES: dict[str, Callable[[str, Random], Dialogue]] = {
    **dict.fromkeys(
        ("add", "subtract", "multiply", "divide", "count up", "count down", "count by twos"),
        numeric_case,
    ),
    **dict.fromkeys(
        ("capitals", "capitals, follow-up", "opposites", "days and months", "colours"),
        factual_case,
    ),
    **dict.fromkeys(("names, remembered", "stories", "things outside"), talk_case),
}


def main() -> None:
    demo = DemoModel(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL)
    for skill, case in CASES.items():
        rng = Random(skill)
        dialogues = [case(skill, rng) for _ in range(EACH)]
        wrong = [(d, answer) for d in dialogues if (answer := demo.follows(d)) is not None]
        print(f"{skill:22} {EACH - len(wrong):3} of {EACH} right", flush=True)
        for dialogue, answer in wrong[:2]:
            print(f"    {dialogue[-1][0]!r}: {answer!r}")


if __name__ == "__main__":
    main()
