"""Chat templates in their child: as transformers renders them, and ended where they don't end."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import load

from node.prompts import render
from node.prompts.cancellation import AbandonedError, Cancellation
from node.prompts.conversation import Conversation
from node.prompts.templates import (
    MOST_SLOW,
    TEMPLATES,
    Templates,
    template_of,
    variables_of,
)
from node.prompts.turns import Turns
from tests.support.cluster import until
from tests.support.tiny import tiny_config, write_model
from unicluster.errors import BusyError, InputError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hé <|end|>"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
    }
]
CALLS = [
    {"role": "user", "content": "1 + 2?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Hm.",
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "é": [{}]}}}
        ],
    },
    {"role": "tool", "content": "3", "name": "add"},
]
ALL = "{% for m in messages %}{{ m.content }}{% endfor %}"
WITH_TOOLS = {
    "whole messages": "{% for t in tools %}{{ t | tojson }}{% endfor %}{{ messages | tojson }}",
    "with indents": "{{ tools | tojson(indent=2) }}{{ messages | tojson(indent=2) }}",
    "printed": "{{ tools }}{{ messages }}",
    "gpt-oss": "{{ tools[0].function.name }}{% for m in messages %}{{ m.content or m.thinking }}"
    "{{ m.name }}{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments.items() }}"
    "{% endfor %}{% endfor %}",
}
SAME = {
    "plain": "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}",
    "special tokens": "{{ eos_token }}{% if add_generation_prompt %}>{% endif %}",
    "thinking": "{% if enable_thinking %}<think>{% else %}</think>{% endif %}",
    "extensions": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
    "{{ m | tojson }}{% break %}{% endfor %}",
}
ENDED = {
    "a loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "a recursion": "{% macro m(n) %}{% for i in range(9) %}{{ m(n) }}{% endfor %}{% endmacro %}"
    "{{ m(1) }}",
    "doubling": "{% set n = namespace(s='aaaaaaaa') %}{% for a in range(40) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "one call": "{{ 'a' * 30000000000 }}",
    "a number": "{{ 9 ** (9 ** 9) }}",
    "much text": "{{ 'a' * 100000 }}",
    "its own refusal": "{{ raise_exception('no system\nmessages') }}",
    "no template": "{% for %}",
    "an unsafe attribute": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path: Path = write_model(tmp_path_factory.mktemp("tiny"), tiny_config("llama"), marks=True)
    return load(path)


def rendered(template: str, tokenizer: Any, most: int = 10_000) -> str:
    variables = variables_of(tokenizer)
    return TEMPLATES.render(template, Conversation(CHAT), variables, most, Cancellation())


@pytest.mark.parametrize("template", SAME.values(), ids=SAME)
def test_a_template_renders_as_in_transformers(template: str, tokenizer: Any) -> None:
    template += ALL
    theirs = tokenizer.apply_chat_template(
        CHAT, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert rendered(template, tokenizer) == theirs


@pytest.mark.parametrize("template", WITH_TOOLS.values(), ids=WITH_TOOLS)
def test_tools_and_calls_are_rendered_as_in_transformers(template: str, tokenizer: Any) -> None:
    theirs = tokenizer.apply_chat_template(
        CALLS, tools=TOOLS, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    variables = variables_of(tokenizer)
    conversation = Conversation(CALLS, TOOLS)
    assert TEMPLATES.render(template, conversation, variables, 10_000, Cancellation()) == theirs


def test_the_tokens_are_those_of_transformers(tokenizer: Any) -> None:
    template = template_of(tokenizer)
    assert template is not None
    ours = tokenizer.encode(rendered(template, tokenizer), add_special_tokens=False)
    assert ours == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)


@pytest.mark.parametrize("template", ENDED.values(), ids=ENDED)
def test_a_template_that_can_not_be_used_ends(template: str, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="the model's chat template refuses them: "):
        rendered(template, tokenizer)
    assert rendered(ALL, tokenizer) == "Be brief.hé <|end|>"


def test_a_template_is_ended_when_nobody_waits_for_it(tokenizer: Any) -> None:
    cancellation = Cancellation()
    timer = threading.Timer(0.1, cancellation.cancel)
    timer.start()
    with pytest.raises(AbandonedError):
        TEMPLATES.render(ENDED["a loop"], Conversation(CHAT), {}, 1000, cancellation)
    timer.join()


def test_a_child_that_does_not_answer_is_ended_at_the_deadline() -> None:
    with pytest.raises(InputError, match="takes too long"):
        Templates().render(
            ENDED["a loop"], Conversation(CHAT), {}, 1000, Cancellation(), deadline_s=0.05
        )


def test_templates_that_loop_leave_room_for_others() -> None:
    """Some loop on, others that loop are turned away soon, and the rest render meanwhile."""
    templates = Templates()
    ended: list[Exception] = []
    looping = [Cancellation() for _ in range(MOST_SLOW + 2)]

    def loop(cancellation: Cancellation) -> None:
        try:
            templates.render(
                ENDED["a loop"], Conversation(CHAT), {}, 1000, cancellation, deadline_s=60
            )
        except (BusyError, InputError, AbandonedError) as error:
            ended.append(error)

    templates.render(ALL, Conversation(CHAT), {}, 1000, Cancellation())  # the process is there
    threads = [threading.Thread(target=loop, args=(each,)) for each in looping]
    for thread in threads:
        thread.start()
    until(lambda: len(ended) == 2, "two too many are ended")
    for _ in range(20):
        assert templates.render(ALL, Conversation(CHAT), {}, 1000, Cancellation())
    assert len(ended) == 2
    for each in looping:
        each.cancel()
    for thread in threads:
        thread.join()
    assert [type(error) for error in ended] == [BusyError] * 2 + [AbandonedError] * MOST_SLOW


def test_another_process_renders_after_one_was_killed() -> None:
    templates = Templates()
    assert templates.render("a" + ALL, Conversation(CHAT), {}, 1000, Cancellation()).startswith("a")
    assert templates._process is not None
    templates._process.kill()
    templates._process.wait()
    assert templates.render("b" + ALL, Conversation(CHAT), {}, 1000, Cancellation()).startswith("b")


async def test_a_smaller_piece_of_work_goes_before_a_larger_and_none_is_forgotten() -> None:
    turns, order, ready = Turns(1), list[str](), asyncio.Event()

    async def work(name: str, size: int) -> None:
        async with turns.turn(size):
            order.append(name)
            await ready.wait()

    named = {"first": 1, "huge": 10**9, "large": 10**7, "small": 10**5, "given up": 1}
    tasks = {}
    for name, size in named.items():
        tasks[name] = asyncio.create_task(work(name, size))
        await asyncio.sleep(0)
    tasks.pop("given up").cancel()
    ready.set()
    await asyncio.gather(*tasks.values())
    await work("last", 1)
    assert order == ["first", "small", "large", "huge", "last"]


def test_the_limits_are_those_that_the_page_names() -> None:
    assert (render.CPU_SECONDS, render.MOST_MEMORY) == (3.0, 1 << 30)
