"""From a request to the constraint on its answer; blocks while grammars are compiled."""

from collections.abc import Callable

from llguidance import LLMatcher

from node.constraints.beginning import Beginning
from node.constraints.call_constraint import CallConstraint, Marks
from node.constraints.call_grammar import call_grammar
from node.constraints.constraint import TextConstraint
from node.constraints.grammar import LIMITS, grammar_of, shortened, unforced
from node.constraints.mask import Filter, Mask
from node.constraints.numbers import NumberLimit
from node.constraints.phase import TEXT, Phase
from node.constraints.reasoning_budget import ReasoningBudget
from node.constraints.vocabulary import Vocabulary
from node.prompts.conversation import offers_tools
from node.tools.call_format import CallFormat
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import GenerateRequest


def constraint_of(
    request: GenerateRequest, vocabulary: Vocabulary, state: str, prompt_tokens: int
) -> Mask | None:
    """The constraint that a request asks for: on its text, on its calls, or none.

    `state` is where the answer begins: "normal", "reasoning", ... Raises InputError, which begins
    with the field's name, for what can't be constrained.
    """
    choice = request.tool_choice.WhichOneof("kind")
    must_call = choice in ("required", "name")
    strict = offers_tools(request) and any(tool.strict for tool in request.tools)
    if not request.HasField("constraint") and not must_call and not strict:
        return None
    if request.ignore_eos:
        raise InputError("ignore_eos: a constrained answer ends where its grammar does")
    if must_call or strict:
        if request.HasField("constraint"):
            field = "tool_choice: a call" if must_call else "tools: a strict call"
            raise InputError(f"{field} can't be asked for together with a constraint of the text")
        mask = _of_calls(request, vocabulary, state, prompt_tokens, required=must_call)
    else:
        mask = _of_text(request, vocabulary, state, prompt_tokens)
    mask.follow([])
    if mask.error is not None:
        raise InputError(f"constraint: allows no text at all, or none in time: {mask.error}")
    return mask


def reasoning_budget(
    request: GenerateRequest,
    vocabulary: Vocabulary,
    state: str,
    prompt_tokens: int,
    most: int,
    constraint: Filter | None,
) -> ReasoningBudget:
    """A budget of `most` tokens for an answer's reasoning, beside the `constraint` on it."""
    tokenizer, dialect = vocabulary.tokenizer, vocabulary.dialect
    with_tools = offers_tools(request)
    first, last = dialect.closings(with_tools=with_tools)
    opening = list(tokenizer.think_start_tokens) if tokenizer.has_thinking else []
    budget = ReasoningBudget(
        Phase(tokenizer, dialect.marks(state, with_tools=with_tools)),
        prompt_tokens,
        len(tokenizer),
        most,
        (vocabulary.tokens_of(first), vocabulary.tokens_of(last)),
        opening if len(opening) == 1 else (),
    )
    if isinstance(constraint, TextConstraint):
        budget.text_has_begun = lambda: constraint.text_has_begun
    budget.follow([])
    return budget


def _of_text(
    request: GenerateRequest, vocabulary: Vocabulary, state: str, prompt_tokens: int
) -> Mask:
    tokenizer, dialect = vocabulary.tokenizer, vocabulary.dialect
    with_tools = offers_tools(request)
    call = vocabulary.tokens_of(dialect.calls.start) if dialect.calls is not None else []
    marks = _reasoning_marks(vocabulary)
    leaving = set(tokenizer.eos_token_ids)
    if with_tools and call:
        marks.append(call)
    elif len(call) == 1:
        leaving.update(call)
    grammar = grammar_of(request.constraint)
    is_json = request.constraint.WhichOneof("kind") in ("json_schema", "json_object")
    # A pattern may spell a mark in any way; json.dumps leaves letters and angle brackets.
    has_pattern = not is_json or "pattern" in grammar.lower()
    if has_pattern or any(name in grammar for name in vocabulary.special()):
        grammar = unforced(grammar)
    matcher = _matcher(vocabulary, grammar)

    def beginning() -> Beginning:
        phase = Phase(tokenizer, dialect.marks(state, with_tools=with_tools))
        return Beginning(phase, marks, tokenizer.eos_token_ids)

    return TextConstraint(
        matcher,
        beginning,
        prompt_tokens,
        vocabulary.get().vocab_size,
        leaving=leaving,
        end_tokens=tokenizer.eos_token_ids,
        numbers=NumberLimit(vocabulary.numbers()) if is_json else None,
    )


def _of_calls(
    request: GenerateRequest,
    vocabulary: Vocabulary,
    state: str,
    prompt_tokens: int,
    *,
    required: bool,
) -> Mask:
    tokenizer, calls = vocabulary.tokenizer, vocabulary.dialect.calls
    if calls is None:
        raise InputError("tools: the form in which this model writes calls is not known")
    if calls.plain and not required:
        raise InputError("tools: strict ones can be had of this model with tool_choice required")
    tools = [tool for tool in request.tools if request.tool_choice.name in ("", tool.name)]
    return CallConstraint(
        _matcher(vocabulary, call_grammar(calls, tools, vocabulary.special())),
        Phase(tokenizer, vocabulary.dialect.marks(state, with_tools=True)),
        prompt_tokens,
        vocabulary.get().vocab_size,
        starts=_starts(vocabulary, calls),
        end=[] if calls.transitions else vocabulary.tokens_of(calls.end),
        end_tokens=sorted(tokenizer.eos_token_ids),
        required=required,
        numbers=NumberLimit(vocabulary.numbers()),
    )


def _starts(vocabulary: Vocabulary, calls: CallFormat) -> Callable[[str, bool], Marks]:
    """The marks that may come, by the answer's state and whether nothing has come yet."""
    call = vocabulary.tokens_of(calls.start)
    if calls.transitions:
        # Every message has a header, the first one's beginning is the prompt's.
        analysis = vocabulary.tokens_of("<|channel|>analysis<|message|>")
        next_call = vocabulary.tokens_of("<|start|>assistant" + calls.start)
        return lambda state, first: [analysis, call] if first else [next_call]
    reasoning = _reasoning_marks(vocabulary)
    return lambda state, first: [call, *(reasoning if first and state == TEXT else [])]


def _reasoning_marks(vocabulary: Vocabulary) -> Marks:
    tokenizer = vocabulary.tokenizer
    return [list(tokenizer.think_start_tokens)] if tokenizer.has_thinking else []


def _matcher(vocabulary: Vocabulary, grammar: str) -> LLMatcher:
    matcher = LLMatcher(vocabulary.get(), grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise InputError(f"constraint: {shortened(matcher.get_error())}")
    return matcher
