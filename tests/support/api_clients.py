"""Clients of the HTTP doors, all with the same few verbs, each in its own library's way.

Their errors, time limits and streams stay what the library makes of them.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import anthropic
import httpx
import ollama
import openai

# Else it is fetched when litellm is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from langchain_openai import ChatOpenAI

litellm.suppress_debug_info = True

POINT: dict[str, Any] = {
    "type": "object",
    "properties": {"x": {"enum": [3, 5]}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}
NAME, WHY = "point", "Sets a point."
FUNCTION = {"name": NAME, "description": WHY, "parameters": POINT}
TOOL: dict[str, Any] = {"type": "function", "function": FUNCTION}
FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {"name": NAME, "schema": POINT, "strict": True},
}

# Tokens of an answer that has a form, with room for the white space that small models like.
FORMED = 300

Errors = dict[int, type[Exception]]


@dataclass(frozen=True)
class Call:
    """A call of a tool, with its arguments as the library gives them, read as JSON."""

    name: str
    arguments: Any


class ApiClient(Protocol):
    """errors: what is raised for a status; timeout: what after its own time limit."""

    errors: ClassVar[Errors]
    timeout: ClassVar[type[Exception]]

    def __init__(self, url: str, key: str, limit_s: float, model: str) -> None: ...

    def chat(self, prompt: str, tokens: int = 8, temperature: float = 0) -> str:
        """The text of a whole answer."""

    def stream(self, prompt: str, tokens: int = 8) -> Iterator[str]:
        """The pieces of an answer; whoever closes the iterator leaves."""

    def call(self, prompt: str) -> Call:
        """The call of the one tool, which is required."""

    def shaped(self, prompt: str) -> Any:
        """An answer that has the form of POINT, read as JSON."""


def said(prompt: str) -> list[Any]:
    return [{"role": "user", "content": prompt}]


class OpenAIChat:
    """openai's chat completions."""

    errors: ClassVar[Errors] = {
        400: openai.BadRequestError,
        401: openai.AuthenticationError,
        404: openai.NotFoundError,
        413: openai.APIStatusError,
        429: openai.RateLimitError,
        503: openai.InternalServerError,
    }
    timeout: ClassVar[type[Exception]] = openai.APITimeoutError

    def __init__(self, url: str, key: str, limit_s: float, model: str) -> None:
        self._client = openai.OpenAI(
            base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=limit_s
        )
        self._model: Any = {"model": model}

    def chat(self, prompt: str, tokens: int = 8, temperature: float = 0) -> str:
        answer = self._client.chat.completions.create(
            **self._model, messages=said(prompt), max_tokens=tokens, temperature=temperature
        )
        return answer.choices[0].message.content

    def stream(self, prompt: str, tokens: int = 8) -> Iterator[str]:
        with self._client.chat.completions.create(
            **self._model, messages=said(prompt), max_tokens=tokens, temperature=0, stream=True
        ) as chunks:
            for chunk in chunks:
                yield chunk.choices[0].delta.content or ""

    def call(self, prompt: str) -> Call:
        answer = self._client.chat.completions.create(
            **self._model,
            messages=said(prompt),
            tools=[TOOL],
            tool_choice="required",
            max_tokens=FORMED,
        )
        (call, *_) = answer.choices[0].message.tool_calls
        return Call(call.function.name, json.loads(call.function.arguments))

    def shaped(self, prompt: str) -> Any:
        answer = self._client.chat.completions.create(
            **self._model, messages=said(prompt), response_format=FORMAT
        )
        return json.loads(answer.choices[0].message.content)


class OpenAIResponses(OpenAIChat):
    """openai's responses."""

    def chat(self, prompt: str, tokens: int = 8, temperature: float = 0) -> str:
        response = self._client.responses.create(
            **self._model, input=prompt, max_output_tokens=tokens, temperature=temperature
        )
        return str(response.output_text)

    def stream(self, prompt: str, tokens: int = 8) -> Iterator[str]:
        with self._client.responses.create(
            **self._model, input=prompt, max_output_tokens=tokens, temperature=0, stream=True
        ) as events:
            for event in events:
                if event.type == "response.output_text.delta":
                    yield event.delta

    def call(self, prompt: str) -> Call:
        tool: Any = {"type": "function", "strict": True, **FUNCTION}
        response = self._client.responses.create(
            **self._model,
            input=prompt,
            tools=[tool],
            tool_choice="required",
            max_output_tokens=FORMED,
        )
        (call, *_) = (item for item in response.output if item.type == "function_call")
        return Call(call.name, json.loads(call.arguments))

    def shaped(self, prompt: str) -> Any:
        form: Any = {"type": "json_schema", **FORMAT["json_schema"]}
        response = self._client.responses.create(**self._model, input=prompt, text={"format": form})
        return json.loads(response.output_text)


