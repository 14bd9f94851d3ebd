"""Fields that OpenAI's APIs share: sampling, messages, what is passed over, what is refused."""

from collections.abc import Sequence
from typing import Any

from coordinator.protocols.asked import Json
from coordinator.protocols.fields import Fields, brief, clean, number, whole
from coordinator.protocols.openai_strict import check_strict
from unicluster.chat_limits import MOST_BIASES
from unicluster.client.answers import Usage
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import GenerateRequest
from unicluster.v1.chat_pb2 import Usage as WireUsage

MOST_TOKENS = (1 << 31) - 1
# Answers to one request.
MOST_CHOICES = 16

# Their documents say that these change no answer: labels, caching hints, storage, billing.
NO_EFFECT = (
    *("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
)

# Tokens before the next one that the repetition penalty looks at: node/generation/sampling.py.
PENALTY_WINDOW = 20


def read_sampling(fields: Fields, request: GenerateRequest) -> None:
    """Puts temperature, top_p, penalties, seed, bias and stop strings into the request.

    `top_k`, `min_p`, `repetition_penalty` and its window are extensions that other servers have.
    """
    sampling = request.sampling
    names = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
    for name in (*names, "min_p", "repetition_penalty"):
        if (value := fields.number(name)) is not None:
            setattr(sampling, name, value)
    fields.choice("repetition_context_size", (PENALTY_WINDOW,))
    if (top_k := fields.whole("top_k", 0, MOST_TOKENS)) is not None:
        sampling.top_k = top_k
    if (seed := fields.whole("seed", -(1 << 63), (1 << 64) - 1)) is not None:
        sampling.seed = seed % (1 << 64)
    if (biases := fields.object("logit_bias")) is not None:
        _read_biases(biases, request)
    request.stop.extend(stop_strings(fields, "stop"))


def stop_strings(fields: Fields, name: str) -> list[str]:
    """A text or a list of texts."""
    value, path = fields.take(name), fields.path(name)
    if value is None:
        return []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        raise InputError(f"{path}: must be a text or a list of texts")
    return [clean(each, path) for each in values]


def read_limit(fields: Fields, request: GenerateRequest, *names: str) -> str:
    """Puts the largest number of tokens into the request; two names of it may not differ.

    Returns the name that was used.
    """
    limits = {name: fields.whole(name, 1, MOST_TOKENS) for name in names}
    there = {name: limit for name, limit in limits.items() if limit is not None}
    if len(set(there.values())) > 1:
        raise InputError(f"{names[0]}: {' and '.join(there)} differ: give one of them")
    for limit in there.values():
        request.max_tokens = limit
    return next(iter(there), names[0])


def read_reasoning(fields: Fields, request: GenerateRequest, effort: str, most: str) -> None:
    """Puts how much to reason into the request, from fields of those names.

    The second is an extension: tokens of reasoning, after which the answer begins.
    """
    if (value := fields.text(effort)) is not None:
        request.reasoning.effort = value
    if (tokens := fields.whole(most, 0, MOST_TOKENS)) is not None:
        request.reasoning.most_tokens = tokens


def read_service(fields: Fields) -> None:
    """Passes over what changes no answer, and refuses what would have to be stored."""
    fields.accept(*NO_EFFECT)
    fields.choice("service_tier", ("auto", "default"))
    fields.choice("store", (False,))


def read_streaming(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether the stream ends with the usage."""
    stream = fields.flag("stream")
    options = fields.object("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise InputError("stream_options: only with stream")
    include_usage = options.flag("include_usage")
    options.choice("include_obfuscation", (False,))
    options.done()
    return stream, include_usage


def read_format(fields: Fields, request: GenerateRequest) -> None:
    """Puts the form that an answer must have, a `response_format`, into the request.

    Beyond OpenAI's, {"type": "regex", "regex": ...} and {"type": "grammar", "grammar": ...}.
    """
    form = fields.object("response_format")
    if form is None:
        return
    kind = form.choice("type", ("text", "json_object", "json_schema", "regex", "grammar"))
    if kind is None:
        raise InputError(f"{form.path('type')}: missing")
    if kind == "json_object":
        request.constraint.json_object = True
    elif kind == "json_schema":
        named = form.object("json_schema")
        if named is None:
            raise InputError(f"{form.path('json_schema')}: missing")
        read_schema(named, request)
    elif kind != "text":
        setattr(request.constraint, kind, form.needed_text(kind))
    form.done()


def read_schema(named: Fields, request: GenerateRequest) -> None:
    """Puts a JSON schema into the request: strict or not, the answer will match it.

    A strict one must be as OpenAI's strict mode has it.
    """
    named.accept("name", "description")
    strict = named.flag("strict")
    schema = named.object("schema")
    if schema is None:
        raise InputError(f"{named.path('schema')}: missing")
    request.constraint.json_schema = schema.as_json()
    if strict:
        check_strict(schema.values, named.path("schema"))
    named.done()


def usage_json(usages: Sequence[Usage | WireUsage], reasoning_tokens: int) -> Json:
    """Usage of all answers to one request; its prompt counts once.

    reasoning_tokens: of all the answers together.
    """
    prompt = usages[0].prompt_tokens
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": usages[0].cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def _read_biases(biases: Fields, request: GenerateRequest) -> None:
    values: dict[str, Any] = {}
    for name in biases.names():
        values[name] = biases.take(name)
    if len(values) > MOST_BIASES:
        raise InputError(f"logit_bias: {len(values)} tokens, and at most {MOST_BIASES}")
    for name, bias in values.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise InputError(f"logit_bias: {brief(name)} is no token id")
        request.sampling.logit_bias[int(name)] = number(bias, "logit_bias")


def token_ids(values: Sequence[Any], path: str) -> list[int]:
    return [whole(value, path, 0, (1 << 32) - 1) for value in values]
