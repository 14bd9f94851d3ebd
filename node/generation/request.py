"""From a GenerateRequest to what the engine runs: everything is checked here, by field."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from node.answers.progress import AnswerProgress
from node.answers.resumed import Resumed, check_resume, read_again
from node.constraints.build import constraint_of, reasoning_budget
from node.constraints.constraint import TextConstraint
from node.constraints.mask import Filter, Mask
from node.constraints.reasoning_budget import ReasoningBudget
from node.constraints.vocabulary import Vocabulary
from node.generation.sampling import LogitsProcessor, Sampling, TokenChooser
from node.prompts.cancellation import AbandonedError, Cancellation
from node.prompts.conversation import conversation_of, offers_tools
from node.prompts.templates import TEMPLATES, template_of, variables_of
from node.prompts.thinking import budget_of
from node.prompts.tokenizing import Tokenizing
from node.prompts.written import written_prompt
from node.tools.formats import Dialect
from node.tools.reader import CallReader
from unicluster.chat_limits import check_limits, content_bytes
from unicluster.errors import BusyError, InputError, UnavailableError, in_one_line
from unicluster.v1 import chat_pb2


@dataclass(frozen=True)
class Job:
    """A checked request. `marks` is the state of mlx-lm's TextStateMachine that it begins in.

    begun: whether its first event is a Begun. resumed: what another head has generated of it.
    broke_off: whether it had its place at that head, by the coordinator's word.
    """

    tokens: list[int]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    logprobs: int | None
    marks: Any
    ignore_eos: bool = False
    no_reuse: bool = False
    trace: bool = False
    constraint: Mask | None = None
    most_reasoning: int | None = None
    budget: ReasoningBudget | None = None
    calls: CallReader | None = None
    single_tool_call: bool = False
    begun: bool = False
    broke_off: bool = False
    resumed: Resumed | None = None

    def progress(self, tokenizer: Any) -> AnswerProgress:
        """Reader of the answer's tokens, which has read those of the resumed part."""
        if self.resumed is not None:
            return self.resumed.progress
        text = self.constraint
        return AnswerProgress(
            tokenizer,
            self.stop,
            self.marks,
            max_tokens=self.max_tokens,
            end_tokens=() if self.ignore_eos else tokenizer.eos_token_ids,
            beginning=text.beginning() if isinstance(text, TextConstraint) else None,
            single_tool_call=self.single_tool_call,
        )

    def chooser(self) -> TokenChooser:
        """The sampler of the answer's tokens, which the last stage may choose; also greedy."""
        needs_logits = bool(self.sampling.processors(len(self.tokens))) or self.logprobs is not None
        return self.sampling.chooser(needs_logits, self._drawn, self.filters)

    @property
    def _drawn(self) -> int:
        """Tokens of the answer that were sampled before it was resumed here."""
        return 0 if self.resumed is None else len(self.resumed.tokens)

    @property
    def filters(self) -> list[Filter]:
        """Filters of the answer's tokens, each of which sees what those before it have seen."""
        return [each for each in (self.constraint, self.budget) if each is not None]

    def processors(self) -> list[LogitsProcessor]:
        """Logits processors of the answer; the filters come last."""
        return [*self.sampling.processors(len(self.tokens)), *self.filters]


def check_request(
    request: chat_pb2.GenerateRequest,
    tokenizer: Any,
    context: int,
    defaults: Sampling,
    tokenizing: Tokenizing,
    vocabulary: Vocabulary,
    cancellation: Cancellation,
) -> Job:
    """The job of a request; blocks while its prompt is rendered and tokenized.

    Raises InputError, which begins with the field's name, for an invalid request, and
    AbandonedError once it is cancelled.
    """
    check_limits(request)
    sampling = defaults.updated(request.sampling)
    _check_biases(sampling, len(tokenizer))
    tokens, granted = _prompt_tokens(request, tokenizer, context, tokenizing, cancellation)
    state = _initial_state(tokens, tokenizer, vocabulary.dialect)
    with_tools = offers_tools(request)
    constraint = constraint_of(request, vocabulary, state, len(tokens))
    most = budget_of(request, granted, reasons=vocabulary.dialect.reasons)
    budget = None
    if most is not None:
        budget = reasoning_budget(request, vocabulary, state, len(tokens), most, constraint)
    job = Job(
        tokens=tokens,
        max_tokens=_max_tokens(request, room=context - len(tokens)),
        sampling=sampling,
        stop=tuple(request.stop),
        logprobs=request.logprobs if request.HasField("logprobs") else None,
        marks=vocabulary.dialect.marks(state, with_tools=with_tools),
        ignore_eos=request.ignore_eos,
        no_reuse=request.no_reuse,
        trace=request.trace,
        constraint=constraint,
        most_reasoning=most,
        budget=budget,
        calls=_call_reader(request, vocabulary.dialect) if with_tools else None,
        single_tool_call=request.single_tool_call,
        begun=request.begun,
        broke_off=request.broke_off,
    )
    if not request.HasField("resume"):
        return job
    check_resume(request.resume, tokens, len(tokenizer))
    progress = job.progress(tokenizer)
    resumed = read_again(request.resume, progress, job.calls, job.filters, cancellation)
    return replace(job, resumed=resumed)


