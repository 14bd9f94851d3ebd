"""Real clients against the demo model, served over two machines: one cluster for all of them."""

import json
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import anthropic
import httpx
import ollama
import openai
import pydantic
import pytest

from tests.support.cluster import LocalCluster, ServeProgram
from tests.support.deadlines import scaled

PROMPT = "A tiny story about a fox:"
SUM = "What is 2 + 3?"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    with LocalCluster(tmp_path_factory.mktemp("http")) as cluster:
        cluster.start_agents("ann", "bob")
        options = ("--nodes", "ann,bob", "--context", "512", "--users", "4")
        with cluster.serve("demo", *options) as server:
            yield server


@pytest.fixture(scope="module")
def ask(server: ServeProgram) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.http}/v1", api_key="none", max_retries=0, timeout=scaled(60)
    ) as client:
        yield client


def said(prompt: str) -> list[Any]:
    return [{"role": "user", "content": prompt}]


def test_serve_says_where_and_for_whom(server: ServeProgram) -> None:
    said = f"{server.http}/v1    OpenAI's API, from this machine only, as there is no key"
    assert said in server.out


def test_http_and_grpc_give_the_same_answer(server: ServeProgram, ask: openai.OpenAI) -> None:
    with server.client() as client:
        expected = client.chat(PROMPT, temperature=0, max_tokens=24)
    options: Any = {"model": "demo", "messages": said(PROMPT), "temperature": 0, "max_tokens": 24}
    whole = ask.chat.completions.create(**options)
    stream = ask.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream

    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected.text
    for usage in (whole.usage, last.usage):
        assert usage is not None
        assert usage.completion_tokens == expected.usage.completion_tokens
        assert usage.prompt_tokens == expected.usage.prompt_tokens


def test_usage_says_what_came_from_the_prefix_cache(ask: openai.OpenAI) -> None:
    prompt = said("Count from 3 to 9. " * 12)
    first, second = (
        ask.chat.completions.create(model="demo", messages=prompt, max_tokens=4) for _ in range(2)
    )
    assert first.usage is not None
    assert second.usage is not None
    details = second.usage.prompt_tokens_details
    assert details is not None
    assert 0 < (details.cached_tokens or 0) < first.usage.prompt_tokens


def test_stop_strings_across_tokens_leave_nothing_behind(ask: openai.OpenAI) -> None:
    options: Any = {"model": "demo", "messages": said(SUM), "temperature": 0}
    text = ask.chat.completions.create(**options).choices[0].message.content
    assert text is not None
    for start in range(len(text) - 3):
        stop = text[start : start + 3]
        stream = ask.chat.completions.create(**options, stop=[stop, "never"], stream=True)
        pieces = [chunk.choices[0] for chunk in stream]
        assert "".join(piece.delta.content or "" for piece in pieces) == text[: text.index(stop)]
        assert pieces[-1].finish_reason == "stop"


def test_anthropic_counts_streams_and_names_the_stop(server: ServeProgram) -> None:
    with anthropic.Anthropic(
        base_url=server.http, api_key="none", max_retries=0, timeout=scaled(60)
    ) as client:
        options: Any = {"model": "demo", "messages": said(SUM), "max_tokens": 20}
        whole = client.messages.create(**options)
        with client.messages.stream(**options, stop_sequences=["="]) as stream:
            stopped = stream.get_final_message()
        counted = client.messages.count_tokens(model="demo", messages=said(SUM))

    (block,) = whole.content
    (cut,) = stopped.content
    assert block.type == cut.type == "text"
    assert cut.text == block.text.partition("=")[0]
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "=")
    usage = whole.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_ollama_and_responses_say_the_same(server: ServeProgram, ask: openai.OpenAI) -> None:
    expected = ask.responses.create(model="demo", input=SUM, max_output_tokens=20)
    client = ollama.Client(host=server.http, timeout=scaled(60))
    options: Any = {"num_predict": 20}
    whole = client.chat(model="demo", messages=said(SUM), options=options)
    lines = client.generate(model="demo", prompt=SUM, options=options, stream=True)
    (listed,) = client.list().models

    assert whole.message.content == expected.output_text
    assert "".join(line.response for line in lines) == expected.output_text
    assert whole.prompt_eval_count == (expected.usage.input_tokens if expected.usage else None)
    assert (listed.model, (listed.size or 0) > 1_000_000) == ("demo:latest", True)


