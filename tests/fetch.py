"""Fetches a whole repository as a worker of one stage would. `python -m tests.fetch REPO`.

With a second argument it fetches only the description.
"""

import asyncio
import sys

from huggingface_hub import constants

from node.obtain import describe, fetch
from node.sources import Sources
from node.survey import survey
from unicluster.errors import UniclusterError
from unicluster.trust import Cluster

# What has come of a chunk is lost when the connection breaks, and the files here are small.
constants.DOWNLOAD_CHUNK_SIZE = 4096


async def main(repo: str, *only: str) -> None:
    async with Sources((), Cluster.new().issue("test")) as sources:
        checkpoint = await describe(repo, "", sources)
        if only:
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