def _prompt_tokens(
    request: chat_pb2.GenerateRequest,
    tokenizer: Any,
    context: int,
    tokenizing: Tokenizing,
    cancellation: Cancellation,
) -> tuple[list[int], Collection[str]]:
    """Tokens of the prompt, and the wishes for reasoning that its template has granted."""
    field = _prompt_field(request)
    granted: Collection[str] = ()
    if field == "messages":
        tokens, granted = _render(request, tokenizer, tokenizing, cancellation)
    elif field == "prompt":
        tokens = tokenizing.encode(request.prompt, cancellation, special=True)
        if not tokens:
            raise InputError("prompt: there are no tokens in it")
    else:
        tokens = _given(request.token_ids, len(tokenizer))
    if len(tokens) >= context:
        raise InputError(
            f"{field}: the prompt has {len(tokens)} tokens and the context is {context}"
        )
    return tokens, granted


def _prompt_field(request: chat_pb2.GenerateRequest) -> str:
    present = {
        "messages": bool(request.messages),
        "token_ids": bool(request.token_ids),
        "prompt": request.HasField("prompt"),
    }
    fields = [name for name, is_there in present.items() if is_there]
    if len(fields) > 1:
        raise InputError(f"{fields[0]}: give either {fields[0]} or {fields[1]}, not both")
    return fields[0] if fields else "token_ids"


def _check_biases(sampling: Sampling, vocabulary: int) -> None:
    if sampling.logit_bias and (largest := max(sampling.logit_bias)) >= vocabulary:
        raise InputError(f"logit_bias: {largest} is not in the vocabulary of {vocabulary} tokens")


def _given(token_ids: Sequence[int], vocabulary: int) -> list[int]:
    if not token_ids:
        raise InputError("messages: there are none, nor are there token_ids")
    largest = max(token_ids)
    if largest >= vocabulary:
        raise InputError(f"token_ids: {largest} is not in the vocabulary of {vocabulary} tokens")
    return list(token_ids)


def _render(
    request: chat_pb2.GenerateRequest,
    tokenizer: Any,
    tokenizing: Tokenizing,
    cancellation: Cancellation,
) -> tuple[list[int], Collection[str]]:
    messages = request.messages
    tokenizing.check_length(content_bytes(request))
    last = messages[-1]
    if last.role in ("system", "user") and not last.content.strip():
        raise InputError("messages: the prompt is empty")
    if not tokenizer.has_chat_template:
        raise InputError(
            "messages: the model has no chat template: send token_ids or a plain prompt"
        )
    template = template_of(tokenizer, with_tools=offers_tools(request))
    try:
        if template is None:  # a format in Python, which is mlx-lm's or transformers' own
            tokens, granted = written_prompt(tokenizer, request)
        else:
            conversation = conversation_of(request)
            text = TEMPLATES.render(
                *(template, conversation, variables_of(tokenizer)),
                *(tokenizing.most_bytes, cancellation),
            )
            granted = conversation.granted
            tokens = tokenizing.encode(text, cancellation)
    except (InputError, AbandonedError, BusyError, UnavailableError):
        raise
    except Exception as error:  # such a format may raise anything
        reason = in_one_line(error)
        raise InputError(f"messages: the model's chat template refuses them: {reason}") from error
    if not tokens:
        raise InputError("messages: the prompt is empty")
    return list(tokens), granted


def _max_tokens(request: chat_pb2.GenerateRequest, room: int) -> int:
    if not request.HasField("max_tokens"):
        return room
    if request.max_tokens > room:
        raise InputError(
            f"max_tokens: the context has room for {room} after the prompt, "
            f"got {request.max_tokens}"
        )
    return request.max_tokens


def _call_reader(request: chat_pb2.GenerateRequest, dialect: Dialect) -> CallReader:
    if dialect.calls is None:
        raise InputError("tools: the form in which this model writes calls is not known")
    return CallReader(dialect.calls, request.tools, single=request.single_tool_call)


def _initial_state(tokens: list[int], tokenizer: Any, dialect: Dialect) -> str:
    """Some templates open the reasoning themselves: then the answer begins inside it."""
    if dialect.initial_state:
        return dialect.initial_state
    if tokenizer.has_thinking:
        begun = tokenizer.rfind_think_start(tokens)
        if begun > tokenizer.rfind_think_end(tokens):
            return "reasoning"
    return "normal"
