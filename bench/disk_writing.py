"""Time of a token while prompt caches are written to disk, beside that while nothing is.

python -m bench.disk_writing [--rounds N] [--tokens N]

An engine in this process answers with the demo model, again and again, and each round does so three
times: with nothing to write; with caches that may wait until no answer runs, as those have that are
written while idle; and with caches that can't wait, as those have for which there is no memory,
written without end. Prints medians, and ratios within a round.
"""

import argparse
import asyncio
import statistics
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from node.prefixes.saved import SavedArray, SavedEntry
from node.prefixes.store import PrefixStore
from tests.support.engines import Tiny, listen
from tests.support.prefixes import index_in
from unicluster.v1.chat_pb2 import GenerateRequest

MODEL = Path(__file__).parents[1] / "node" / "demo" / "model"
WAYS = ("nothing to write", "writing that may wait", "writing that can't")
CACHE_BYTES = 64 << 20
LIMIT = 512 << 20
PROMPT = list(range(10, 74))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=150)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder), options.rounds, options.tokens))


async def measure(folder: Path, rounds: int, tokens: int) -> None:
    tiny = await Tiny.load(MODEL)
    index = index_in(folder, limit=LIMIT)
    engine = await tiny.engine(context=1024, kv_bytes=1 << 30, users=1, prefixes=index)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    written: dict[str, int] = dict.fromkeys(WAYS, 0)
    for number in range(rounds + 1):
        for way in WAYS[:: 1 if number % 2 else -1]:  # none is always behind the same one
            request = GenerateRequest(token_ids=PROMPT, max_tokens=tokens, ignore_eos=True)
            with writing(index.store, way) as count:
                answer = await listen(await engine.submit(request))
            assert answer.finish is not None  # bench
            if number:  # the first round warms up
                seconds[way].append(answer.finish.timings.decode_s / (tokens - 1))
                written[way] += count[0]
    engine.close()
    for way in WAYS:
        ratio = statistics.median(
            a / b for a, b in zip(seconds[way], seconds[WAYS[0]], strict=True)
        )
        print(
            f"{way}: {1000 * statistics.median(seconds[way]):.2f} ms per token, "
            f"{ratio:.3f} x, {written[way]} caches of {CACHE_BYTES >> 20} MB begun"
        )


@contextmanager
def writing(store: PrefixStore, way: str) -> Iterator[list[int]]:
    """Always has one cache to write for as long as the block runs; counts them."""
    over, count = threading.Event(), [0]
    values = np.ones((CACHE_BYTES,), np.uint8)
    entry = SavedEntry("KVCache", (("0", SavedArray("uint8", values)),))

    def write() -> None:
        while not over.is_set():
            if way != WAYS[0] and not store.waiting:
                count[0] += 1
                store.put(f"{id(over):016x}{count[0]:016x}", [entry], idle=way == WAYS[1])
            over.wait(0.002)

    thread = threading.Thread(target=write)
    thread.start()  # in each way, for its wake-ups alone change an answer's time
    try:
        yield count
    finally:
        over.set()
        thread.join()
        store.settle(60.0)


if __name__ == "__main__":
    main()
