"""Environment of a worker: without secrets, and with settings that libraries read as they start."""

import logging
from collections.abc import Mapping

from unicluster.access.token_input import CLIENT_VARIABLE, JOIN_VARIABLE
from unicluster.program import child_environment
from unicluster.telemetry.broker_url import VARIABLE as MQTT_VARIABLE

log = logging.getLogger("unicluster.worker")

# Variables that hold secrets of the agent's or of commands.
SECRETS = frozenset({JOIN_VARIABLE, CLIENT_VARIABLE, MQTT_VARIABLE})

# Threads of llama.cpp wait for one another some hundred times a token, spinning for milliseconds:
# where anything else runs, a token takes ten times as long. So they sleep after some microseconds,
# about what it costs to be woken. The first is GNU's OpenMP, the second any other.
SHORT_SPINS = {"GOMP_SPINCOUNT": "300", "OMP_WAIT_POLICY": "passive"}

# llama.cpp that fails a check of its own says which, and then has a debugger print pages.
SHORT_WORDS = {"GGML_NO_BACKTRACE": "1"}

# All weights are read for each token: out of pages of 4 kB that takes up to a quarter longer, in a
# virtual machine above all, and how much longer changes with each start. With this glibc asks the
# kernel for large pages for allocations of 2 MB and more; others ignore it.
TUNABLES = "GLIBC_TUNABLES"
LARGE_PAGES = "glibc.malloc.hugetlb"


def worker_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Variables of a worker: this process's and `extra`, which take precedence over settings here.

    gRPC prints refused clients only for debugging.
    """
    ours = {name: value for name, value in child_environment(extra).items() if name not in SECRETS}
    quiet = {} if log.isEnabledFor(logging.DEBUG) else {"GRPC_VERBOSITY": "NONE"}
    return {
        **quiet,
        **SHORT_SPINS,
        **SHORT_WORDS,
        **ours,
        TUNABLES: _tunables(ours.get(TUNABLES, "")),
    }


def _tunables(stated: str) -> str:
    """glibc's tunables, with large pages unless they say something else about those."""
    parts = [part for part in stated.split(":") if part]
    if not any(part.partition("=")[0] == LARGE_PAGES for part in parts):
        parts.append(f"{LARGE_PAGES}=1")
    return ":".join(parts)
