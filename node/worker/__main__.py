"""A stage worker: the process that holds layers. Started by an agent or by `unicluster.load`.

It reads its configuration, certificate included, as one line of JSON from standard input, sends
events and log records to the file descriptor whose number is its argument, and ends when standard
input closes: a worker never outlives its starter. Until then each further line of the input is
a new certificate. Only libraries print.
"""

import asyncio
import contextlib
import importlib
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import uvloop
from mlx_lm.utils import maybe_set_recommended_wired_limit

from node.engines.choose import choose
from node.engines.engine import Engine, LoadedHead
from node.generation.config import GenerationConfig
from node.generation.engine import GenerationEngine
from node.metering.meters import AnswerMeter
from node.pipeline.pipeline_model import Front
from node.prefixes.index import PrefixIndex
from node.prefixes.store import PrefixStore
from node.ring.compute_thread import MLXThread
from node.ring.compute_watch import watch
from node.ring.session import StageEngine
from node.ring.stage_service import StageService
from node.ring.stuck import name_of
from node.speculation.drafting import Speculation
from node.weights.fetch import describe, fetch_ranges, is_whole
from node.weights.sources import Sources
from node.worker.channel import emit, open_channel
from node.worker.config import WorkerConfig
from node.worker.draft import fetch_draft, load_draft
from node.worker.head import Head, HeadChat
from node.worker.prefixes import open_prefixes
from unicluster import causes, failpoints
from unicluster.causes import Cause
from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.cluster.background import going_on
from unicluster.cluster.channels import bind, make_server
from unicluster.cluster.sizes import CHAT_BYTES, FRAME_BYTES
from unicluster.deadlines import DECODE, LOAD, PREFILL, Work, WorkDeadlines, next_bytes
from unicluster.errors import InputError, StuckError, UniclusterError, in_one_line
from unicluster.trust.identity import Credentials, Identity
from unicluster.trust.keyring import HandedKeyring
from unicluster.v1.chat_pb2_grpc import add_ChatServicer_to_server, add_HeadServicer_to_server
from unicluster.v1.node_pb2 import LoadProgress, StageSpec
from unicluster.v1.stage_pb2 import StageInfo
from unicluster.v1.stage_pb2_grpc import add_StageServicer_to_server

log = logging.getLogger("unicluster.worker")

T = TypeVar("T")

# The network thread must get the interpreter within a fraction of a hop.
SWITCH_INTERVAL = 1e-4

# Imported where they are used, by some stages only.
LATER_IMPORTS = ("mlx_lm.models.llama", "llama_cpp", "llguidance")

# Between two reports of a download's progress.
REPORT_SECONDS = 0.2
# Between two reports of computed tokens.
TOKENS_SECONDS = 2.0
# Between two signs of life.
ALIVE_SECONDS = 1.0
# For the last messages of a worker that ends: the reason, to all who wait.
GOODBYE_SECONDS = 0.5


def download_reporter() -> Callable[[int, int], None]:
    """A callback that reports a download's progress, at its ends and every REPORT_SECONDS."""
    reported = 0.0

    def report(fetched: int, total: int) -> None:
        nonlocal reported
        if (now := time.monotonic()) - reported > REPORT_SECONDS or fetched in (0, total):
            reported = now
            emit("fetching", fetched=fetched, to_fetch=total)

    return report


async def report_tokens(meter: StageEngine | AnswerMeter) -> None:
    """Reports every TOKENS_SECONDS how many more tokens were computed, if any were."""
    reported = 0
    while True:
        await asyncio.sleep(TOKENS_SECONDS)
        with going_on("reporting tokens"):
            if (now := meter.computed_tokens) != reported:
                emit("tokens", more=now - reported)
                reported = now


async def report_alive() -> None:
    """Reports that the event loop runs, to a starter that ends a worker that is silent."""
    while True:
        emit("alive")
        await asyncio.sleep(ALIVE_SECONDS)


def progress_reporter(spec: StageSpec, thread: MLXThread) -> Callable[[LoadProgress], None]:
    """A callback, for the compute thread, that reports the loaded layers and bytes of the stage.

    It also tells the thread's watch how much comes next.
    """

    def report(progress: LoadProgress) -> None:
        emit(
            "progress",
            layers=progress.layers_done,
            layers_total=progress.layers_total,
            bytes=progress.bytes_done,
            bytes_total=progress.bytes_total,
        )
        thread.begin(Work(LOAD, next_bytes(progress, spec.memory)))
        failpoints.reach("worker.load")

    return report


