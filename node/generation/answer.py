"""One answer: tokens in, events out."""

import time
from typing import Any

import mlx.core as mx

from node.generation.request import Job
from node.generation.text import Segment, TextStream
from node.metering.meters import AnswerMeter
from node.metering.timeline import Timeline
from node.prompts.token_bytes import TokenBytes
from unicluster.v1.chat_pb2 import Delta, Finish, GenerateEvent, Timings, TokenLogprob, Usage

_FIELD_OF = {"normal": "text", "reasoning": "reasoning", "tool": "tool_call"}


class Answer:
    """The events of one request. `asked` is when it came, by time.perf_counter.

    `cached_tokens`: prompt tokens that needed no prefill, set by the scheduler. `timeline` exists
    if the request asks for a trace.
    """

    def __init__(self, job: Job, tokenizer: Any, asked: float, meter: AnswerMeter) -> None:
        self.finished = False
        self.cached_tokens = 0
        self._drafted = self._accepted = 0
        self._job = job
        self._text = TextStream(
            tokenizer, job.stop, job.marks, constrained=job.constraint is not None
        )
        self._bytes = TokenBytes(tokenizer) if job.logprobs is not None else None
        self._end_tokens: set[int] = set() if job.ignore_eos else tokenizer.eos_token_ids
        self._count = self._steps = 0
        self._asked = asked
        self._meter = meter
        self._begun = time.perf_counter()
        self.timeline: Timeline | None = None
        if job.trace:
            self.timeline = Timeline(asked)
            self.timeline.add("waiting", asked, self._begun)
        self._first = self._last = 0.0

    def count_drafted(self, drafted: int, accepted: int) -> None:
        """Counts tokens that were drafted, and how many of them the model accepted."""
        self._drafted += drafted
        self._accepted += accepted
        self._meter.drafted_tokens += drafted
        self._meter.accepted_tokens += accepted

    def add(self, token: int, logprobs: mx.array) -> list[GenerateEvent]:
        """The events of one more token; `logprobs` are those of the whole vocabulary."""
        before, self._last = self._last, time.perf_counter()
        if self._steps:
            self._meter.between_tokens.note(self._last - before)
        else:
            self._first = self._last
            self._meter.time_to_first_token.note(self._first - self._asked)
        self._steps += 1
        if token in self._end_tokens:
            return [*_events(self._text.finish()), self._finish("stop")]
        self._count += 1
        self._meter.generated_tokens += 1
        segments = self._text.add(token)
        called = self._job.single_tool_call and any(each.kind == "tool" for each in segments)
        self.finished = self._text.stopped or called or self._count == self._job.max_tokens
        if self.finished:
            segments += self._text.finish()
        # The token goes into the last event of its text, so that neither is seen without the other.
        events = _events(segments) or [GenerateEvent(delta=Delta())]
        events[-1].delta.token_ids.append(token)
        if self._bytes is not None:
            best: Any = mx.argsort(-logprobs)[: self._job.logprobs].tolist()
            (chosen, *top) = _look_up(logprobs, [token, *best], self._bytes)
            chosen.top.extend(top)
            events[-1].delta.logprobs.append(chosen)
        if self.finished:
            events.append(self._finish("stop" if self._text.stopped or called else "length"))
        return events

    def _finish(self, reason: str) -> GenerateEvent:
        self.finished = True
        self._meter.ended[reason] += 1
        decode = self._last - self._first
        usage = Usage(
            prompt_tokens=len(self._job.tokens),
            completion_tokens=self._count,
            cached_tokens=self.cached_tokens,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
        )
        timings = Timings(
            queue_s=self._begun - self._asked,
            time_to_first_token_s=self._first - self._asked,
            decode_s=decode,
            tokens_per_s=(self._steps - 1) / decode if decode else 0.0,
        )
        trace = self.timeline.to_wire() if self.timeline is not None else None
        return GenerateEvent(
            finish=Finish(
                reason=reason,
                usage=usage,
                timings=timings,
                trace=trace,
                stop_string=self._text.stop_string,
            )
        )


def _events(segments: list[Segment]) -> list[GenerateEvent]:
    events = []
    for kind, text in segments:
        delta = Delta()
        setattr(delta, _FIELD_OF[kind], text)
        events.append(GenerateEvent(delta=delta))
    return events


def _look_up(logprobs: mx.array, tokens: list[int], texts: TokenBytes) -> list[TokenLogprob]:
    values: Any = logprobs[mx.array(tokens)].tolist()
    return [
        TokenLogprob(token_id=token, logprob=logprob, text=texts.of(token))
        for token, logprob in zip(tokens, values, strict=True)
    ]
