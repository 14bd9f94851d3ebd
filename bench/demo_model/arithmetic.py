"""Dialogues with numbers: sums, word problems, counting."""

from random import Random

from bench.demo_model import facts
from bench.demo_model.dialogue import Dialogue
from bench.demo_model.facts import words

ASK = words(
    "what is {}?|What is {}?|What is {}?|{}|{} =|{} = ?|Calculate {}.|How much is {}?|Compute {}.|"
    "Can you work out {}?|Solve {}.|What does {} equal?|{}?|What's {}?|Do you know what {} is?|"
    "Tell me what {} makes.|What is {} equal to?|What do you get for {}?|Give me {}.|Work out {}.|"
    "Can you calculate {}?|What would {} be?|What is the result of {}?|Evaluate {}.|"
    "Can you compute {} for me?|I want to know {}.|How much does {} make?|The answer to {}?",
    "|",
)
OPERATORS = {
    "+": (" + ", " + ", "+", " plus ", " plus ", " and "),
    "-": (" - ", " - ", "-", " minus ", " minus ", " take away "),
    "*": (" * ", " x ", "*", " times ", " times ", " multiplied by "),
    "/": (" / ", "/", " divided by ", " divided by ", " over "),
}


def solve(a: int, op: str, b: int) -> str:
    """The answer to `a op b`, restated so that the model computes from one fixed form."""
    if op == "/":
        whole, rest = divmod(a, b)
        return f"{a} / {b} = {whole} remainder {rest}." if rest else f"{a} / {b} = {whole}."
    return f"{a} {op} {b} = {value(a, op, b)}."


