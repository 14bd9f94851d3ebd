"""The prefixes on disk of a worker's stage: where they are, and what they depend on."""

import asyncio
import hashlib
import json
import logging

from node.engines.engine import Engine
from node.prefixes.index import PrefixIndex
from node.prefixes.store import PrefixStore
from node.worker.config import WorkerConfig
from unicluster.checkpoints.checkpoint import Checkpoint
from unicluster.trust.authority import derived
from unicluster.trust.identity import Credentials

log = logging.getLogger("unicluster.prefixes")

# To look through the directory: a disk that is slower is of no use.
OPEN_SECONDS = 15.0
PURPOSE = b"unicluster prefixes on disk"
# Characters of a folder's name.
DIGITS = 32


async def open_prefixes(
    config: WorkerConfig, engine: Engine, checkpoint: Checkpoint, identity: Credentials
) -> PrefixIndex | PrefixStore | None:
    """The prefixes on disk of a stage: of the head with the tokens that they are of.

    None where there shall be none, or where the directory can't be used: the log says why.
    """
    spec = config.spec
    if not spec.cache_disk or not config.cache_dir:
        return None
    key = derived(identity.current.key_pem.encode(), PURPOSE, 32)
    depends_on = [
        *(checkpoint.manifest.model, checkpoint.manifest.revision, spec.quant),
        *(spec.first_layer, spec.end_layer, engine.name, engine.cache_settings(spec)),
    ]
    name = hashlib.blake2b(json.dumps(depends_on).encode(), key=key).hexdigest()[:DIGITS]

    def opened() -> PrefixIndex | PrefixStore | None:
        store = PrefixStore.at(config.cache_dir, name, spec.cache_disk, key)
        return store if store is None or spec.first_layer else PrefixIndex(store)

    try:
        return await asyncio.wait_for(asyncio.to_thread(opened), OPEN_SECONDS)
    except TimeoutError:
        log.warning(
            "prompt caches are not kept on disk: %s does not answer within %.0f s",
            config.cache_dir,
            OPEN_SECONDS,
        )
        return None