def test_seeds_choices_and_biases_work(ask: openai.OpenAI) -> None:
    options: Any = {"model": "demo", "messages": said(PROMPT), "max_tokens": 40, "temperature": 2}
    first, again = (ask.chat.completions.create(**options, seed=7, n=3) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1

    options = {"model": "demo", "prompt": [5], "max_tokens": 4, "temperature": 0}
    biased = ask.completions.create(**options, logit_bias={"9": 100}, logprobs=1)
    logprobs = biased.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(set(logprobs.tokens)) == 1


def test_an_answer_has_the_form_of_a_schema(ask: openai.OpenAI) -> None:
    class Sum(pydantic.BaseModel):
        first: Literal[2, 3]
        second: Literal[2, 3]
        holds: bool

    answer = ask.chat.completions.parse(
        model="demo", messages=said(SUM), response_format=Sum, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Sum)


def test_logprobs_are_of_the_tokens_of_the_text(ask: openai.OpenAI) -> None:
    answer = ask.chat.completions.create(
        model="demo", messages=said(SUM), temperature=0, logprobs=True, top_logprobs=2
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content
    assert entries
    assert b"".join(bytes(entry.bytes or []) for entry in entries) == (
        (choice.message.content or "").encode()
    )
    assert all(entry.top_logprobs[0].token == entry.token for entry in entries)


def test_a_completion_goes_on_with_plain_text(ask: openai.OpenAI) -> None:
    begun = "Once upon a"
    answer = ask.completions.create(model="demo", prompt=begun, temperature=0, max_tokens=6)
    pieces = ask.completions.create(
        model="demo", prompt=begun, temperature=0, max_tokens=6, stream=True
    )
    assert answer.choices[0].text
    assert "".join(piece.choices[0].text for piece in pieces) == answer.choices[0].text


def test_the_head_refuses_by_the_field_of_the_request(ask: openai.OpenAI) -> None:
    refused: list[dict[str, Any]] = [
        {"max_tokens": 4000},
        {"temperature": 3},
        {"logit_bias": {"999999": 1}},
    ]
    for fields in refused:
        with pytest.raises(openai.BadRequestError) as caught:
            ask.chat.completions.create(model="demo", messages=said(SUM), **fields)
        assert caught.value.param == next(iter(fields))


def test_clients_at_once_each_get_their_own_answer(ask: openai.OpenAI) -> None:
    sums = [(a, b) for a in range(1, 5) for b in range(1, 5)]

    def one(pair: tuple[int, int]) -> str:
        stream = ask.chat.completions.create(
            model="demo",
            messages=said(f"What is {pair[0]} + {pair[1]}?"),
            temperature=0,
            stream=True,
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, sums))
    assert all(str(a + b) in text for (a, b), text in zip(sums, answers, strict=True))


def test_a_timeout_of_the_client_is_its_own(server: ServeProgram) -> None:
    with (
        openai.OpenAI(
            base_url=f"{server.http}/v1", api_key="none", max_retries=0, timeout=0.001
        ) as hasty,
        pytest.raises(openai.APITimeoutError),
    ):
        hasty.chat.completions.create(model="demo", messages=said(PROMPT))


def test_curl_without_a_type_is_understood(server: ServeProgram) -> None:
    answer = httpx.post(
        server.http + CHAT,
        content=json.dumps({"messages": said(SUM), "max_tokens": 4}),
        headers={"Content-Type": "application/x-www-form-urlencoded"},
        timeout=scaled(60),
    )
    assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.sweep
def test_with_a_key_other_machines_may_ask_where_that_is_chosen(tmp_path: Path) -> None:
    """Starts `serve` three times."""
    body = {"messages": said(SUM), "max_tokens": 4}
    with LocalCluster(tmp_path) as cluster:
        cluster.start_agents("ann")
        secret = cluster.run("key", "create", "webui").out.strip()
        authority = ssl.create_default_context(cadata=cluster.run("token", "ca").out)
        for flags, who in (
            ((), "this machine only, with a key"),
            (("--http-plain",), "with a key"),
            (("--http-cert", "cluster"), "with a key"),
        ):
            with cluster.serve("demo", "--context", "512", "--nodes", "ann", *flags) as server:
                assert f"OpenAI's API, {'from ' if not flags else ''}{who}" in server.out
                for headers, status in (({}, 401), ({"x-api-key": secret}, 200)):
                    answer = httpx.post(
                        server.http + CHAT,
                        json=body,
                        headers=headers,
                        timeout=scaled(60),
                        verify=authority,
                    )
                    assert answer.status_code == status
