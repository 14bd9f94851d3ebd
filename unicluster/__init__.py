"""unicluster: one language model over the unified-memory machines you own."""

import os
from typing import TYPE_CHECKING, Any

# Agents and `load` start child processes; gRPC's fork handlers would only complain.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

if TYPE_CHECKING:
    from unicluster.api import load
    from unicluster.client.client import AsyncClient, Client

__version__ = "0.1.0"

# Raised when machines of the version before would misunderstand something.
PROTOCOL = 2
# The oldest protocol that this version still works with.
OLDEST_PROTOCOL = 2

__all__ = ["OLDEST_PROTOCOL", "PROTOCOL", "AsyncClient", "Client", "__version__", "load"]

_HOMES = {"load": "api", "Client": "client.client", "AsyncClient": "client.client"}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: the command starts fast, MLX stays out."""
    if name not in _HOMES:
        raise AttributeError(f"module 'unicluster' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"unicluster.{_HOMES[name]}"), name)
