"""How much a model thinks before it answers, and the form of the answer, in Anthropic's API."""

from coordinator.protocols.fields import Fields
from coordinator.protocols.openai_fields import MOST_TOKENS
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import GenerateRequest

# Tokens of thinking for an effort; None: as many as the model likes.
EFFORTS = {"low": 1024, "medium": 4096, "high": None, "xhigh": None, "max": None}
# Edits that leave all thinking of earlier turns where it is.
KEEPS_ALL = ({"type": "clear_thinking_20251015", "keep": "all"},)


def read_thinking(fields: Fields, request: GenerateRequest) -> bool:
    """Whether the answer shows the model's reasoning.

    Its budget goes into the request, and the schema that the answer has to match.
    Effort is no more than a budget here: models that don't reason keep to any.
    """
    budgets = [_read_output(fields, request), None]
    _check_edits(fields)
    shows = False
    if (thinking := fields.object("thinking")) is not None:
        kind = thinking.choice("type", ("enabled", "adaptive", "disabled"))
        budgets[1] = thinking.whole("budget_tokens", 1, MOST_TOKENS)
        display = thinking.choice("display", ("summarized", "full", "omitted"))
        thinking.done()
        shows = kind in ("enabled", "adaptive") and display != "omitted"
        if kind == "disabled":
            request.reasoning.enabled = False
            return False
    if limits := [each for each in budgets if each is not None]:
        request.reasoning.most_tokens = min(limits)
    return shows


def _read_output(fields: Fields, request: GenerateRequest) -> int | None:
    """The budget of the effort in `output_config`; its schema goes into the request."""
    config = fields.object("output_config")
    if config is None:
        return None
    effort = config.choice("effort", EFFORTS)
    if (form := config.object("format")) is not None:
        _read_format(form, request)
    config.refuse({"task_budget": "leave it out"})
    config.done()
    return EFFORTS[effort] if effort is not None else None


def _read_format(form: Fields, request: GenerateRequest) -> None:
    kind, schema = form.choice("type", ("json_schema",)), form.object("schema")
    if kind is None or schema is None:
        raise InputError(f"{form.path('type' if kind is None else 'schema')}: missing")
    request.constraint.json_schema = schema.as_json()
    form.done()


def _check_edits(fields: Fields) -> None:
    management = fields.object("context_management")
    if management is None:
        return
    for at, edit in enumerate(management.items("edits") or []):
        if edit not in KEEPS_ALL:
            path = f"{management.path('edits')}[{at}]"
            raise InputError(f"{path}: not supported here: send the messages that count")
    management.done()
