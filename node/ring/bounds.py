"""Bounds of the integers in a frame, and the error for one that is beyond them."""

from unicluster.errors import StageError

# Tokens of one row. No model has a context as long, and MLX counts tokens in 32 bits.
MOST_TOKENS = 2**24
MOST_ROWS = 4096
# Frames cancelled ahead of their arrival.
MOST_CANCELLED = 4096
MOST_CACHES = 2**16
# Of the saved state of one layer, or of one stage of ggml; protobuf takes no more.
MOST_STATE_BYTES = 2**31 - 1
# Saved states that are on their way to a session in parts, of so many bytes together.
MOST_ARRIVING = 16
# Leaves of one tree of arrays: a stage of many layers whose caches have several arrays each.
MOST_LEAVES = 2**14
MOST_DIMENSIONS = 8
MOST_DEPTH = 16


class FrameError(StageError):
    """A frame asks for something that the caches it is for don't have or can't do.

    The message names the operation, the cache and the bound.
    """
