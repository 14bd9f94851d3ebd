"""Reasoning as it was asked for: by the chat template's own switch, else closed by force."""

from pathlib import Path
from typing import Any

import pytest

from node.prompts.cancellation import Cancellation
from node.prompts.conversation import conversation_of
from node.prompts.templates import TEMPLATES
from node.prompts.thinking import budget_of
from node.speculation.drafting import Lookup, Speculation
from tests.support.engines import Completion, Script, Tiny, listen
from tests.support.tiny import MARKS, tiny_config, write_model
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import Constraint, GenerateRequest, Message, Reasoning

THINK, THOUGHT, _, _ = range(258, 258 + len(MARKS))
PROMPT = [104, 105]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Models, by whether their tokenizer has marks for reasoning."""
    folder = tmp_path_factory.mktemp("models")
    return {
        marks: write_model(folder / f"llama-{marks}", tiny_config("llama"), marks=marks)
        for marks in (False, True)
    }


async def said(path: Path, tokens: list[int], reasoning: Reasoning, **fields: Any) -> Completion:
    """The answer of a model that would say `tokens`."""
    fields = {"token_ids": PROMPT, "max_tokens": 60} | fields
    tiny = await Tiny.load(path)
    engine = await tiny.engine(Script(tokens, prompt=len(fields["token_ids"])))
    try:
        return await listen(await engine.submit(GenerateRequest(reasoning=reasoning, **fields)))
    finally:
        engine.close()


LONG = b"again and again and again and again"


@pytest.mark.parametrize("most", [0, 1, 7, len(LONG), len(LONG) + 1])
async def test_reasoning_ends_where_its_budget_does(paths: dict[bool, Path], most: int) -> None:
    """A script goes on by the place: the mark takes that of one of its tokens."""
    tokens = [*LONG, THOUGHT, *b"Yes."]
    opened = [*PROMPT, THINK]
    answer = await said(paths[True], tokens, Reasoning(most_tokens=most), token_ids=opened)

    assert answer.reasoning == LONG[:most].decode()
    assert answer.tokens[min(most, len(LONG))] == THOUGHT
    assert answer.text.startswith(LONG[most + 1 :].decode())
    assert answer.text.endswith("Yes.")


async def test_drafted_tokens_change_nothing(paths: dict[bool, Path]) -> None:
    tiny = await Tiny.load(paths[True])
    request = GenerateRequest(
        token_ids=[*PROMPT, THINK], reasoning=Reasoning(most_tokens=9), max_tokens=60
    )
    answers = []
    for options in ({}, {"speculation": Speculation(Lookup, 8)}):
        engine = await tiny.engine(**options)
        answers.append(await listen(await engine.submit(request)))
        engine.close()
    plain, drafted = answers
    assert plain.tokens == drafted.tokens
    assert plain.tokens.count(THOUGHT) == 1


async def test_what_was_closed_is_not_opened_again(paths: dict[bool, Path]) -> None:
    tokens = [THINK, *b"one", THOUGHT, *b"A", THINK, *b"two", THOUGHT, *b"B"]
    for most, reasoning in ((0, ""), (3, "one"), (4, "onet"), (20, "onetwo")):
        answer = await said(paths[True], tokens, Reasoning(most_tokens=most))
        assert answer.reasoning == reasoning
        assert answer.text.endswith("B")


async def test_the_text_that_follows_has_its_form_and_may_hold_the_marks(
    paths: dict[bool, Path],
) -> None:
    text = b'"a <think> b </think> c"'
    constraint = Constraint(regex='"[^"]{8,40}"')
    for most in (0, 2):
        opened = [*PROMPT, THINK]
        tokens = [*b"hm"[:most], 33, *text]  # the mark comes in the place of 33
        answer = await said(
            paths[True],
            tokens,
            Reasoning(most_tokens=most),
            token_ids=opened,
            constraint=constraint,
        )
        assert (answer.reasoning, answer.text) == ("hm"[:most], text.decode())


async def test_without_reasoning_there_is_nothing_to_limit(paths: dict[bool, Path]) -> None:
    free = await said(paths[False], [*b"Yes."], Reasoning(most_tokens=1))
    assert free.text == "Yes."
    for refused in (Reasoning(enabled=True), Reasoning(effort="low")):
        with pytest.raises(InputError, match=r"reasoning\.\w+: this model does not reason"):
            await said(paths[False], [*b"Yes."], refused)
    with pytest.raises(InputError, match=r"reasoning\.effort: must be one of"):
        await said(paths[True], [*b"Yes."], Reasoning(effort="much"))


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking"])
@pytest.mark.parametrize("enabled", [False, True])
def test_a_template_with_a_switch_is_told(switch: str, enabled: bool) -> None:
    template = TEMPLATE + f" {{{{ {switch} }}}}"
    for reasoning in (Reasoning(enabled=enabled), Reasoning(most_tokens=int(enabled))):
        text, granted = rendered(template, reasoning)
        assert (text, granted) == (f"hi {enabled}", {"enabled"})
    text, _ = rendered(
        template, Reasoning(enabled=enabled), template_arguments=f'{{"{switch}": 3}}'
    )
    assert text == "hi 3"


def test_effort_is_the_templates_or_a_budget() -> None:
    text, granted = rendered(TEMPLATE + " {{ reasoning_effort }}", Reasoning(effort="low"))
    assert (text, granted) == ("hi low", {"effort"})
    request = GenerateRequest(reasoning=Reasoning(effort="low", most_tokens=2000))
    assert budget_of(request, granted, reasons=True) == 2000
    assert budget_of(request, (), reasons=True) == 1024
    none = GenerateRequest(reasoning=Reasoning(effort="none"))
    assert budget_of(none, granted, reasons=True) == 0
    assert budget_of(none, (), reasons=False) is None


def rendered(template: str, reasoning: Reasoning, **fields: Any) -> tuple[str, set[str]]:
    messages = [Message(role="user", content="hi")]
    request = GenerateRequest(messages=messages, reasoning=reasoning, **fields)
    conversation = conversation_of(request)
    variables = {"enable_thinking": True}
    text = TEMPLATES.render(template, conversation, variables, 1000, Cancellation())
    return text, conversation.granted
