"""One answer: tokens in, events out."""

import time
from typing import Any

import mlx.core as mx

from node.answers.progress import events_of
from node.generation.request import Job
from node.metering.meters import AnswerMeter
from node.metering.timeline import Timeline
from node.prompts.token_bytes import TokenBytes
from unicluster.v1.chat_pb2 import (
    Begun,
    Delta,
    Finish,
    GenerateEvent,
    Timings,
    TokenLogprob,
    Usage,
)


class Answer:
    """The events of one request. `asked` is when it came, by time.perf_counter.

    `cached_tokens`: tokens that needed no prefill, of the prompt and of what is resumed, set by the
    scheduler. `timeline` exists if the request asks for a trace.
    """

    def __init__(self, job: Job, tokenizer: Any, asked: float, meter: AnswerMeter) -> None:
        self.cached_tokens = 0
        self._drafted = self._accepted = 0
        self._job = job
        self._progress = job.progress(tokenizer)
        self._bytes = TokenBytes(tokenizer) if job.logprobs is not None else None
        self._steps = 0
        self._asked = asked
        self._meter = meter
        self._begun = time.perf_counter()
        self.timeline: Timeline | None = None
        if job.trace:
            self.timeline = Timeline(asked)
            self.timeline.add("waiting", asked, self._begun)
        self._first = self._last = 0.0

    @property
    def finished(self) -> bool:
        return bool(self._progress.reason)

    def begun(self) -> list[GenerateEvent]:
        """The event that says what is computed first, where the request asks for one."""
        if not self._job.begun:
            return []
        prompt = [] if self._job.resumed is not None else self._job.tokens
        begun = Begun(prompt_token_ids=prompt, cached_tokens=self.cached_tokens)
        if self._job.most_reasoning is not None:
            begun.most_reasoning_tokens = self._job.most_reasoning
        return [GenerateEvent(begun=begun)]

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
            if not self._progress.count:  # else the client has had it long since
                self._meter.time_to_first_token.note(self._first - self._asked)
        self._steps += 1
        events = events_of(self._progress.add(token))
        if self._progress.is_end(token):
            return [*events, self.finish()]
        self._meter.generated_tokens += 1
        # The token goes into the last event of its text: who has the token has all of that.
        events = events or [GenerateEvent(delta=Delta())]
        events[-1].delta.token_ids.append(token)
        if self._bytes is not None:
            best: Any = mx.argsort(-logprobs)[: self._job.logprobs].tolist()
            (chosen, *top) = _look_up(logprobs, [token, *best], self._bytes)
            chosen.top.extend(top)
            events[-1].delta.logprobs.append(chosen)
        if self.finished:
            events.append(self.finish())
        return events

    def finish(self) -> GenerateEvent:
        """The last event of an answer that has finished."""
        reason = self._progress.reason
        self._meter.ended[reason] += 1
        decode = self._last - self._first
        resumed = self._job.resumed
        usage = Usage(
            prompt_tokens=len(self._job.tokens),
            completion_tokens=self._progress.count,
            cached_tokens=self.cached_tokens if resumed is None else resumed.cached_tokens,
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
                stop_string=self._progress.stop_string,
            )
        )


def _look_up(logprobs: mx.array, tokens: list[int], texts: TokenBytes) -> list[TokenLogprob]:
    values: Any = logprobs[mx.array(tokens)].tolist()
    return [
        TokenLogprob(token_id=token, logprob=logprob, text=texts.of(token))
        for token, logprob in zip(tokens, values, strict=True)
    ]
