"""Schemas of Ollama's API: requests, answers, and the lines of their streams."""

from coordinator.openapi.openai_requests import FUNCTION
from coordinator.openapi.parts import (
    ANY,
    COUNT,
    FLAG,
    ID,
    MIN_P,
    MODEL,
    NAME,
    NOT_READY,
    OBJECT,
    PENALTY,
    REPETITION_PENALTY,
    SEED,
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
    ref,
    whole,
)
from coordinator.protocols.asked import Json
from coordinator.protocols.ollama import OF_MACHINES
from coordinator.protocols.openai_fields import MOST_TOKENS
from unicluster.chat_limits import MOST_MESSAGES, MOST_TOOL_CALLS, MOST_TOOLS

_SAID = {"content": TEXT}
_COMMON = {
    "model": MODEL,
    "stream": FLAG,
    "think": choice(True, False, "low", "medium", "high"),
    "format": either(choice("json", ""), OBJECT),
    "options": ref("OllamaOptions"),
    "keep_alive": ANY,
}
_CALL = asked(
    {"function": asked({"name": NAME}, {"arguments": OBJECT, "index": ANY})},
    {"type": choice("function"), "id": ID},
)
_DETAILS = answered(
    {
        **dict.fromkeys(("parent_model", "format", "family"), TEXT),
        "families": items(TEXT),
        **dict.fromkeys(("parameter_size", "quantization_level"), TEXT),
    }
)
_ENTRY = {"name": TEXT, "model": TEXT, "size": COUNT, "digest": TEXT, "details": _DETAILS}
_HEAD = {"model": TEXT, "created_at": {"type": "string", "format": "date-time"}}
_DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
_LAST = {
    "done": choice(True),
    "done_reason": choice("stop", "length"),
    "prompt_eval_count": COUNT,
    "eval_count": COUNT,
    **dict.fromkeys(_DURATIONS, COUNT),
}
_LOADED = {"done": choice(True), "done_reason": choice("load")}
_MORE = {"done": choice(False)}
_MESSAGE = {
    "message": answered(
        {"role": choice("assistant"), "content": TEXT},
        {
            "thinking": TEXT,
            "tool_calls": items(
                answered({"id": TEXT, "function": answered({"name": TEXT, "arguments": OBJECT})})
            ),
        },
    )
}


def _last(said: dict[str, Json], thought: dict[str, Json] | None = None) -> Json:
    """A whole answer or the end of one, or that the model is loaded, where no answer was wanted."""
    return either(
        answered({**_HEAD, **said, **_LAST}, thought),
        answered({**_HEAD, **said, **_LOADED}),
    )


def _line(said: dict[str, Json], thought: dict[str, Json] | None = None) -> Json:
    """A line of a stream: a piece, the last one, or an error."""
    return either(
        answered({**_HEAD, **said, **_MORE}, thought),
        _last(said, thought),
        ref("OllamaError"),
    )


SCHEMAS: dict[str, Json] = {
    "OllamaError": answered({"error": TEXT}, NOT_READY),
    "OllamaOptions": asked(
        {},
        {
            "temperature": TEMPERATURE,
            "top_p": TOP_P,
            "top_k": whole(0, MOST_TOKENS),
            "min_p": MIN_P,
            "repeat_penalty": REPETITION_PENALTY,
            "presence_penalty": PENALTY,
            "frequency_penalty": PENALTY,
            "seed": SEED,
            "num_predict": either(whole(-2, -1), whole(1, MOST_TOKENS)),
            "num_ctx": whole(1, MOST_TOKENS),
            "stop": STOP,
            **anything(OF_MACHINES),
        },
    ),
    "OllamaMessage": either(
        asked({"role": choice("system", "user")}, {**_SAID}),
        asked(
            {"role": choice("assistant")},
            {**_SAID, "thinking": TEXT, "tool_calls": items(_CALL, most=MOST_TOOL_CALLS)},
        ),
        asked(
            {"role": choice("tool")},
            {**_SAID, "tool_name": ID, "name": ID, "tool_call_id": ID},
        ),
    ),
    "OllamaChatRequest": asked(
        {},
        {
            **_COMMON,
            "messages": items(ref("OllamaMessage"), most=MOST_MESSAGES),
            "tools": items(ref("OllamaTool"), most=MOST_TOOLS),
        },
    ),
    "OllamaTool": asked(
        {"function": asked({"name": NAME}, FUNCTION)}, {"type": choice("function")}
    ),
    "OllamaGenerateRequest": asked({}, {**_COMMON, "prompt": TEXT, "system": TEXT, "raw": FLAG}),
    "OllamaShowRequest": asked({}, {"model": TEXT, "name": TEXT, "verbose": FLAG}),
    "OllamaChatAnswer": _last(_MESSAGE),
    "OllamaGenerateAnswer": _last({"response": TEXT}, {"thinking": TEXT}),
    "OllamaChatLine": _line(_MESSAGE),
    "OllamaGenerateLine": _line({"response": TEXT}, {"thinking": TEXT}),
    "OllamaTags": answered({"models": items(answered({**_ENTRY, "modified_at": TEXT}))}),
    "OllamaRunning": answered(
        {
            "models": items(
                answered(
                    {**_ENTRY, "size_vram": COUNT, "context_length": COUNT, "expires_at": TEXT}
                )
            )
        }
    ),
    "OllamaShown": answered(
        {
            "details": _DETAILS,
            "model_info": answered(
                {"general.architecture": TEXT, "unicluster.context_length": COUNT}
            ),
            "capabilities": items(TEXT),
            **dict.fromkeys(
                ("modified_at", "template", "parameters", "modelfile", "license"), TEXT
            ),
        }
    ),
    "OllamaVersion": answered({"version": TEXT}),
}
