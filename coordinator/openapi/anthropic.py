"""Schemas of Anthropic's messages: requests, answers, and the events of their streams."""

from coordinator.openapi.parts import (
    ANY,
    COUNT,
    FLAG,
    ID,
    MODEL,
    NAME,
    NOT_READY,
    NULL,
    OBJECT,
    STOP,
    TEMPERATURE,
    TEXT,
    TOP_P,
    answered,
    anything,
    asked,
    choice,
    either,
    items,
    optional,
    ref,
    whole,
)
from coordinator.protocols.anthropic_output import EFFORTS, KEEPS_ALL
from coordinator.protocols.asked import Json
from coordinator.protocols.openai_fields import MOST_TOKENS
from unicluster.chat_limits import MOST_MESSAGES, MOST_TOOLS

_TEXTS = either(TEXT, items(ref("TextBlock")))
_CACHED = {"cache_control": ANY}
_PROMPT = {
    "model": MODEL,
    "system": _TEXTS,
    "tools": items(ref("MessageTool"), most=MOST_TOOLS),
    "tool_choice": ref("MessageToolChoice"),
    "thinking": asked(
        {},
        {
            "type": choice("enabled", "adaptive", "disabled"),
            "budget_tokens": whole(1, MOST_TOKENS),
            "display": choice("summarized", "full", "omitted"),
        },
    ),
    "output_config": asked({}, {"effort": choice(*EFFORTS), "format": ref("MessageFormat")}),
    "context_management": asked({}, {"edits": items(choice(*KEEPS_ALL))}),
    **_CACHED,
}
_MESSAGES = {"messages": items(ref("InputMessage"), 1, MOST_MESSAGES)}
_STOPPED = {
    "stop_reason": optional(choice("end_turn", "max_tokens", "stop_sequence", "tool_use")),
    "stop_sequence": optional(TEXT),
}
_AT = {"index": COUNT}
_BLOCKS = {
    "thinking": {"thinking": TEXT, "signature": TEXT},
    "tool_use": {"id": TEXT, "name": TEXT, "input": OBJECT},
}
_PARALLEL = {"disable_parallel_tool_use": FLAG}


def _typed(kind: str, **fields: Json) -> Json:
    return answered({"type": choice(kind), **fields})


SCHEMAS: dict[str, Json] = {
    "AnthropicError": _typed("error", error=answered({"type": TEXT, "message": TEXT}, NOT_READY)),
    "TextBlock": asked({"type": choice("text"), "text": TEXT}, {**_CACHED, "citations": ANY}),
    "InputMessage": either(
        asked({"role": choice("system"), "content": _TEXTS}, {}),
        asked(
            {
                "role": choice("user"),
                "content": either(TEXT, items(either(ref("TextBlock"), ref("ToolResult")))),
            },
            {},
        ),
        asked(
            {
                "role": choice("assistant"),
                "content": either(
                    TEXT,
                    items(either(ref("TextBlock"), ref("ToolUse"), ref("Thinking"))),
                ),
            },
            {},
        ),
    ),
    "ToolResult": asked(
        {"type": choice("tool_result"), "tool_use_id": ID},
        {"content": _TEXTS, "is_error": FLAG, **_CACHED},
    ),
    "ToolUse": asked(
        {"type": choice("tool_use"), "id": ID, "name": NAME},
        {"input": OBJECT, "caller": choice({"type": "direct"}), **_CACHED},
    ),
    "Thinking": asked(
        {"type": choice("thinking"), "thinking": TEXT}, {"signature": ANY, **_CACHED}
    ),
    "MessageTool": asked(
        {"name": NAME},
        {
            "type": choice("custom"),
            "description": TEXT,
            "input_schema": OBJECT,
            "strict": FLAG,
            "defer_loading": choice(False),
            "allowed_callers": choice(["direct"]),
            "eager_input_streaming": FLAG,
            **_CACHED,
        },
    ),
    "MessageFormat": asked({"type": choice("json_schema"), "schema": OBJECT}, {}),
    "MessageToolChoice": either(
        asked({"type": choice("auto", "any", "none")}, _PARALLEL),
        asked({"type": choice("tool"), "name": NAME}, _PARALLEL),
    ),
    "MessageRequest": asked(
        {**_MESSAGES, "max_tokens": whole(1, MOST_TOKENS)},
        {
            **_PROMPT,
            "temperature": TEMPERATURE,
            "top_p": TOP_P,
            "top_k": whole(0, MOST_TOKENS),
            "stop_sequences": STOP,
            "stream": FLAG,
            **anything(("metadata",)),
            "service_tier": choice("auto", "standard_only"),
        },
    ),
    "CountRequest": asked(_MESSAGES, _PROMPT),
    "Count": answered({"input_tokens": COUNT}),
    "MessageUsage": answered(
        {
            "input_tokens": COUNT,
            "cache_creation_input_tokens": COUNT,
            "cache_read_input_tokens": COUNT,
            "output_tokens": COUNT,
            "output_tokens_details": answered({"thinking_tokens": COUNT}),
        }
    ),
    "MessageAnswer": _typed(
        "message",
        id=TEXT,
        role=choice("assistant"),
        model=TEXT,
        content=items(
            either(
                _typed("text", text=TEXT, citations=NULL),
                *(_typed(kind, **fields) for kind, fields in _BLOCKS.items()),
            )
        ),
        usage=ref("MessageUsage"),
        **_STOPPED,
    ),
    "MessageEvent": either(
        _typed("message_start", message=ref("MessageAnswer")),
        _typed("ping"),
        _typed(
            "content_block_start",
            **_AT,
            content_block=either(
                _typed("text", text=TEXT),
                *(_typed(kind, **fields) for kind, fields in _BLOCKS.items()),
            ),
        ),
        _typed(
            "content_block_delta",
            **_AT,
            delta=either(
                _typed("text_delta", text=TEXT),
                _typed("thinking_delta", thinking=TEXT),
                _typed("input_json_delta", partial_json=TEXT),
            ),
        ),
        _typed("content_block_stop", **_AT),
        _typed("message_delta", delta=answered(_STOPPED), usage=ref("MessageUsage")),
        _typed("message_stop"),
        ref("AnthropicError"),
    ),
}
