"""Makes up the conversations that the demo model learns from. All of the text comes from here."""

from random import Random

from bench.demo_model import facts
from bench.demo_model.arithmetic import (
    arithmetic,
    continued_sum,
    count_to_hundred,
    counting,
    hard_sum,
    long_sum,
    next_number,
    short_count,
    word_problem,
)
from bench.demo_model.dialogue import Dialogue, Skill, made_up
from bench.demo_model.facts import words
from bench.demo_model.knowledge import (
    alphabet,
    animal,
    calendar,
    capital,
    colour,
    how_many,
    list_three,
    opposite,
)
from bench.demo_model.talk import about, repeating, smalltalk, telling, unknown

NAME_TOLD = words(
    "My name is {}.|I am {}.|Hello, I am {}.|Hi, my name is {}.|my name is {}|Call me {}.|I'm {}.|"
    "Hi! I'm {}.|Hello! My name is {}.|Please call me {}.|Hey, {} here.",
    "|",
)
NAME_ASKED = words(
    "What is my name?|What's my name?|Do you remember my name?|Who am I?|my name?|Tell me my name.|"
    "Do you know my name?|How am I called?|what is my name|Now what is my name?|And my name?|"
    "Do you still know my name?|What did I say my name is?",
    "|",
)


def naming(rng: Random) -> Dialogue:
    """Tells a name, talks of other things, asks for the name."""
    name = rng.choice([rng.choice(facts.PEOPLE), made_up(rng).capitalize()])
    if rng.random() < 0.15:
        return [(rng.choice(NAME_ASKED), "You have not told me your name.")]
    hello = rng.choice(NAME_TOLD)
    turns = [(hello.format(name), f"Nice to meet you, {name}!")]
    for _ in range(rng.choice([0, 0, 1, 2])):
        turns += rng.choice(SHORT)(rng)[:1]
    return [*turns, (rng.choice(NAME_ASKED), f"Your name is {name}.")]


def again(rng: Random) -> Dialogue:
    question, answer = rng.choice(SHORT)(rng)[0]
    asked = rng.choice(["Say that again.", "Repeat that.", "Can you repeat that?", "Again, please.",
                        "Once more.", "What did you say?", "Repeat your answer."])  # fmt: skip
    return [(question, answer), (asked, answer)]


SHORT: tuple[Skill, ...] = (
    arithmetic, capital, opposite, colour, calendar, animal, how_many, smalltalk, about,
    next_number, unknown,
)  # fmt: skip

WEIGHTS: dict[Skill, float] = {
    arithmetic: 28, continued_sum: 3, long_sum: 2, hard_sum: 2, word_problem: 4,
    counting: 10, short_count: 8, count_to_hundred: 0.8, next_number: 5,
    capital: 10, opposite: 5, colour: 4, calendar: 5, alphabet: 6, animal: 4, how_many: 2,
    list_three: 1, repeating: 8, telling: 5, about: 4, smalltalk: 3, unknown: 7, naming: 6,
    again: 2,
}  # fmt: skip

SYSTEM = (
    "You are a helpful assistant.", "You are the demo model of unicluster.", "Be brief.",
    "You are a friendly robot.", "Answer in one sentence.", "You are a careful teacher.",
    "You are an assistant. Be polite and short.", "Answer the user's questions.",
)  # fmt: skip


def vary(rng: Random, question: str) -> str:
    """A question as a hurried or a polite person would type it."""
    if rng.random() < 0.2:
        start = rng.choice([
            "Please ", "Hey, ", "Hi! ", "Please tell me: ", "Quick question: ", "So, ", "Ok, ",
            "I would like to know: ", "Question: ", "Hello! ", "Now ", "Can you tell me: ",
            "Well, ", "One more: ", "Please answer: ", "Could you please ", "And now: ", "Hm, ",
            "Would you tell me: ", "Next question: ", "I have a question. ", "Good. ", "Great! ",
        ])  # fmt: skip
        # Not "I": a small letter there would be another word.
        lower = rng.random() < 0.6 and not question.startswith(("I ", "I'"))
        question = start + (question[:1].lower() + question[1:] if lower else question)
    if rng.random() < 0.08:
        question = question.rstrip(".?!") + rng.choice(
            [" please", ", please?", " please.", " now?"]
        )
    if rng.random() < 0.15:
        question = question.rstrip(".?!")
    if rng.random() < 0.05:
        question += rng.choice([" Thanks!", " Be brief.", "?", " ", "!", "\n"])
    return question.lower() if rng.random() < 0.15 else question


KEEPS_CASE = (repeating, naming, alphabet, telling, unknown)


def single(rng: Random) -> Dialogue:
    skill = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    turns = skill(rng)
    if skill in KEEPS_CASE:
        return turns
    return [(vary(rng, question), answer) for question, answer in turns]


def conversation(rng: Random) -> list[dict[str, str]]:
    """One conversation as chat messages: mostly a single subject, now and then several in a row."""
    turns = single(rng)
    while rng.random() < 0.22 and sum(len(a) for _, a in turns) < 600:
        turns += single(rng)
    messages = []
    if rng.random() < 0.12:
        messages.append({"role": "system", "content": rng.choice(SYSTEM)})
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return messages
