"""The requests of the tests of mlx-lm's own server, as cases for a door.

Each checks the answer as those tests do, and that what it asks for has an effect.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

Json = dict[str, Any]

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
HELLO = {"role": "user", "content": "Hello!"}
SAMPLED = {"max_tokens": 10, "temperature": 0.7, "top_p": 0.85, "repetition_penalty": 1.2}
GREEDY = {"max_tokens": 10, "temperature": 0.0}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "type": "function",
            "id": "123",
            "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'},
        }
    ],
}
RESULT = {"role": "tool", "content": "5", "tool_call_id": "123"}


@dataclass(frozen=True)
class Case:
    """One test: `check` asks the door, at the base of a client, for the model of that name."""

    name: str
    check: Callable[[httpx.Client, str], None]


def posted(http: httpx.Client, path: str, body: Json) -> Json:
    """The JSON of an answer with status 200."""
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    value: Json = answer.json()
    assert value["id"]
    assert value["usage"]["completion_tokens"] > 0
    return value


def _completion(http: httpx.Client, model: str) -> None:
    body = {
        "model": model,
        "prompt": "Once upon a time",
        "max_tokens": 10,
        "temperature": 0.5,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "repetition_context_size": 20,
        "seed": 999,
        "stop": "stop sequence",
    }
    texts = [posted(http, "/v1/completions", body)["choices"][0]["text"] for _ in range(2)]
    assert texts[0] == texts[1] != ""


def _greedy_completion(http: httpx.Client, model: str) -> None:
    body = {"model": model, "prompt": "Once upon a time", **GREEDY, "top_p": 1.0}
    answer = posted(http, "/v1/completions", body)
    assert answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] <= 10


def _chat(*messages: Json, **fields: Any) -> Callable[[httpx.Client, str], None]:
    def check(http: httpx.Client, model: str) -> None:
        body = {"model": model, "messages": list(messages), **(fields or SAMPLED)}
        (choice,) = posted(http, "/v1/chat/completions", body)["choices"]
        assert choice["message"]["role"] == "assistant"
        assert isinstance(choice["message"]["content"], str)

    return check


def _in_parts(message: Json) -> Json:
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def _parts_are_their_text(http: httpx.Client, model: str) -> None:
    said = [
        posted(http, "/v1/chat/completions", {"model": model, "messages": each, **GREEDY})
        for each in ([SYSTEM, HELLO], [_in_parts(SYSTEM), _in_parts(HELLO)])
    ]
    assert said[0]["choices"][0]["message"] == said[1]["choices"][0]["message"]
    assert said[0]["usage"]["prompt_tokens"] == said[1]["usage"]["prompt_tokens"]


def _stream(http: httpx.Client, model: str) -> None:
    body = {"model": model, "messages": [SYSTEM, HELLO], **GREEDY}
    whole = posted(http, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
    pieces = []
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "data: [DONE]"
    for line in lines:
        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
        pieces.append(choice["delta"].get("content") or "")
    assert "".join(pieces) == whole


def _prefix(http: httpx.Client, model: str) -> None:
    usages = []
    for text in ("Tell me a story about", "Tell me a story about dragons."):
        # Long enough to be worth a place in the cache.
        system = SYSTEM | {"content": f"{SYSTEM['content']} " * 12}
        messages = [system, {"role": "user", "content": text}]
        body = {"model": model, "messages": messages, **GREEDY, "max_tokens": 5}
        answer = posted(http, "/v1/chat/completions", body)
        assert answer["choices"][0]["message"]["content"] is not None
        usages.append(answer["usage"])
    cached = usages[1]["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached < usages[1]["prompt_tokens"]


def _models(http: httpx.Client, model: str) -> None:
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [each["id"] for each in listed["data"]] == [model]
    assert {each["object"] for each in listed["data"]} == {"model"}
    assert listed["data"][0]["created"] > 0


def _unknown_sampling(http: httpx.Client, model: str) -> None:
    """What mlx-lm's server has and this one has not is refused by its name."""
    for name, value in {"xtc_probability": 1.0, "adapters": "x", "num_draft_tokens": 3}.items():
        body = {"model": model, "messages": [HELLO], **GREEDY, name: value}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == name


CASES = (
    Case("completion", _completion),
    Case("greedy completion", _greedy_completion),
    Case("chat", _chat(SYSTEM, HELLO)),
    Case("greedy chat", _chat(SYSTEM, HELLO, **GREEDY)),
    Case("content in parts", _chat(_in_parts(SYSTEM), _in_parts(HELLO))),
    Case("parts are their text", _parts_are_their_text),
    Case("call without content", _chat({"role": "user", "content": "2+3?"}, CALLED, RESULT)),
    Case("stream", _stream),
    Case("prefix", _prefix),
    Case("models", _models),
    Case("sampling of mlx-lm alone", _unknown_sampling),
)
