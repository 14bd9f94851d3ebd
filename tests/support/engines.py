"""Engines over tiny models, for tests."""

import asyncio
import atexit
import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm

import unicluster
from node.generation.config import GenerationConfig
from node.generation.engine import GenerationEngine
from node.ring.compute_thread import MLXThread
from tests.support.deadlines import scaled
from tests.support.tiny import EOS, VOCAB
from unicluster.v1.chat_pb2 import Finish, GenerateRequest
from unicluster.v1.node_pb2 import StageSpec

DEADLINE = 60.0  # seconds on an idle machine
THREAD = MLXThread()  # models of MLX live on one thread


@atexit.register
def _end_streams() -> None:
    """MLX aborts the process when it exits while another thread has streams."""
    ended = threading.Event()
    THREAD.post(mx.clear_streams)
    THREAD.post(ended.set)
    ended.wait(scaled(DEADLINE))


@dataclass
class Completion:
    """Text, tokens and finish of one answer."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish: Finish | None = None
    texts: list[str] = field(default_factory=list)  # event by event

    @property
    def reason(self) -> str:
        return self.finish.reason if self.finish else "none"


async def listen(events: Any) -> Completion:
    """Collects the events of an answer until it ends; raises its error."""
    completion = Completion()
    async with asyncio.timeout(scaled(DEADLINE)):
        async for event in events:
            if event.HasField("finish"):
                completion.finish = event.finish
                continue
            delta = event.delta
            completion.text += delta.text
            completion.texts.append(delta.text)
            completion.reasoning += delta.reasoning
            completion.tool_calls += [delta.tool_call] if delta.tool_call else []
            completion.tokens += delta.token_ids
            completion.logprobs += delta.logprobs
    return completion


@dataclass
class Tiny:
    """A tiny model, and completions of it by mlx-lm alone."""

    model: Any
    tokenizer: Any

    @classmethod
    async def load(cls, path: Path) -> "Tiny":
        _ELSEWHERE[:] = _caches()
        return cls(*await THREAD.run(lambda: mlx_lm.load(str(path))))

    async def alone(self, prompt: list[int], max_tokens: int = 24, **options: Any) -> Completion:
        """The completion by mlx-lm's own stream_generate."""

        def generate() -> Completion:
            completion = Completion()
            for step in mlx_lm.stream_generate(
                self.model, self.tokenizer, prompt, max_tokens=max_tokens, **options
            ):
                completion.text += step.text
                completion.tokens += [] if step.token == EOS else [step.token]
                completion.logprobs.append(step.logprobs[step.token].item())
            return completion

        return await THREAD.run(generate)

    async def engine(self, model: Any = None, **options: Any) -> GenerationEngine:
        """A running engine over this model, or over `model`. Close it.

        `options` are fields of StageSpec or of GenerationConfig.
        """
        sizes = {"context": 256, "users": 4, "prefill_step": 16, **options}
        of_spec = sizes.keys() & StageSpec.DESCRIPTOR.fields_by_name.keys()
        spec = StageSpec(**{name: sizes.pop(name) for name in of_spec})
        config = GenerationConfig(spec, model_name="tiny", **sizes)
        engine = GenerationEngine(THREAD, self.tokenizer, config)
        await engine.set_model(model or self.model)
        return engine


@dataclass
class Split(Tiny):
    """A tiny model over three processes; `whole` is the model in one piece."""

    whole: Tiny
    name: str

    @classmethod
    async def open(cls, path: Path) -> "Split":
        whole = await Tiny.load(path)
        loaded = await THREAD.run(lambda: unicluster.load(str(path), local_nodes=3))
        return cls(*loaded, whole, path.name)

    async def until_free(self) -> None:
        """Waits until no cache is left on the stages."""
        async with asyncio.timeout(scaled(DEADLINE)):
            while await THREAD.run(self.model.live_caches):
                await asyncio.to_thread(gc.collect)


def of_tokens(prompt: list[int], **fields: Any) -> GenerateRequest:
    return GenerateRequest(token_ids=prompt, **({"max_tokens": 24} | fields))


async def ask(engine: GenerationEngine, prompt: list[int], **fields: Any) -> list[int]:
    return (await listen(await engine.submit(of_tokens(prompt, **fields)))).tokens


class Fragile:
    """A model that raises `error` from its call number `error_at` on, if there is one."""

    def __init__(self, model: Any) -> None:
        self.error: Exception | None = None
        self.error_at = 0
        self._calls = 0
        self._model = model

    def __call__(self, inputs: mx.array, cache: Any = None, **more: Any) -> Any:
        self._calls += 1
        if self.error is not None and self._calls >= self.error_at:
            raise self.error
        return self._model(inputs, cache=cache, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Script:
    """An mlx-lm model that answers a prompt of `prompt` tokens with `tokens`, then EOS."""

    def __init__(self, tokens: list[int], prompt: int = 1) -> None:
        self.layers = [object()]
        self._tokens = [*tokens, EOS]
        self._prompt = prompt

    def __call__(self, inputs: mx.array, cache: Any) -> mx.array:
        zeros = mx.zeros((inputs.shape[0], 1, inputs.shape[1], 1))
        cache[0].update_and_fetch(zeros, zeros)
        said = max(cache[0].size() - self._prompt, 0)
        token = self._tokens[min(said, len(self._tokens) - 1)]
        one_hot = (mx.arange(VOCAB) == token).astype(mx.float32)
        return mx.broadcast_to(one_hot, (*inputs.shape, VOCAB))


async def until(condition: Callable[[], Any]) -> None:
    """Waits for a condition, collecting garbage meanwhile."""
    async with asyncio.timeout(scaled(DEADLINE)):
        while not condition():
            await asyncio.to_thread(gc.collect)


# Caches that other tests in this process still hold.
_ELSEWHERE: list[Any] = []


def _caches() -> list[Any]:
    return [thing for thing in gc.get_objects() if "KVCache" in type(thing).__name__]


def live_caches() -> int:
    """KV caches alive in this process that were made since the model was loaded."""
    known = set(map(id, _ELSEWHERE))
    return sum(id(cache) not in known for cache in _caches())
