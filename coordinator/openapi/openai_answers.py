"""Schemas of answers of OpenAI's APIs, whole and in pieces."""

from coordinator.openapi.parts import (
    COUNT,
    FINISH,
    NOT_READY,
    NULL,
    NUMBER,
    TEXT,
    answered,
    choice,
    either,
    items,
    optional,
    ref,
)
from coordinator.protocols.asked import Json

_CALL = {
    "id": TEXT,
    "type": choice("function"),
    "function": answered({"name": TEXT, "arguments": TEXT}),
}
_TOKEN = {"token": TEXT, "logprob": NUMBER, "bytes": items(COUNT)}
_LOGPROBS = optional(
    answered(
        {
            "content": items(answered({**_TOKEN, "top_logprobs": items(answered(_TOKEN))})),
            "refusal": NULL,
        }
    )
)
_HEAD = {"id": TEXT, "created": COUNT, "model": TEXT}
_CHUNK_CHOICE = answered(
    {
        "index": COUNT,
        "delta": answered(
            {},
            {
                "role": choice("assistant"),
                "content": TEXT,
                "reasoning_content": TEXT,
                "tool_calls": items(answered({"index": COUNT, **_CALL})),
            },
        ),
        "logprobs": _LOGPROBS,
        "finish_reason": optional(FINISH),
    }
)
_COMPLETION_CHOICE = {
    "index": COUNT,
    "text": TEXT,
    "logprobs": optional(
        answered(
            {
                "tokens": items(TEXT),
                "token_logprobs": items(NUMBER),
                "top_logprobs": items({"type": "object", "additionalProperties": NUMBER}),
                "text_offset": items(COUNT),
            }
        )
    ),
}

SCHEMAS: dict[str, Json] = {
    "OpenAIError": answered(
        {
            "error": answered(
                {"message": TEXT, "type": TEXT, "param": optional(TEXT), "code": optional(TEXT)},
                NOT_READY,
            )
        }
    ),
    "Model": answered(
        {
            "id": TEXT,
            "object": choice("model"),
            "created": COUNT,
            "owned_by": TEXT,
            "context_length": optional(COUNT),
            "quantization": optional(TEXT),
            "users": optional(COUNT),
            "state": TEXT,
            "detail": optional(TEXT),
        }
    ),
    "Models": answered({"object": choice("list"), "data": items(ref("Model"))}),
    "Usage": answered(
        {
            "prompt_tokens": COUNT,
            "completion_tokens": COUNT,
            "total_tokens": COUNT,
            "prompt_tokens_details": answered({"cached_tokens": COUNT}),
            "completion_tokens_details": answered({"reasoning_tokens": COUNT}),
        }
    ),
    "ChatCompletion": answered(
        {
            **_HEAD,
            "object": choice("chat.completion"),
            "choices": items(
                answered(
                    {
                        "index": COUNT,
                        "message": answered(
                            {"role": choice("assistant"), "content": optional(TEXT)}
                            | {"refusal": NULL},
                            {"reasoning_content": TEXT, "tool_calls": items(answered(_CALL), 1)},
                        ),
                        "logprobs": _LOGPROBS,
                        "finish_reason": FINISH,
                    }
                )
            ),
            "usage": ref("Usage"),
        }
    ),
    "ChatCompletionChunk": answered(
        {
            **_HEAD,
            "object": choice("chat.completion.chunk"),
            "choices": items(_CHUNK_CHOICE, most=1),
        },
        {"usage": optional(ref("Usage"))},
    ),
    "Completion": answered(
        {
            **_HEAD,
            "object": choice("text_completion"),
            "choices": items(answered({**_COMPLETION_CHOICE, "finish_reason": FINISH})),
            "usage": ref("Usage"),
        }
    ),
    "CompletionChunk": answered(
        {
            **_HEAD,
            "object": choice("text_completion"),
            "choices": items(
                answered({**_COMPLETION_CHOICE, "finish_reason": optional(FINISH)}), most=1
            ),
        },
        {"usage": optional(ref("Usage"))},
    ),
    "ChatEvent": either(ref("ChatCompletionChunk"), ref("OpenAIError")),
    "CompletionEvent": either(ref("CompletionChunk"), ref("OpenAIError")),
}