async def fetch_stage(
    config: WorkerConfig, identity: Credentials, thread: MLXThread
) -> tuple[Engine, Checkpoint, Path | None]:
    """Fetches the bytes of the stage onto this machine, and those of its draft model, if any.

    Returns the stage's engine, its checkpoint, and the draft's directory. Raises as `describe`,
    `fetch_ranges` and Engine.ranges do.
    """
    spec, report = config.spec, download_reporter()
    await failpoints.reach_async("worker.fetch")
    asked = Sources(config.sources, identity, config.vouching, config.elsewhere)
    async with asked as sources:
        checkpoint = await describe(spec.model, spec.revision, sources)
        engine = choose(checkpoint, spec.engine)
        if not is_whole(checkpoint):
            ranges = await thread.run(lambda: engine.ranges(checkpoint, spec))
            made = engine.made_bytes(checkpoint, spec)
            await fetch_ranges(checkpoint, ranges, config.hub_files, sources, report, made=made)
        draft = await fetch_draft(spec.draft, sources, report) if spec.draft.model else None
    return engine, checkpoint, draft


def generation_engine(
    spec: StageSpec,
    tokenizer: Any,
    checkpoint: Checkpoint,
    front: Front,
    draft: Path | None,
    thread: MLXThread,
    prefixes: PrefixIndex | None,
) -> GenerationEngine:
    """The engine that generates answers, with its draft model; on the compute thread."""
    model = load_draft(draft, spec.draft.quant) if draft is not None else None
    speculation = Speculation.of(spec, model, len(tokenizer))
    hidden_bytes = front.hidden_bytes
    config = GenerationConfig.of(spec, checkpoint.root, hidden_bytes, speculation, prefixes)
    return GenerationEngine(thread, tokenizer, config)


@dataclass(frozen=True)
class Served:
    """A loaded stage behind its server. fail: ends all streams with an error."""

    server: grpc.aio.Server
    port: int
    weight_bytes: int
    meter: StageEngine | AnswerMeter
    fail: Callable[[UniclusterError], None]


async def load(config: WorkerConfig, identity: Credentials, thread: MLXThread) -> Served:
    """Fetches and loads the stage, and serves it. Raises what `fetch_stage` and Engine.load do."""
    spec = config.spec
    server = make_server(most_bytes=FRAME_BYTES if spec.first_layer else CHAT_BYTES)
    port = bind(server, config.host, config.port, identity)
    engine, checkpoint, draft = await fetch_stage(config, identity, thread)
    # Before the weights, which take longer: it may be damaged.
    work = Work(LOAD, spec.memory)
    tokenizer = await thread.run(lambda: _tokenizer(engine, checkpoint, spec), work)
    await thread.run(maybe_set_recommended_wired_limit)  # on Metal: else idle weights are paged out
    report = progress_reporter(spec, thread)
    loaded = await thread.run(
        lambda: engine.load(checkpoint, spec, report, prebuilt=config.prebuilt), work
    )
    prefixes = await open_prefixes(config, engine, checkpoint, identity)
    info = StageInfo(
        saves=prefixes is not None,
        node=config.node,
        first_layer=spec.first_layer,
        end_layer=spec.end_layer,
        weight_bytes=loaded.weight_bytes,
        engine=engine.name,
    )
    meter: StageEngine | AnswerMeter
    if isinstance(loaded, LoadedHead):
        front = loaded.front
        index = prefixes if isinstance(prefixes, PrefixIndex) else None
        front.keep_prefixes(index.store if index is not None else None)
        generation = await thread.run(
            lambda: generation_engine(spec, tokenizer, checkpoint, front, draft, thread, index),
            work,
        )
        meter = generation.meter
        ring = WorkDeadlines({DECODE.kind: spec.ring_decode_s, PREFILL: spec.ring_prefill_s})
        head = Head(
            *(front, info, generation, identity),
            prebuilt=loaded.prebuilt,
            deadlines=ring,
            grace_s=spec.orphan_grace_s,
        )
        add_HeadServicer_to_server(head, server)
        add_ChatServicer_to_server(HeadChat(generation, head, thread), server)
        fail = head.fail
    else:
        meter = loaded.stage
        loaded.stage.prefixes = prefixes if isinstance(prefixes, PrefixStore) else None
        service = StageService(loaded.stage, info, thread, identity)
        add_StageServicer_to_server(service, server)
        fail = service.fail
    await failpoints.reach_async("worker.loaded")
    await server.start()
    return Served(server, port, loaded.weight_bytes, meter, fail)


