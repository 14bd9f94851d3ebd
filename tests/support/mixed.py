"""A pipeline model whose stages are of either engine."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from node.inprocess.first_stage import FirstStage, stage_specs
from node.inprocess.loader import Background
from node.pipeline.pipeline_model import PipelineModel
from node.ring.ring import Ring
from node.worker.config import WorkerConfig
from node.worker.process import WorkerProcess
from unicluster.checkpoints.fingerprint import whole
from unicluster.trust.cluster import Cluster
from unicluster.trust.identity import Identity
from unicluster.v1.node_pb2 import StageSpec
from unicluster.v1.stage_pb2 import RouteStop


@contextmanager
def mixed(
    path: Path,
    file: Path,
    engines: Sequence[str],
    *,
    identity: Identity | None = None,
    disk: Path | None = None,
) -> Iterator[Any]:
    """The model in `path`, also in the GGUF `file`: two layers here, and on each worker.

    `engines`: of each stage, the one here first. identity: of all machines, whose workers keep
    prefixes in `disk`, if there is one, each in a directory named by its index.
    """
    identity, background = identity or Cluster.new().issue("tests"), Background()
    workers: list[WorkerProcess] = []

    async def start(index: int, engine: str) -> RouteStop:
        model = file if engine == "ggml" else path
        spec = StageSpec(
            model=str(model),
            first_layer=2 * index,
            end_layer=2 * index + 2,
            context=512,
            users=4,
            revision=whole(model).manifest.revision,
            engine=engine,
            finishes=engines[0] == "ggml" and index == len(engines) - 1,
            cache_disk=1 << 30,
        )
        config = WorkerConfig(
            spec,
            node=f"{engine}-{index}",
            host="127.0.0.1",
            port=0,
            identity=identity.to_dict(),
            alone=True,
            cache_dir=str(disk / str(index)) if disk is not None else "",
        )
        workers.append(await WorkerProcess.start(config))
        async for event in workers[-1].events():
            if event["event"] == "ready":
                return RouteStop(node=config.node, address=f"127.0.0.1:{event['port']}")
        raise AssertionError((await workers[-1].exit()).reason)

    async def open_ring() -> Ring:
        others = list(enumerate(engines))[1:]
        stops = [await start(index, engine) for index, engine in others]
        return await Ring.open(stops, identity)

    try:
        ring = background.run(open_ring())
        checkpoint = whole(file if engines[0] == "ggml" else path)
        cuts = [(2 * index, 2 * index + 2) for index in range(len(engines))]
        spec = stage_specs(checkpoint, "", cuts)[0]
        head, _ = FirstStage(checkpoint, spec).load(identity, background.run)
        yield PipelineModel(head.front, ring, prebuilt=head.prebuilt)
        background.run(ring.close())
    finally:
        for worker in workers:
            background.run(worker.stop())
        background.stop()
