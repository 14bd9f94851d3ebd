"""Memory goes back to the system."""

import ctypes

import mlx.core as mx
import psutil
import pytest

from node.mlx.memory import give_all_back

ARRAYS = 2000
BYTES = 32 * 2**10  # less than glibc takes from the system one by one


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc has the call")
def test_what_lies_between_arrays_still_in_use_goes_back_too() -> None:
    arrays = [mx.full((BYTES // 4,), number) for number in range(ARRAYS)]
    mx.eval(arrays)
    process = psutil.Process()
    full = process.memory_info().rss
    in_use = arrays[::10]
    del arrays
    give_all_back()
    assert full - process.memory_info().rss > ARRAYS * BYTES / 2
    assert [array[0].item() for array in in_use] == list(range(0, ARRAYS, 10))