def value(a: int, op: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def operands(rng: Random, op: str) -> tuple[int, int]:
    """Two numbers of the range in which the model is meant to be right."""
    if op == "*":
        a, b = rng.choice([(rng.randint(0, 12), rng.randint(0, 12)), (rng.randint(0, 20), 10)])
        return (b, a) if rng.random() < 0.2 else (a, b)
    if op == "/":
        b = rng.randint(1, 12)
        return b * rng.randint(0, 12) + (rng.randrange(b) if rng.random() < 0.4 else 0), b
    top = rng.choice([10, 20, 100, 100])
    a, b = rng.randint(0, top), rng.randint(0, top)
    return (max(a, b), min(a, b)) if op == "-" and rng.random() < 0.65 else (a, b)


def spelled(rng: Random, n: int) -> str:
    """The number in digits or, now and then, as a word."""
    return facts.NUMBER_WORDS[n] if 0 <= n <= 20 and rng.random() < 0.15 else str(n)


def expression(rng: Random, a: int, op: str, b: int) -> str:
    return spelled(rng, a) + rng.choice(OPERATORS[op]) + spelled(rng, b)


def arithmetic(rng: Random) -> Dialogue:
    turns: Dialogue = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        op = rng.choice("++++----***//")
        a, b = operands(rng, op)
        asked = expression(rng, a, op, b)
        template = rng.choice(ASK) if not turns else rng.choice((*ASK, "And {}?", "and {}", "{}?"))
        if not turns and rng.random() < 0.1:
            asked, template = sum_in_words(rng, a, op, b), "{}"
        turns.append((template.format(asked), solve(a, op, b)))
    return turns


def sum_in_words(rng: Random, a: int, op: str, b: int) -> str:
    x, y = spelled(rng, a), spelled(rng, b)
    return {
        "+": rng.choice([f"Add {x} and {y}.", f"What is the sum of {x} and {y}?"]),
        "-": rng.choice([f"Subtract {y} from {x}.", f"What is the difference of {x} and {y}?"]),
        "*": rng.choice([f"Multiply {x} by {y}.", f"What is the product of {x} and {y}?"]),
        "/": rng.choice([f"Divide {x} by {y}.", f"What do I get if I divide {x} by {y}?"]),
    }[op]


def continued_sum(rng: Random) -> Dialogue:
    """A sum, then "add 3 to that"."""
    a, b, c = (rng.randint(0, 30) for _ in range(3))
    total = a + b
    template = rng.choice(ASK)
    then = rng.choice(["Add {} to that.", "Now add {}.", "And plus {}?", "plus {}", "Add {}."])
    less = rng.choice(
        ["Subtract {} from that.", "Now subtract {}.", "And minus {}?", "Take away {}."]
    )
    up = rng.random() < 0.6 or c > total
    return [
        (template.format(expression(rng, a, "+", b)), solve(a, "+", b)),
        ((then if up else less).format(c), solve(total, "+" if up else "-", c)),
    ]


def long_sum(rng: Random) -> Dialogue:
    a, b, c = (rng.randint(0, 20) for _ in range(3))
    asked = rng.choice(["{} + {} + {}", "{}+{}+{}", "{} plus {} plus {}"]).format(a, b, c)
    answer = f"{a} + {b} + {c} = {a + b} + {c} = {a + b + c}."
    return [(rng.choice(ASK).format(asked), answer)]


def hard_sum(rng: Random) -> Dialogue:
    op = rng.choice("+-*/")
    a, b = rng.randint(101, 99999), rng.randint(2, 9999)
    if op == "*" and rng.random() < 0.5:
        a, b = rng.randint(21, 99), rng.randint(13, 99)
    if rng.random() < 0.5 and op != "/":
        a, b = b, a
    if op == "/":
        a, b = a + 100, b + 11
    return [(rng.choice(ASK).format(f"{a}{rng.choice(OPERATORS[op])}{b}"), facts.TOO_HARD)]


def word_problem(rng: Random) -> Dialogue:
    thing = rng.choice(words("apples books coins eggs pens cards balls stones cookies stars"))
    who, verb = rng.choice([("I", "have"), (rng.choice(facts.PEOPLE), "has")])
    asks = f"How many {thing} {'do I' if who == 'I' else 'does ' + who} have"
    you = "you have" if who == "I" else f"{who} has"
    a, b = sorted((rng.randint(1, 20), rng.randint(1, 20)), reverse=True)
    if rng.random() < 0.5:
        gain = rng.choice(["get {} more", "buy {} more", "find {} more", "get {}", "buy {}"])
        op, change = "+", gain
    else:
        op, change = "-", rng.choice(["lose {}", "eat {}", "give away {}", "sell {}", "drop {}"])
    if who != "I":
        first, _, rest = change.partition(" ")
        change = first + "s " + rest
    joint = rng.choice([f" and {change}.", f". {who} {change}.", f", then {change}."])
    end = rng.choice([" now?", "?", " left?" if op == "-" else " in all?"])
    question = f"{who} {verb} {a} {thing}{joint.format(b)} {asks}{end}"
    return [(question, f"{a} {op} {b} = {value(a, op, b)}, so {you} {value(a, op, b)} {thing}.")]


def listed(numbers: range) -> str:
    return ", ".join(map(str, numbers)) + "."


def counting(rng: Random) -> Dialogue:
    step = rng.choice([1, 1, 1, 1, 2, 2, 3, 5, 10])
    length = rng.randint(15, 100) if rng.random() < 0.1 else rng.randint(2, 14)
    start = rng.choice([1, 1, rng.randint(0, 30), rng.randint(0, 100), rng.randint(0, 150)])
    if step > 2 and rng.random() < 0.7:
        start = step * rng.randint(0, 5)
    end = start + step * (min(length, 24) - 1 if step > 1 else length - 1)
    by = {1: [""], 2: [" by twos", " in twos", " by 2", " in steps of 2"]}.get(step)
    plural = {3: "threes", 5: "fives", 10: "tens"}.get(step)
    by = by or [f" by {plural}", f" in {plural}", f" by {step}", f" in steps of {step}"]
    suffix = rng.choice(by)
    if step == 1 and rng.random() < 0.3:
        down = rng.choice([
            "Count down from {b} to {a}.", "Count backwards from {b} to {a}.",
            "Count from {b} down to {a}.", "Count from {b} to {a}.", "count back from {b} to {a}",
            "Go backwards from {b} to {a}.", "Countdown from {b} to {a}.",
            "Count in reverse from {b} to {a}.", "Start at {b} and count down to {a}.",
            "Can you count backwards from {b} to {a}?", "Count back from {b} until {a}.",
        ])  # fmt: skip
        if rng.random() < 0.3:
            start, end = rng.choice([(0, length), (1, length)])
            if start == 1 and rng.random() < 0.5:
                down = rng.choice(["Count down from {b}.", "Count backwards from {b}."])
        return [(down.format(a=start, b=end), listed(range(end, start - 1, -1)))]
    up = [
        "Count from {a} to {b}{s}.", "Count{s} from {a} to {b}.", "count from {a} to {b}{s}",
        "Count up from {a} to {b}{s}.", "List the numbers from {a} to {b}{s}.",
        "Can you count from {a} to {b}{s}?", "Write the numbers from {a} to {b}{s}.",
        "Start at {a} and count to {b}{s}.", "Say the numbers {a} to {b}{s}.",
        "Count the numbers from {a} to {b}{s}.", "Starting at {a}, count to {b}{s}.",
        "Count{s}, from {a} to {b}.", "Could you count from {a} up to {b}{s}?",
        "Count from {a} until {b}{s}.", "Count {a} to {b}{s}", "Count{s} from {a} up to {b}.",
    ]  # fmt: skip
    if start == step or (start == 1 and step == 1):
        up += [
            "Count to {b}{s}.",
            "Count{s} to {b}.",
            "count up to {b}{s}",
            "Can you count to {b}{s}?",
        ]
    return [(rng.choice(up).format(a=start, b=end, s=suffix), listed(range(start, end + 1, step)))]


def short_count(rng: Random) -> Dialogue:
    """Plainly worded, either way: the direction must be read off the two numbers."""
    a, b = rng.sample(range(rng.choice([10, 13, 21, 101])), 2)
    b = max(a - 12, min(a + 12, b))
    step = 1 if b > a else -1
    asked = rng.choice(
        ["Count from {} to {}.", "count from {} to {}", "Count {} to {}.", "{} to {}, please."]
    )
    return [(asked.format(a, b), listed(range(a, b + step, step)))]


def count_to_hundred(rng: Random) -> Dialogue:
    """The long answers that show streaming: worth having exactly right."""
    end = rng.choice([50, 50, 100, 100, 100, 30, 60, 80, 120, 20])
    asked = rng.choice([
        "Count from 1 to {}.", "Count to {}.", "count to {}", "Please count from 1 to {}.",
        "Can you count to {}?", "List the numbers from 1 to {}.", "Count up to {}.",
    ])  # fmt: skip
    return [(asked.format(end), listed(range(1, end + 1)))]


def next_number(rng: Random) -> Dialogue:
    n = rng.choice([rng.randint(1, 20), rng.randint(1, 200)])
    after, before = f"{n + 1} comes after {n}.", f"{n - 1} comes before {n}."
    even = f"{n} is {'odd' if n % 2 else 'even'}."
    m = rng.choice([rng.randint(0, 20), rng.randint(0, 200)])
    m += m == n
    bigger = f"{max(m, n)} is bigger than {min(m, n)}."
    smaller = f"{min(m, n)} is smaller than {max(m, n)}."
    return [
        rng.choice([
            (f"What comes after {n}?", after), (f"Which number comes after {n}?", after),
            (f"What is the next number after {n}?", after),
            (f"What comes before {n}?", before), (f"Which number is before {n}?", before),
            (f"Is {n} even or odd?", even), (f"Is {n} odd or even?", even), (f"Is {n} even?", even),
            (f"Is {n} odd?", even), (f"Is {n} an even number?", even),
            (f"Which is bigger, {n} or {m}?", bigger), (f"Which is larger: {n} or {m}?", bigger),
            (f"What is more, {n} or {m}?", bigger), (f"Is {n} bigger than {m}?", bigger),
            (f"Which is smaller, {n} or {m}?", smaller), (f"What is less, {n} or {m}?", smaller),
        ])
    ]  # fmt: skip
