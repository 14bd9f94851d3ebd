"""A stage worker: the process that holds layers. Started by an agent or by `unicluster.load`.

It reads its configuration, certificate included, as one line of JSON from standard input, sends
events and log records to the file descriptor whose number is its argument, and ends when standard
input closes: a worker never outlives who started it. Only libraries print.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.nn as nn
import uvloop
from mlx_lm.utils import load_tokenizer, maybe_set_recommended_wired_limit

from node.generation.engine import Engine
from node.metering.meters import AnswerMeter
from node.mlx.hollow import HollowModel
from node.mlx.lazy import LazyModel, load_lazy, load_parts, nbytes
from node.mlx.stage import Stage
from node.mlx.survey import survey
from node.ring.compute_thread import MLXThread
from node.ring.session import StageEngine
from node.ring.stage_service import StageService
from node.weights.fetch import describe, fetch, is_whole
from node.weights.sources import Sources
from node.worker.channel import emit, open_channel
from node.worker.config import WorkerConfig
from node.worker.draft import fetch_draft, load_draft
from node.worker.head import Head, HeadChat, make_engine
from unicluster.cluster.channels import bind, make_server
from unicluster.cluster.trust import Identity
from unicluster.errors import UniclusterError
from unicluster.v1.chat_pb2_grpc import add_ChatServicer_to_server, add_HeadServicer_to_server
from unicluster.v1.stage_pb2 import StageInfo
from unicluster.v1.stage_pb2_grpc import add_StageServicer_to_server

log = logging.getLogger("unicluster.worker")

# The network thread must get the interpreter within a fraction of a hop.
SWITCH_INTERVAL = 1e-4

# Between two reports of how far a download is.
TELL_SECONDS = 0.2
# And of how many tokens were computed.
TOKENS_SECONDS = 2.0


@dataclass(frozen=True)
class Loaded:
    """stage: of one that is not the first. front, engine: of the head; see PipelineModel."""

    weight_bytes: int
    stage: StageEngine | None = None
    front: Any = None
    engine: Engine | None = None


def teller() -> Callable[[int, int], None]:
    """Tells how far a download is, now and then."""
    told = 0.0

    def tell(fetched: int, total: int) -> None:
        nonlocal told
        if (now := time.monotonic()) - told > TELL_SECONDS or fetched in (0, total):
            told = now
            emit("fetching", fetched=fetched, to_fetch=total)

    return tell


async def fetch_weights(
    config: WorkerConfig, identity: Identity, thread: MLXThread
) -> tuple[Path, Path | None]:
    """Gets the files of the stage onto this machine; returns their directory.

    Also that of the draft model, if there is one.
    """
    tell = teller()
    async with Sources(config.sources, identity) as sources:
        checkpoint = await describe(config.model, config.revision, sources)
        if not is_whole(checkpoint):
            span = config.first_layer, config.end_layer, config.finishes
            tensors = await thread.run(
                lambda: survey(checkpoint.root, config.quant).of_stage(*span)
            )
            await fetch(checkpoint, tensors, config.hub_files, sources, tell)
        draft = await fetch_draft(config, sources, tell) if config.draft else None
    return checkpoint.root, draft


async def tell_tokens(meter: StageEngine | AnswerMeter) -> None:
    """Tells now and then how many more tokens were computed, if any were."""
    told = 0
    while True:
        await asyncio.sleep(TOKENS_SECONDS)
        if (now := meter.computed_tokens) != told:
            emit("tokens", more=now - told)
            told = now


def load_stage(path: Path, config: WorkerConfig) -> tuple[LazyModel, HollowModel, int]:
    """Loads the weights, telling progress; on the MLX thread. Also returns their bytes."""
    maybe_set_recommended_wired_limit()  # on Metal: else idle weights are paged out
    lazy = load_lazy(path, config.quant)
    first, end = config.first_layer, config.end_layer
    hollow = HollowModel(lazy.model, lazy.model_type, first, end, finishes=config.finishes)
    count = len(hollow.layers)
    parts = (*hollow.layers, *(hollow.outside if hollow.start > 0 else (lazy.model,)))
    total = nbytes(lazy.model) if hollow.start == 0 else sum(nbytes(part) for part in parts)
    done = 0
    emit("progress", layers=0, layers_total=count, bytes=0, bytes_total=total)
    for loaded, size in enumerate(load_parts(parts), start=1):
        # The last part of a head is the whole model: what is outside the layers came with it.
        done = min(done + size, total)
        emit(
            "progress",
            layers=min(loaded, count),
            layers_total=count,
            bytes=done,
            bytes_total=total,
        )
    return lazy, hollow, total


async def load_mlx(config: WorkerConfig, identity: Identity, thread: MLXThread) -> Loaded:
    """A stage of MLX."""
    path, draft_path = await fetch_weights(config, identity, thread)
    lazy, hollow, weight_bytes = await thread.run(lambda: load_stage(path, config))
    if hollow.start > 0:
        return Loaded(weight_bytes, Stage(hollow, foresee=config.foresee))
    draft = await _draft(draft_path, config, thread)
    tokenizer = load_tokenizer(lazy.path, eos_token_ids=lazy.config.get("eos_token_id"))
    engine = make_engine(lazy.path, tokenizer, hollow.hidden_bytes, thread, config, draft)
    return Loaded(weight_bytes, front=hollow, engine=engine)


async def load_ggml(config: WorkerConfig, identity: Identity, thread: MLXThread) -> Loaded:
    """A stage of ggml."""
    from node.worker import load_ggml as ggml  # an extra, not there on every machine

    async with Sources(config.sources, identity) as sources:
        tell = teller()
        checkpoint = await ggml.obtain(config, sources, tell)
        draft_path = await fetch_draft(config, sources, tell) if config.draft else None
    count = config.end_layer - config.first_layer
    emit("progress", layers=0, layers_total=count, bytes=0, bytes_total=0)
    loaded = await thread.run(lambda: ggml.load_stage(checkpoint, config))
    size = loaded.weight_bytes
    emit("progress", layers=count, layers_total=count, bytes=size, bytes_total=size)
    if loaded.front is None:
        return Loaded(size, loaded.stage)
    draft = await _draft(draft_path, config, thread)
    tokenizer = await thread.run(lambda: ggml.load_tokens(checkpoint))
    hidden_bytes = loaded.front.hidden_bytes
    engine = make_engine(checkpoint.root, tokenizer, hidden_bytes, thread, config, draft)
    return Loaded(size, front=loaded.front, engine=engine)


async def _draft(path: Path | None, config: WorkerConfig, thread: MLXThread) -> nn.Module | None:
    if path is None:
        return None
    return await thread.run(partial(load_draft, path, config.draft_quant))


async def serve(config: WorkerConfig) -> None:
    """Loads and serves until told to end."""
    identity = Identity.from_dict(config.identity)
    thread = MLXThread()
    server = make_server()
    port = bind(server, config.host, config.port, identity)
    load = load_ggml if config.engine == "ggml" else load_mlx
    loaded = await load(config, identity, thread)
    info = StageInfo(
        node=config.node,
        first_layer=config.first_layer,
        end_layer=config.end_layer,
        weight_bytes=loaded.weight_bytes,
        engine=config.engine,
    )
    meter: StageEngine | AnswerMeter
    if loaded.engine is not None:
        engine = loaded.engine
        meter = engine.meter
        # The other engine computes at once: there is nothing to build before.
        foresee = config.foresee and config.engine == "mlx"
        head = Head(loaded.front, info, engine, thread, identity, foresee=foresee)
        add_HeadServicer_to_server(head, server)
        add_ChatServicer_to_server(HeadChat(engine, head, thread), server)
    else:
        assert loaded.stage is not None  # noqa: S101  # one of the two is always there
        meter = loaded.stage
        add_StageServicer_to_server(StageService(loaded.stage, info, thread, identity), server)
    await server.start()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    emit("ready", port=port, weight_bytes=loaded.weight_bytes)
    counting = asyncio.create_task(tell_tokens(meter))
    await ended.wait()
    counting.cancel()
    await server.stop(grace=0.5)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("node.worker: started by `unicluster join` and unicluster.load only")
    open_channel(int(sys.argv[1]))
    sys.setswitchinterval(SWITCH_INTERVAL)
    sys.stdout = sys.stderr  # it goes to the same place, and line by line
    config = WorkerConfig(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        uvloop.run(serve(config))
        code = 0
    except UniclusterError as error:
        emit("failed", reason=str(error))
        code = error.exit_code
    except Exception as error:
        log.exception("worker failed")
        emit("failed", reason=f"{type(error).__name__}: {error}".splitlines()[0])
        code = 1
    # MLX may still be computing for a client that is gone, or a download be under way: nothing
    # is worth waiting for.
    os._exit(code)


if __name__ == "__main__":
    main()
