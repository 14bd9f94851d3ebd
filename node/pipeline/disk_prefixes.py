"""Prefixes on the disks of all stages: saved by each in its own file, and used if all have it."""

import json
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from node.mlx.cache_view import revive, save
from node.pipeline.remote_cache import RemoteCache, RemoteStage
from node.prefixes.index import DiskPrefix, PrefixIndex
from node.prefixes.saved import Array
from node.ring.compute_thread import pause, until_done
from unicluster.errors import UniclusterError
from unicluster.v1.stage_pb2 import ERASE, MISSING, READ, THERE

log = logging.getLogger("unicluster.prefixes")

# To read a prefix may take so long, or as long as to compute it.
READ_SECONDS = 2.0
# Between two questions to a stage, at first and at most.
FIRST_ASK_SECONDS = 0.002
LAST_ASK_SECONDS = 0.05
# Prefixes that others cover and that are still on disk, while these may not be there yet.
MOST_COVERED = 64


class DiskPrefixes:
    """Caches of sequences to and from the disks of a model's stages.

    On the compute thread; `recall` and `settle` wait there as fibers do.
    """

    def __init__(self, model: Any, index: PrefixIndex, prefill_s: float) -> None:
        """prefill_s: seconds that a token of a prompt takes; 0: not known."""
        self._model = model
        self._index = index
        self._prefill_s = prefill_s
        self._ring = json.dumps(getattr(model, "cuts", []))
        # Saved for when no answer runs, and not written everywhere yet.
        self._idle: set[bytes] = set()
        self._covered: deque[DiskPrefix] = deque()
        self._on = bool(getattr(model, "saves", True))
        if not self._on:
            log.warning("prompt caches are not kept on disk: not all machines can do that now")

    def find(self, prompt: Array, more_than: int) -> tuple[DiskPrefix, int] | None:
        """The prefix that saves most of a prompt, and how many tokens; see PrefixIndex."""
        return self._index.find(prompt, self._ring, more_than) if self._on else None

    def has(self, tokens: Array) -> bool:
        """Whether there is nothing to be done to have `tokens` on disk."""
        return not self._on or self._index.name_of(tokens, self._ring) in self._index

    def save(
        self, tokens: Array, cache: Sequence[Any], *, trimmable: bool, idle: bool = False
    ) -> None:
        """Has all stages save the cache of `tokens`, soon: it may be freed at once.

        idle: while no answer runs there.
        """
        name = self._index.name_of(tokens, self._ring)
        if not self._on or (name in self._index and (idle or name not in self._idle)):
            return
        blocks = self._index.blocks_of(tokens, self._ring)
        local = [part for part in cache if not isinstance(part, RemoteCache)]
        handles = [part for part in cache if isinstance(part, RemoteCache)]
        for handle in handles:
            handle.save(name, blocks, idle=idle)
        if local and (idle or not self._index.store.hurry(name.hex())):
            names = [block.hex() for block in blocks]
            self._index.store.put(name.hex(), save(local), names, idle=idle)
        if not idle:
            self._idle.discard(name)
        if name in self._index:
            return
        if idle:
            self._idle.add(name)
        self._covered.extend(self._index.add(tokens, self._ring, trimmable=trimmable, idle=idle))
        while len(self._covered) > MOST_COVERED:
            self._erase_covered([handle.stage for handle in handles])

    def recall(self, prefix: DiskPrefix, tokens: int) -> list[Any] | None:
        """A cache of the first `tokens` of a prefix; None where a stage does not have it whole, or
        has so much of it that it can't be trimmed any more.
        """
        fresh = make_prompt_cache(self._model)
        stages = [part.stage for part in fresh if isinstance(part, RemoteCache)]
        local = [part for part in fresh if not isinstance(part, RemoteCache)]
        try:
            cache = self._recalled(prefix, local, stages)
            if cache is None or tokens >= len(prefix.tokens):
                return cache
            if can_trim_prompt_cache(cache):
                trim_prompt_cache(cache, len(prefix.tokens) - tokens)
                return cache
            self._index.keep_whole(prefix)  # llama.cpp saves windows alone
        except TimeoutError:
            self._on = False
            log.warning("prompt caches on disk are not used any more: the disk is too slow")
        except UniclusterError as error:
            if getattr(self._model, "failure", None) is not None:
                raise
            log.warning("a prompt cache on disk does not fit, and is removed: %s", error)
            self._index.remove(prefix)
            self._erase(prefix, stages)
        return None

    def settle(self, seconds: float) -> bool:
        """Waits until all stages have written what they were to save; whether they have."""
        until = time.monotonic() + seconds
        while not self.settled():
            if time.monotonic() > until:
                return False
            pause(LAST_ASK_SECONDS)
        return True

    def settled(self) -> bool:
        """Whether all stages have written what they were to save. Asks them.

        Then what is of no use beside it is removed: not before, for a machine may be lost.
        """
        stages = [p.stage for p in make_prompt_cache(self._model) if isinstance(p, RemoteCache)]
        if self._index.store.waiting or any(stage.unwritten() for stage in stages):
            return False
        self._idle.clear()
        while self._covered:
            self._erase_covered(stages)
        return True

    def _recalled(
        self, prefix: DiskPrefix, local: list[Any], stages: Sequence[RemoteStage]
    ) -> list[Any] | None:
        until = time.monotonic() + max(READ_SECONDS, self._prefill_s * len(prefix.tokens))
        name = prefix.name
        states = [stage.recall(name, READ) for stage in stages]
        entries = None
        if local:
            reading = self._index.store.read(name.hex())
            until_done(reading, until - time.monotonic())
            entries = reading.result(0)
        between = FIRST_ASK_SECONDS
        there = bool(entries) or not local
        while there and any(state != THERE for state in states):
            if MISSING in states:
                there = False
            elif time.monotonic() > until:
                raise TimeoutError
            else:
                pause(between)
                between = min(2 * between, LAST_ASK_SECONDS)
                states = [stage.recall(name, READ) for stage in stages]
        handles = [stage.recalled(name) for stage in stages] if there else [None]
        if None in handles:
            # One that waits for an idle machine is not lost: it comes later.
            if name not in self._idle:
                self._index.remove(prefix)
                self._erase(prefix, stages)
            return None
        made = revive(local, entries)[0] if entries is not None else []
        return [*made, *handles]

    def _erase_covered(self, stages: Sequence[RemoteStage]) -> None:
        """Erases the first of those covered, unless it was saved again."""
        covered = self._covered.popleft()
        if covered.name not in self._index:
            self._erase(covered, stages)

    def _erase(self, prefix: DiskPrefix, stages: Sequence[RemoteStage]) -> None:
        self._index.store.erase(prefix.name.hex())
        for stage in stages:
            stage.recall_soon(prefix.name, ERASE)
