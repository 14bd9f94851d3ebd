"""Fetches a whole repository as a worker of one stage would. `python -m tests.support.fetch REPO`.

With a second argument `description` it fetches only that; with `check` it asks the hub only
whether it may.
"""

import asyncio
import sys

from node.mlx.survey import survey
from node.weights import hub
from node.weights.fetch import describe, fetch, fetch_ranges
from node.weights.sources import Sources
from unicluster.checkpoints.checkpoint import is_gguf
from unicluster.errors import UniclusterError
from unicluster.trust.cluster import Cluster

# What has come of a chunk is lost when the connection breaks, and the files here are small.
hub.CHUNK_BYTES = 4096


async def main(repo: str, only: str = "") -> None:
    if only == "check":
        hub.check(repo, "")
        return
    async with Sources((), Cluster.new().issue("test")) as sources:
        checkpoint = await describe(repo, "", sources)
        if only:
            return
        if is_gguf(repo):
            files = {name: checkpoint.all_of(name) for name in checkpoint.manifest.weights}
            await fetch_ranges(checkpoint, files, None, sources)
            return
        surveyed = survey(checkpoint.root)
        tensors = surveyed.of_stage(0, len(surveyed.layers))
        await fetch(checkpoint, tensors, None, sources)


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except UniclusterError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
