"""The machines of the cluster as they were last seen, for shells that complete their names.

A shell can't wait for mDNS, so whoever has found machines keeps them in unicluster's folder.
"""

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from unicluster.command_line import Option, beginning, in_list
from unicluster.trust.store import default_folder

log = logging.getLogger(__name__)

FILE = "machines.json"


def remember(machines: Mapping[str, str]) -> None:
    """Keeps the address, host:port, of each machine by its name, in place of those known so far."""
    path = default_folder() / FILE
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".machines-", dir=path.parent)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(dict(sorted(machines.items())), file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        log.info("names of machines won't be completed: can't write %s: %s", path, error)


def known() -> dict[str, str]:
    """The address of each machine last seen, by its name; none where nothing was ever seen."""
    path: Path = default_folder() / FILE
    try:
        stored = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.info("%s: %s", path, error)
        return {}
    if not isinstance(stored, dict):
        log.info("%s: holds no machines", path)
        return {}
    return {str(name): str(address) for name, address in stored.items()}


machine_names = beginning(known)
addresses = beginning(lambda: known().values())


def peer_option(meaning: str) -> Option:
    """`--peer HOST:PORT`, which may be repeated."""
    return Option(
        "--peer",
        f"{meaning}; may be repeated",
        multiple=True,
        metavar="HOST:PORT",
        complete=addresses,
    )


def nodes_option(meaning: str) -> Option:
    """`--nodes A,B`."""
    return Option("--nodes", meaning, metavar="A,B", complete=in_list(machine_names))
