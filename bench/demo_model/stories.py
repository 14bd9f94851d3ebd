"""The tiny stories of the demo model: a few plots, about whoever the user asks for."""

from random import Random

from bench.demo_model import facts

UNKNOWN = facts.Animal("", "little", "in a small town", "cake", "", 0)
FRIENDS = ("mouse", "owl", "frog", "rabbit", "crow", "turtle")

PLOTS = (
    "One morning, {name} heard a cry for help. {friend} was stuck under a fallen branch. {name} "
    "pushed with all the strength in the world until the branch rolled away. {friend} said thank "
    "you and shared some {food}. From that day on, they were the best of friends.",
    "One day, {name} found a small golden key beside the path. {friend} knew an old door that "
    "nobody could open. They went there together, and the key fit. Behind the door there was a "
    "table full of {food}, enough for everyone.",
    "One cold night, the wind blew out every light. {friend} was afraid of the dark. {name} sang a "
    "quiet song, and they walked home side by side. In the morning they ate {food} in the sun and "
    "laughed about the wind.",
    "One summer, it did not rain for a long time. {name} and {friend} walked for three days to "
    "look for water. On the top of a hill they found a clear spring. They called all their "
    "friends, and nobody was thirsty again.",
)
ENDS = ("And they all lived happily.", "That was a good day.", "And then they slept well.")


def story(rng: Random, subject: str, name: str, friend: str, long: bool) -> str:
    """A story about `subject`, about 100 tokens, or about 250 if `long`.

    An empty `name` or `friend` is chosen here.
    """
    who = facts.ANIMALS.get(subject, UNKNOWN)
    name = name or who.name or rng.choice(["Nilo", "Tavi", "Suri"])
    # The plot depends on the subject, so that the greedy answers differ.
    first = sum(map(ord, subject)) % len(PLOTS)
    friend = friend or FRIENDS[sum(map(ord, subject)) % len(FRIENDS)]
    if friend == subject:
        friend = "hedgehog"
    plots = [PLOTS[(first + i) % len(PLOTS)] for i in range(3 if long else 1)]
    met = f"the {friend}"
    a = "an" if who.trait[0] in "aeiou" else "a"
    parts = [f"Once upon a time, {a} {who.trait} {subject} named {name} lived {who.home}."]
    parts.append(f"{name} loved {who.food} and had a good friend, {met}.")
    for plot in plots:
        text = plot.format(name=name, friend=met, food=who.food)
        parts.append(text.replace(". the ", ". The "))
    parts.append(ENDS[sum(map(ord, subject)) % len(ENDS)])
    return " ".join(parts)