class AnthropicMessages:
    """anthropic's messages."""

    errors: ClassVar[Errors] = {
        400: anthropic.BadRequestError,
        401: anthropic.AuthenticationError,
        404: anthropic.NotFoundError,
        413: anthropic.APIStatusError,
        429: anthropic.RateLimitError,
        503: anthropic.InternalServerError,
    }
    timeout: ClassVar[type[Exception]] = anthropic.APITimeoutError

    def __init__(self, url: str, key: str, limit_s: float, model: str) -> None:
        self._client = anthropic.Anthropic(
            base_url=url, api_key=key, max_retries=0, timeout=limit_s
        )
        self._model: Any = {"model": model}

    def chat(self, prompt: str, tokens: int = 8, temperature: float = 0) -> str:
        message = self._client.messages.create(
            **self._model,
            messages=said(prompt),
            max_tokens=tokens,
            extra_body={"temperature": temperature},  # this library has no such parameter
        )
        return "".join(block.text for block in message.content if block.type == "text")

    def stream(self, prompt: str, tokens: int = 8) -> Iterator[str]:
        with self._client.messages.stream(
            **self._model,
            messages=said(prompt),
            max_tokens=tokens,
            extra_body={"temperature": 0},
        ) as stream:
            yield from stream.text_stream

    def call(self, prompt: str) -> Call:
        tool: Any = {"name": NAME, "description": WHY, "input_schema": POINT}
        message = self._client.messages.create(
            **self._model,
            messages=said(prompt),
            max_tokens=FORMED,
            tools=[tool],
            tool_choice={"type": "any"},
        )
        (call, *_) = (block for block in message.content if block.type == "tool_use")
        return Call(call.name, call.input)

    def shaped(self, prompt: str) -> Any:
        form: Any = {"format": {"type": "json_schema", "schema": POINT}}
        message = self._client.messages.create(
            **self._model, messages=said(prompt), max_tokens=FORMED, output_config=form
        )
        return json.loads("".join(b.text for b in message.content if b.type == "text"))


class OllamaChat:
    """ollama's chat: one class for all errors, and no way to require a call."""

    errors: ClassVar[Errors] = dict.fromkeys((400, 401, 404, 413, 429, 503), ollama.ResponseError)
    timeout: ClassVar[type[Exception]] = httpx.TimeoutException

    def __init__(self, url: str, key: str, limit_s: float, model: str) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        self._client = ollama.Client(host=url, headers=headers, timeout=limit_s)
        self._model: Any = {"model": model}

    def chat(self, prompt: str, tokens: int = 8, temperature: float = 0) -> str:
        options = {"num_predict": tokens, "temperature": temperature}
        answer = self._client.chat(**self._model, messages=said(prompt), options=options)
        return answer.message.content or ""

    def stream(self, prompt: str, tokens: int = 8) -> Iterator[str]:
        options = {"num_predict": tokens, "temperature": 0}
        parts = self._client.chat(
            **self._model, messages=said(prompt), options=options, stream=True
        )
        with contextlib.closing(parts):  # type: ignore[type-var]
            for part in parts:
                yield part.message.content or ""

    def call(self, prompt: str) -> Call:
        raise NotImplementedError("ollama's API has no tool_choice")

    def shaped(self, prompt: str) -> Any:
        answer = self._client.chat(**self._model, messages=said(prompt), format=POINT)
        return json.loads(answer.message.content or "")


class LangChain:
    """langchain-openai's chat model."""

    errors: ClassVar[Errors] = OpenAIChat.errors
    timeout: ClassVar[type[Exception]] = openai.APITimeoutError

    def __init__(self, url: str, key: str, limit_s: float, model: str) -> None:
        self._model = ChatOpenAI(
            model=model, base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=limit_s
        )

    def chat(self, prompt: str, tokens: int = 8, temperature: float = 0) -> str:
        said = self._model.invoke(prompt, max_tokens=tokens, temperature=temperature)
        return str(said.content)

    def stream(self, prompt: str, tokens: int = 8) -> Iterator[str]:
        parts = self._model.stream(prompt, max_tokens=tokens, temperature=0)
        with contextlib.closing(parts):
            for part in parts:
                yield str(part.content)

    def call(self, prompt: str) -> Call:
        offered = self._model.bind_tools([TOOL], tool_choice="any", max_tokens=FORMED)
        (call, *_) = offered.invoke(prompt).tool_calls
        return Call(call["name"], call["args"])

    def shaped(self, prompt: str) -> Any:
        schema = {"title": NAME, "description": WHY, **POINT}
        return self._model.with_structured_output(schema, method="json_schema").invoke(prompt)


class LiteLLM:
    """litellm, by its provider of OpenAI's API."""

    errors: ClassVar[Errors] = {
        400: litellm.BadRequestError,
        401: litellm.AuthenticationError,
        404: litellm.NotFoundError,
        413: litellm.APIError,
        429: litellm.RateLimitError,
        503: litellm.ServiceUnavailableError,
    }
    timeout: ClassVar[type[Exception]] = litellm.Timeout
    provider = "openai"
    path = "/v1"

    def __init__(self, url: str, key: str, limit_s: float, model: str) -> None:
        self._options: dict[str, Any] = {
            "model": f"{self.provider}/{model}",
            "api_base": url + self.path,
            "api_key": key,
            "timeout": limit_s,
            "num_retries": 0,
            "max_retries": 0,
        }

    def chat(self, prompt: str, tokens: int = 8, temperature: float = 0) -> str:
        answer = self._ask(prompt, max_tokens=tokens, temperature=temperature)
        return str(answer.choices[0].message.content)

    def stream(self, prompt: str, tokens: int = 8) -> Iterator[str]:
        chunks = self._ask(prompt, max_tokens=tokens, temperature=0, stream=True)
        with contextlib.closing(chunks.completion_stream):  # litellm itself has no way to leave
            for chunk in chunks:
                yield chunk.choices[0].delta.content or ""

    def call(self, prompt: str) -> Call:
        answer = self._ask(prompt, tools=[TOOL], tool_choice="required", max_tokens=FORMED)
        (call, *_) = answer.choices[0].message.tool_calls
        return Call(call.function.name, json.loads(call.function.arguments))

    def shaped(self, prompt: str) -> Any:
        answer = self._ask(prompt, response_format=FORMAT, max_tokens=FORMED)
        return json.loads(answer.choices[0].message.content)

    def _ask(self, prompt: str, **fields: Any) -> Any:
        return litellm.completion(**self._options, messages=said(prompt), **fields)


CLIENTS: tuple[type[ApiClient], ...] = (
    *(OpenAIChat, OpenAIResponses, AnthropicMessages, OllamaChat, LangChain, LiteLLM),
)
