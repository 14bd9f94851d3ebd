"""The bundled demo model answers what the README shows, with nothing but mlx-lm."""

import json
from functools import cache

import pytest

from bench.demo_model.evaluate import MODEL, DemoModel


@cache
def demo() -> DemoModel:
    return DemoModel()


def ask(*turns: str) -> str:
    """The last answer of a conversation in which the user says `turns`."""
    messages: list[dict[str, str]] = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        messages.append({"role": "assistant", "content": demo().answer(messages)})
    return messages[-1]["content"]


def test_small_enough_to_bundle_and_deep_enough_to_cut():
    config = json.loads((MODEL / "config.json").read_text())

    assert config["num_hidden_layers"] >= 12
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 11_000_000


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Hello!", "Hello! How can I help?"),
        ("What is 17 + 25?", "17 + 25 = 42."),
        ("What is 7 times 8?", "7 * 8 = 56."),
        ("What is 50 minus 8?", "50 - 8 = 42."),
        ("Count from 3 to 9.", "3, 4, 5, 6, 7, 8, 9."),
        ("Count down from 5 to 1.", "5, 4, 3, 2, 1."),
        ("Count by twos from 2 to 12.", "2, 4, 6, 8, 10, 12."),
        ("What is the capital of France?", "The capital of France is Paris."),
        ("What is the opposite of hot?", "The opposite of hot is cold."),
        ("What day comes after Monday?", "Tuesday comes after Monday."),
        ("What colour is the sky?", "The sky is blue."),
        ("Say banana three times.", "banana banana banana"),
        ("Thank you!", "You are welcome!"),
        ("Who won the world cup in 1998?", "Sorry, I am a tiny model and do not know that."),
    ],
)
def test_answers(question: str, answer: str):
    assert ask(question) == answer


def test_a_follow_up_keeps_the_subject():
    assert ask("What is the capital of France?", "And of Spain?") == (
        "The capital of Spain is Madrid."
    )


def test_remembers_a_name():
    assert ask("My name is Ada.", "What is 2 + 2?", "What is my name?") == "Your name is Ada."


def test_counts_to_a_hundred():
    assert ask("Count from 1 to 100.") == ", ".join(map(str, range(1, 101))) + "."


def test_tells_a_story_about_what_was_asked():
    told = ask("Tell me a tiny story about a fox.")

    assert told.startswith("Once upon a time, a clever fox named Rusty lived in a quiet forest.")
    assert told.count(".") >= 6


@pytest.mark.parametrize("text", ["", "\x00\ud7ff", "漢字 😀 ½", "<|end|>", "e\u0301" * 50])
def test_any_text_gets_an_answer(text: str):
    assert isinstance(ask(text), str)
