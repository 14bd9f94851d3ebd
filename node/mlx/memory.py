"""Memory of freed arrays that MLX and the C library below it keep."""

import ctypes

import mlx.core as mx

# Part of the reserve that a plan leaves for MLX's own use.
KEPT_BYTES = 64 * 2**20

# glibc keeps pages in which nothing is left; other C libraries lack the call.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Frees MLX's cache of freed arrays if it is large: a small one makes allocation faster."""
    if mx.get_cache_memory() > KEPT_BYTES:
        mx.clear_cache()


def give_all_back() -> None:
    """Gives all memory of freed arrays to the system; takes some tenths of a millisecond."""
    mx.clear_cache()
    if _trim:
        _trim(ctypes.c_size_t(0))
