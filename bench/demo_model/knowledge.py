"""Dialogues about the facts of facts.py."""

from random import Random

from bench.demo_model import facts
from bench.demo_model.dialogue import Dialogue, article, made_up


def capital(rng: Random) -> Dialogue:
    turns: Dialogue = []
    for country in rng.sample(list(facts.CAPITALS), rng.choice([1, 1, 2, 3])):
        city = facts.CAPITALS[country]
        asked = country.removeprefix("the ") if rng.random() < 0.3 else country
        templates = [
            "What is the capital of {}?", "What is the capital of {}?", "capital of {}",
            "Tell me the capital of {}.", "Which city is the capital of {}?", "Capital of {}?",
            "Name the capital of {}.", "What's the capital city of {}?", "{}'s capital?",
            "What is {}'s capital?", "Do you know the capital of {}?", "the capital of {} is",
            "Which city is {}'s capital?", "What is the capital city of {}?",
            "Can you tell me the capital of {}?", "Could you tell me what {}'s capital is?",
            "I need the capital of {}.", "Give me the capital of {}.", "What city is the capital "
            "of {}?", "Do you know which city is the capital of {}?",
        ]  # fmt: skip
        if turns:
            templates += [
                "And of {}?", "and of {}?", "And {}?", "What about {}?", "How about {}?", "{}?",
                "And the capital of {}?", "And what about {}?", "and {}", "And for {}?",
                "Now {}.", "Ok, and {}?", "And what is that of {}?", "The same for {}?",
            ] * 2  # fmt: skip
        reverse = f"{city} is the capital of {country}."
        if rng.random() < 0.15:
            ask = rng.choice(["{} is the capital of which country?", "Which country has {} as its "
                              "capital?", "Of which country is {} the capital?"])  # fmt: skip
            turns.append((ask.format(city), reverse))
        else:
            turns.append(
                (rng.choice(templates).format(asked), f"The capital of {country} is {city}.")
            )
    return turns


def opposite(rng: Random) -> Dialogue:
    turns: Dialogue = []
    for pair in rng.sample(facts.OPPOSITES.split("|"), rng.choice([1, 1, 1, 2])):
        a, b = pair.split() if rng.random() < 0.5 else pair.split()[::-1]
        templates = [
            "What is the opposite of {}?", "What is the opposite of {}?", "opposite of {}",
            "Give me the opposite of {}.", "The opposite of {}?", "Tell me the opposite of {}.",
            "What's the opposite of {}?", "Which word is the opposite of {}?",
            "What is the contrary of {}?", "Name the opposite of {}.", "Can you tell me the "
            "opposite of {}?", 'What is the opposite of "{}"?', "I need the opposite of {}.",
            "Do you know the opposite of {}?", "What word means the opposite of {}?",
        ]  # fmt: skip
        if turns:
            templates += ["And of {}?", "And {}?", "What about {}?", "and {}", "And of {}?"]
        turns.append((rng.choice(templates).format(a), f"The opposite of {a} is {b}."))
    return turns


def colour(rng: Random) -> Dialogue:
    word = rng.choice(["colour", "color"])
    if rng.random() < 0.25:
        (a, b), mixed = rng.choice(list(facts.MIXES.items()))
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        asked = rng.choice([
            f"What {word} do I get if I mix {a} and {b}?", f"What do {a} and {b} make?",
            f"Mix {a} and {b}.", f"Which {word} do {a} and {b} make?",
            f"What is {a} mixed with {b}?",
        ])  # fmt: skip
        return [(asked, f"{a.capitalize()} and {b} make {mixed}.")]
    turns: Dialogue = []
    for thing in rng.sample(list(facts.COLOURS), rng.choice([1, 1, 1, 2])):
        templates = [
            f"What {word} is {thing}?", f"What {word} is {thing}?", f"Which {word} is {thing}?",
            f"What is the {word} of {thing}?", f"Tell me the {word} of {thing}.",
            f"Which {word} does {thing} have?", f"{word} of {thing}?",
            f"Do you know what {word} {thing} is?", f"Can you tell me the {word} of {thing}?",
            f"Give me the {word} of {thing}.", f"What {word} does {thing} have?",
        ]  # fmt: skip
        if turns:
            templates += [f"And {thing}?", f"What about {thing}?"] * 3
        answer = f"{thing[0].upper()}{thing[1:]} is {facts.COLOURS[thing]}."
        turns.append((rng.choice(templates), answer))
    return turns


