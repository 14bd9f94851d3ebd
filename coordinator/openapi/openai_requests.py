"""Schemas of requests to OpenAI's APIs."""

from coordinator.openapi.parts import (
    ANY,
    BIASES,
    EFFORT,
    FLAG,
    ID,
    MIN_P,
    MODEL,
    NAME,
    OBJECT,
    PENALTY,
    REPETITION_PENALTY,
    SEED,
    STOP,
    TEMPERATURE,
    TEXT,
    TOP_P,
    anything,
    asked,
    choice,
    either,
    items,
    ref,
    whole,
)
from coordinator.protocols.asked import Json
from coordinator.protocols.openai_fields import MOST_CHOICES, MOST_TOKENS, NO_EFFECT, PENALTY_WINDOW
from coordinator.protocols.openai_messages import TEXT_PARTS
from unicluster.chat_limits import MOST_LOGPROBS, MOST_MESSAGES, MOST_TOOL_CALLS, MOST_TOOLS

TOKEN = whole(0, (1 << 32) - 1)
TOKENS = whole(1, MOST_TOKENS)
BUDGET = whole(0, MOST_TOKENS)

SAMPLING = {
    "temperature": TEMPERATURE,
    "top_p": TOP_P,
    "top_k": whole(0, MOST_TOKENS),
    "min_p": MIN_P,
    "presence_penalty": PENALTY,
    "frequency_penalty": PENALTY,
    "repetition_penalty": REPETITION_PENALTY,
    "repetition_context_size": choice(PENALTY_WINDOW),
    "seed": SEED,
    "logit_bias": BIASES,
    "stop": STOP,
}
SERVICE = {
    **anything(NO_EFFECT),
    "service_tier": choice("auto", "default"),
    "store": choice(False),
}
STREAMING = {"stream": FLAG, "stream_options": ref("StreamOptions")}
STRICT = {**FLAG, "description": "Where true, the schema must be one of OpenAI's strict mode."}
FUNCTION = {"description": TEXT, "strict": STRICT, "parameters": OBJECT}
SCHEMA = {"name": ANY, "description": ANY, "strict": STRICT}

_PASSED_OVER = anything(("refusal", "annotations", "id", "status"))
_CONTENT = either(TEXT, items(ref("TextPart")))


def message(**others: Json) -> Json:
    """A message, of any role; `others` are fields that the form of a path has beside."""
    head = {"type": choice("message"), "name": ID, **_PASSED_OVER, **others}
    spoken = asked(
        {"role": choice("system", "developer", "user"), "content": _CONTENT},
        head,
    )
    thought = {"reasoning_content": TEXT, "reasoning": TEXT}
    calls = items(ref("ToolCall"), most=MOST_TOOL_CALLS)
    turn = asked(
        {"role": choice("assistant"), "content": _CONTENT},
        {**head, **thought, "tool_calls": calls},
    )
    called = asked(
        {"role": choice("assistant"), "tool_calls": {**calls, "minItems": 1}},
        {**head, **thought, "content": _CONTENT},
    )
    result = asked(
        {"role": choice("tool"), "content": _CONTENT},
        {**head, "tool_call_id": ID},
    )
    return either(spoken, turn, called, result)


SCHEMAS: dict[str, Json] = {
    "TextPart": asked(
        {"type": choice(*TEXT_PARTS), "text": TEXT},
        anything(("annotations", "cache_control", "logprobs")),
    ),
    "ToolCall": asked(
        {"function": asked({"name": NAME}, {"arguments": TEXT})},
        {"type": choice("function"), "id": ID, "index": ANY},
    ),
    "ChatMessage": message(),
    "StreamOptions": asked({}, {"include_usage": FLAG, "include_obfuscation": choice(False)}),
    "ChatTool": asked({"function": asked({"name": NAME}, FUNCTION)}, {"type": choice("function")}),
    "ChatToolChoice": either(
        choice("none", "auto", "required"),
        asked({"function": asked({"name": NAME}, {})}, {"type": choice("function")}),
    ),
    "ResponseFormat": either(
        asked({"type": choice("text", "json_object")}, {}),
        asked(
            {"type": choice("json_schema"), "json_schema": asked({"schema": OBJECT}, SCHEMA)}, {}
        ),
        asked({"type": choice("regex"), "regex": TEXT}, {}),
        asked({"type": choice("grammar"), "grammar": TEXT}, {}),
    ),
    "ChatRequest": asked(
        {"messages": items(ref("ChatMessage"), 1, MOST_MESSAGES)},
        {
            "model": MODEL,
            **SAMPLING,
            "max_tokens": TOKENS,
            "max_completion_tokens": TOKENS,
            "logprobs": FLAG,
            "top_logprobs": whole(0, MOST_LOGPROBS),
            **STREAMING,
            "n": whole(1, MOST_CHOICES),
            **SERVICE,
            "response_format": ref("ResponseFormat"),
            "tools": items(ref("ChatTool"), most=MOST_TOOLS),
            "tool_choice": ref("ChatToolChoice"),
            "parallel_tool_calls": FLAG,
            "chat_template_kwargs": OBJECT,
            "reasoning_effort": EFFORT,
            "max_reasoning_tokens": BUDGET,
            "modalities": choice(["text"]),
        },
    ),
    "CompletionRequest": asked(
        {
            "prompt": either(
                TEXT,
                items(TOKEN, 1),
                items(TEXT, 1, 1),
                items(items(TOKEN, 1), 1, 1),
            )
        },
        {
            "model": MODEL,
            **SAMPLING,
            "max_tokens": TOKENS,
            "logprobs": either(whole(0, MOST_LOGPROBS), choice(False)),
            **STREAMING,
            "n": whole(1, MOST_CHOICES),
            "best_of": whole(1, MOST_CHOICES),
            "echo": choice(False),
            **SERVICE,
        },
    ),
}
