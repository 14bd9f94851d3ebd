"""Byte ranges [start, end) of a file. A `Ranges` is ascending, without overlap or touching."""

from collections.abc import Iterable, Iterator

Range = tuple[int, int]
Ranges = tuple[Range, ...]


def merged(ranges: Iterable[Range]) -> Ranges:
    """Union of ranges, as Ranges."""
    result: list[Range] = []
    for start, end in sorted(ranges):
        if start >= end:
            continue
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return tuple(result)


def without(ranges: Ranges, removed: Ranges) -> Ranges:
    """The bytes of `ranges` that are not in `removed`."""
    left: list[Range] = []
    for start, end in ranges:
        for gone_start, gone_end in removed:
            if gone_end <= start or gone_start >= end:
                continue
            left.append((start, gone_start))
            start = gone_end
        left.append((start, end))
    return merged(left)


def size(ranges: Iterable[Range]) -> int:
    """Number of bytes in ranges."""
    return sum(end - start for start, end in ranges)


def batches(ranges: Ranges, limit: int) -> Iterator[Ranges]:
    """Splits ranges into pieces of at most `limit` bytes each, in order."""
    batch: list[Range] = []
    room = limit
    for start, end in ranges:
        while start < end:
            stop = min(end, start + room)
            batch.append((start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield tuple(batch)
                batch, room = [], limit
    if batch:
        yield tuple(batch)


def within(ranges: Ranges, first: int, last: int) -> Ranges:
    """Subranges with bytes `first` to `last` (exclusive) of the concatenated `ranges`."""
    result: list[Range] = []
    before = 0
    for start, end in ranges:
        low, high = max(first - before, 0), min(last - before, end - start)
        if low < high:
            result.append((start + low, start + high))
        before += end - start
    return tuple(result)