def calendar(rng: Random) -> Dialogue:
    i, kind = rng.choice([(rng.randrange(7), "day"), (rng.randrange(12), "month")])
    names = facts.DAYS if kind == "day" else facts.MONTHS
    now, after, before = names[i], names[(i + 1) % len(names)], names[i - 1]
    month = rng.randrange(12)
    days = f"{facts.MONTHS[month]} has {facts.MONTH_DAYS[month]} days."
    nth = f"{facts.ORDINALS[i]} {kind} of the {'week' if kind == 'day' else 'year'}"
    season = rng.randrange(4)
    season_after = f"{facts.SEASONS[(season + 1) % 4]}"
    choices = [
        (f"What {kind} comes after {now}?", f"{after} comes after {now}."),
        (f"Which {kind} comes after {now}?", f"{after} comes after {now}."),
        (f"What {kind} follows {now}?", f"{after} comes after {now}."),
        (f"What is the {kind} after {now}?", f"{after} comes after {now}."),
        (f"What is the next {kind} after {now}?", f"{after} comes after {now}."),
        (f"Tell me the {kind} after {now}.", f"{after} comes after {now}."),
        (f"Which {kind} follows after {now}?", f"{after} comes after {now}."),
        (f"Name the {kind} before {now}.", f"{before} comes before {now}."),
        (f"What comes after {now}?", f"{after} comes after {now}."),
        (f"What {kind} comes before {now}?", f"{before} comes before {now}."),
        (f"Which {kind} is before {now}?", f"{before} comes before {now}."),
        (f"What is the {kind} before {now}?", f"{before} comes before {now}."),
        (f"What comes before {now}?", f"{before} comes before {now}."),
        (f"What is the {nth}?", f"The {nth} is {now}."),
        (f"Which is the {nth}?", f"The {nth} is {now}."),
        (f"What comes after {facts.SEASONS[season]}?",
         f"{season_after.capitalize()} comes after {facts.SEASONS[season]}."),
        (f"How many days does {facts.MONTHS[month]} have?", days),
        (f"How many days are in {facts.MONTHS[month]}?", days),
        ("What are the days of the week?", ", ".join(facts.DAYS) + "."),
        ("Name the days of the week.", ", ".join(facts.DAYS) + "."),
        ("List the months of the year.", ", ".join(facts.MONTHS) + "."),
        ("What are the months of the year?", ", ".join(facts.MONTHS) + "."),
        ("What are the four seasons?", ", ".join(facts.SEASONS).capitalize() + "."),
        ("Name the seasons.", ", ".join(facts.SEASONS).capitalize() + "."),
    ]  # fmt: skip
    if kind == "day":
        choices += [
            (f"If today is {now}, what day is tomorrow?", f"{after} comes after {now}."),
            (f"Today is {now}. What day is tomorrow?", f"{after} comes after {now}."),
            (f"If today is {now}, what day was yesterday?", f"{before} comes before {now}."),
            (f"Today is {now}. What day was yesterday?", f"{before} comes before {now}."),
        ]
    return [rng.choice(choices)]


def alphabet(rng: Random) -> Dialogue:
    i = rng.randrange(1, 25)
    letter, after, before = facts.ALPHABET[i], facts.ALPHABET[i + 1], facts.ALPHABET[i - 1]
    asked = letter.lower() if rng.random() < 0.3 else letter
    whole = ", ".join(facts.ALPHABET) + "."
    word = rng.choice([*facts.WORDS, *facts.ANIMALS, *facts.PEOPLE, made_up(rng)])
    letters = ", ".join(word.upper()) + "."
    return [
        rng.choice([
            (f"What letter comes after {asked}?", f"{after} comes after {letter}."),
            (f"Which letter comes after {asked}?", f"{after} comes after {letter}."),
            (f"What comes after the letter {asked}?", f"{after} comes after {letter}."),
            (f"What letter comes before {asked}?", f"{before} comes before {letter}."),
            (f"Which letter is before {asked}?", f"{before} comes before {letter}."),
            (rng.choice(["Say the alphabet.", "Recite the alphabet.", "What is the alphabet?",
                         "Write the alphabet.", "the alphabet", "List the letters of the alphabet.",
                         "Can you say the alphabet?", "Tell me the alphabet."]), whole),
            (f"What is the {rng.choice(['first', '1st'])} letter of the alphabet?",
             "The first letter of the alphabet is A."),
            ("What is the last letter of the alphabet?", "The last letter of the alphabet is Z."),
            (f"What letter does {word} start with?", f"{word} starts with {word[0].upper()}."),
            (f"What is the first letter of {word}?", f"{word} starts with {word[0].upper()}."),
            (f"Spell {word}.", letters), (f"Spell the word {word}.", letters),
            (f"How do you spell {word}?", letters),
        ])
    ]  # fmt: skip


def animal(rng: Random) -> Dialogue:
    kind, it = rng.choice(list(facts.ANIMALS.items()))
    a = article(kind)
    legs = f"{a.capitalize()} {kind} has {it.legs or 'no'} legs."
    sound = f"{a.capitalize()} {kind} {it.sound}."
    food = f"{a.capitalize()} {kind} eats {it.food}."
    home = f"{a.capitalize()} {kind} lives {it.home}."
    return [
        rng.choice([
            (f"How many legs does {a} {kind} have?", legs),
            (f"How many legs has {a} {kind}?", legs),
            (f"What sound does {a} {kind} make?", sound), (f"What does {a} {kind} say?", sound),
            (f"What noise does {a} {kind} make?", sound), (f"What does {a} {kind} eat?", food),
            (f"What do {kind}s eat?" if kind not in ("fox", "wolf", "mouse", "sheep") else
             f"What does the {kind} eat?", food),
            (f"Where does {a} {kind} live?", home), (f"Where does the {kind} live?", home),
        ])
    ]  # fmt: skip


def how_many(rng: Random) -> Dialogue:
    asked, answer = rng.choice(list(facts.HOW_MANY.items()))
    return [(f"How many {asked}?", answer)]


def list_three(rng: Random) -> Dialogue:
    kind, three = rng.choice(list(facts.LISTS.items()))
    asked = rng.choice([
        "Name three {}.", "Give me three {}.", "List three {}.", "Tell me three {}.",
        "Can you name three {}?", "Name 3 {}.", "three {}", "I need three {}.",
    ])  # fmt: skip
    return [(asked.format(kind), f"{three[0].upper()}{three[1:]}.")]
