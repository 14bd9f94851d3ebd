"""Schemas of OpenAI's responses: requests, answers, and the events of their streams."""

from coordinator.openapi.openai_requests import (
    BUDGET,
    FUNCTION,
    SAMPLING,
    SCHEMA,
    SERVICE,
    TOKENS,
    message,
)
from coordinator.openapi.parts import (
    ANY,
    COUNT,
    EFFORT,
    FLAG,
    ID,
    MODEL,
    NAME,
    NOT_READY,
    NULL,
    NUMBER,
    OBJECT,
    TEXT,
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
from coordinator.protocols.asked import Json
from unicluster.chat_limits import MOST_MESSAGES, MOST_TOOLS

_PASSED_OVER = anything(("id", "status"))
_TYPE = {"type": choice("reasoning_text")}
_STATUS = choice("completed", "in_progress")
_PART = answered(
    {
        "type": choice("output_text"),
        "text": TEXT,
        "annotations": items(ANY, most=0),
        "logprobs": items(ANY, most=0),
    }
)
_REASONING = answered(
    {
        "id": TEXT,
        "type": choice("reasoning"),
        "summary": items(ANY, most=0),
        "content": items(answered({**_TYPE, "text": TEXT})),
        "status": _STATUS,
    }
)
_MESSAGE = answered(
    {
        "id": TEXT,
        "type": choice("message"),
        "role": choice("assistant"),
        "status": _STATUS,
        "content": items(_PART),
    }
)
_CALL = answered(
    {
        "id": TEXT,
        "type": choice("function_call"),
        "call_id": TEXT,
        "name": TEXT,
        "arguments": TEXT,
        "status": _STATUS,
    }
)
_ITEM = {"item_id": TEXT, "output_index": COUNT}
_IN = {**_ITEM, "content_index": COUNT}
_NO_LOGPROBS = {"logprobs": items(ANY, most=0)}


def _event(kind: str, sometimes: Json | None = None, **fields: Json) -> Json:
    return answered({"type": choice(kind), "sequence_number": COUNT, **fields}, sometimes)


_OUTPUT_ITEM = {"output_index": COUNT, "item": ref("OutputItem")}
_ARGUMENTS = "response.function_call_arguments"

SCHEMAS: dict[str, Json] = {
    "ResponseMessage": message(phase=ANY),
    "ResponseItem": either(
        ref("ResponseMessage"),
        asked(
            {"type": choice("function_call"), "call_id": ID, "name": NAME},
            {"arguments": TEXT, **_PASSED_OVER},
        ),
        asked(
            {
                "type": choice("function_call_output"),
                "call_id": ID,
                "output": either(TEXT, items(ref("TextPart"))),
            },
            _PASSED_OVER,
        ),
        asked(
            {"type": choice("reasoning")},
            {
                **anything(("summary", "encrypted_content")),
                **_PASSED_OVER,
                "content": items(asked({"text": TEXT}, _TYPE)),
            },
        ),
    ),
    "ResponseRequest": asked(
        {"input": either(TEXT, items(ref("ResponseItem"), 1, MOST_MESSAGES))},
        {
            "model": MODEL,
            "instructions": TEXT,
            **SAMPLING,
            "max_output_tokens": TOKENS,
            "tools": items(
                asked({"type": choice("function"), "name": NAME}, FUNCTION), most=MOST_TOOLS
            ),
            "tool_choice": either(
                choice("none", "auto", "required"),
                asked({"name": NAME}, {"type": choice("function")}),
            ),
            "parallel_tool_calls": FLAG,
            "text": asked({}, {"verbosity": choice("medium"), "format": ref("ResponseTextFormat")}),
            **SERVICE,
            "truncation": choice("disabled"),
            "include": choice([], ["reasoning.encrypted_content"]),
            "top_logprobs": whole(0, 0),
            "stream": FLAG,
            "stream_options": asked({}, {"include_obfuscation": choice(False)}),
            "reasoning": asked(
                {}, {"summary": choice("auto"), "effort": EFFORT, "max_tokens": BUDGET}
            ),
        },
    ),
    "ResponseTextFormat": either(
        asked({}, {"type": choice("text", "json_object")}),
        asked({"type": choice("json_schema"), "schema": OBJECT}, SCHEMA),
    ),
    "OutputItem": either(_REASONING, _MESSAGE, _CALL),
    "Response": answered(
        {
            "id": TEXT,
            "object": choice("response"),
            "created_at": COUNT,
            "status": choice("in_progress", "completed", "incomplete"),
            "model": TEXT,
            "output": items(ref("OutputItem")),
            "error": NULL,
            "incomplete_details": optional(answered({"reason": choice("max_output_tokens")})),
            "instructions": NULL,
            "max_output_tokens": optional(COUNT),
            "parallel_tool_calls": FLAG,
            "previous_response_id": NULL,
            "store": choice(False),
            "temperature": optional(NUMBER),
            "top_p": optional(NUMBER),
            "tool_choice": choice("auto"),
            "tools": items(OBJECT),
            "truncation": choice("disabled"),
            "metadata": answered({}),
            "usage": optional(
                answered(
                    {
                        "input_tokens": COUNT,
                        "input_tokens_details": answered({"cached_tokens": COUNT}),
                        "output_tokens": COUNT,
                        "output_tokens_details": answered({"reasoning_tokens": COUNT}),
                        "total_tokens": COUNT,
                    }
                )
            ),
        }
    ),
    "ResponseEvent": either(
        *(
            _event(f"response.{state}", response=ref("Response"))
            for state in ("created", "in_progress", "completed", "incomplete")
        ),
        *(_event(f"response.output_item.{when}", **_OUTPUT_ITEM) for when in ("added", "done")),
        *(_event(f"response.content_part.{when}", **_IN, part=_PART) for when in ("added", "done")),
        _event("response.output_text.delta", **_IN, delta=TEXT, **_NO_LOGPROBS),
        _event("response.output_text.done", **_IN, text=TEXT, **_NO_LOGPROBS),
        _event("response.reasoning_text.delta", **_IN, delta=TEXT),
        _event("response.reasoning_text.done", **_IN, text=TEXT),
        _event(f"{_ARGUMENTS}.delta", **_ITEM, delta=TEXT),
        _event(f"{_ARGUMENTS}.done", **_ITEM, arguments=TEXT, name=TEXT),
        _event("error", NOT_READY, code=optional(TEXT), message=TEXT, param=optional(TEXT)),
    ),
}