async def serve(config: WorkerConfig, identity: Credentials) -> None:
    """Loads the stage and serves it until a signal ends it.

    Raises StageError once the compute thread is stuck, or has failed.
    """
    spec = config.spec
    thread = MLXThread(WorkDeadlines({DECODE.kind: spec.decode_s, PREFILL: spec.prefill_s}))
    named = StageInfo(first_layer=spec.first_layer, end_layer=spec.end_layer)
    watching = asyncio.create_task(watch(thread, name_of(config.node, named)))
    living = asyncio.create_task(report_alive())
    served = await _unless(watching, load(config, identity, thread))
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    emit("ready", port=served.port, weight_bytes=served.weight_bytes)
    reporting = asyncio.create_task(report_tokens(served.meter))
    try:
        await _unless(watching, ended.wait())
    except UniclusterError as error:
        served.fail(error)
        raise
    finally:
        reporting.cancel()
        living.cancel()
        await served.server.stop(grace=GOODBYE_SECONDS)


async def _unless(watching: "asyncio.Task[None]", work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, unless `watching` raises before it is done."""
    working = asyncio.create_task(work)
    await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
        working.cancel()
        watching.result()
    return await working


def _tokenizer(engine: Engine, checkpoint: Checkpoint, spec: StageSpec) -> Any:
    """The head's tokenizer; None of other stages. Raises InputError where it can't be used."""
    if spec.first_layer:
        return None
    try:
        return engine.tokenizer(checkpoint)
    except UniclusterError:
        raise
    except Exception as error:  # transformers' and its tokenizers' are of many kinds
        reason = in_one_line(error)
        raise InputError(f"{checkpoint.root}: its tokenizer can't be loaded: {reason}") from error


def _first_line() -> str:
    """The configuration. Until it comes, libraries that a stage may need are imported."""
    for module in LATER_IMPORTS:
        if select.select([sys.stdin], [], [], 0)[0]:
            break
        # Of an engine that is not installed here, or is broken: a stage of it says so.
        with contextlib.suppress(ImportError, OSError, RuntimeError):
            importlib.import_module(module)
    return sys.stdin.readline()


def _follow_parent(keyring: HandedKeyring) -> None:
    """Takes each new certificate that whoever started this worker hands it, and ends with them."""
    for line in sys.stdin:
        try:
            keyring.current = Identity.from_dict(json.loads(line))
        except Exception as error:  # this thread must last: it ends the worker with its starter
            log.error("a certificate that can't be read: %s", type(error).__name__)
    os._exit(0)


def _cause(error: Exception) -> str:
    """The word for why this worker ends."""
    stuck = Cause.FROZEN if isinstance(error, StuckError) else Cause.FAILED
    return causes.of_error(error) or stuck


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("node.worker: started by `unicluster join` and unicluster.load only")
    open_channel(int(sys.argv[1]))
    sys.setswitchinterval(SWITCH_INTERVAL)
    sys.stdout = sys.stderr  # it goes to the same place, and line by line
    line = _first_line()
    if not line:  # whoever started it ended, or had no stage for it
        os._exit(0)
    try:
        config = WorkerConfig.from_line(line)
        keyring = HandedKeyring(Identity.from_dict(config.identity))
        threading.Thread(target=_follow_parent, args=(keyring,), daemon=True).start()
        uvloop.run(serve(config, keyring))
        code = 0
    except UniclusterError as error:
        emit("failed", reason=str(error), cause=_cause(error))
        code = error.exit_code
    except Exception as error:
        log.exception("worker failed")
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        emit("failed", reason=reason, cause=_cause(error))
        code = 1
    # MLX may still be computing for a client that is gone, or a download be under way: nothing
    # is worth waiting for.
    os._exit(code)


if __name__ == "__main__":
    main()
