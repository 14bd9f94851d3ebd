"""Checks of the requests to an agent, before it acts on them."""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path

from unicluster.checkpoints.names import FileName, ModelName, Revision
from unicluster.cluster.channels import split_address
from unicluster.errors import BusyError, DoesNotFitError, InputError, shown
from unicluster.v1.node_pb2 import InspectRequest, StageSpec, TryHubRequest

MOST_STAGES = 64
MOST_SOURCES = 1024
MOST_LAYERS = 4096
MOST_USERS = 4096
MOST_CONTEXT = 1 << 30
MOST_DEVICES = 64
MOST_DISK_BYTES = 2**50
CONFIG_BYTES = 4 << 20
WORD_CHARACTERS = 256
MOST_TOKEN_SECONDS = 3600.0
# A stage that nobody uses holds its memory for so long at most.
MOST_GRACE_SECONDS = 3600.0
# A child that inspects takes a core for seconds, and some hundred megabytes.
INSPECTED_AT_ONCE = 2
MOST_INSPECTIONS = 16


class Inspections:
    """Places for calls of Inspect: few have a child at a time, some wait, others are refused."""

    def __init__(self, at_once: int = INSPECTED_AT_ONCE, most: int = MOST_INSPECTIONS) -> None:
        self._most = most
        self._open = 0
        self._children = asyncio.Semaphore(at_once)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Raises BusyError where too many are open."""
        if self._open >= self._most:
            raise BusyError(f"{self._most} models are being inspected here: try again later")
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    def child(self) -> AbstractAsyncContextManager[None]:
        """A turn to run a child."""
        return self._children


def check_inspect(request: InspectRequest) -> None:
    """Raises InputError for a request that names no model, or has fields out of bounds."""
    _check_word("quant", request.quant)
    _check_at_most("context", request.context, MOST_CONTEXT)
    _check_at_most("users", request.users, MOST_USERS)
    _check_at_most("config_json", len(request.config_json), CONFIG_BYTES)
    if request.config_json:
        return
    check_model(request.model, request.revision)
    if request.drafts_for:
        check_model(request.drafts_for, request.drafts_for_revision)
    _check_sources(request.sources)


def check_try_hub(request: TryHubRequest) -> None:
    """Raises InputError for a name that is not a repository of the hub."""
    check_model(request.model, request.revision)
    if Path(request.model).is_absolute():
        raise InputError(f"{shown(request.model)}: a directory, and not a repository of the hub")


def check_stage(spec: StageSpec, running: int) -> None:
    """Raises InputError for an invalid stage, DoesNotFitError where too many run here.

    running: stages that this agent runs. Whether there is memory for it is `Ledger.check`.
    """
    check_model(spec.model, spec.revision)
    for field in ("deployment", "quant", "engine", "service", "coordinator"):
        _check_word(field, getattr(spec, field))
    _check_at_most("context", spec.context, MOST_CONTEXT)
    _check_at_most("users", spec.users, MOST_USERS)
    for field in ("decode_s", "prefill_s", "ring_decode_s", "ring_prefill_s"):
        if not 0 <= (seconds := getattr(spec, field)) <= MOST_TOKEN_SECONDS:
            raise InputError(f"{field}: {seconds}, and not seconds that a token takes")
    if not 0 <= spec.orphan_grace_s <= MOST_GRACE_SECONDS:
        raise InputError(
            f"orphan_grace_s: {spec.orphan_grace_s:g}, and at most {MOST_GRACE_SECONDS:g}"
        )
    _check_at_most("lanes", spec.lanes, MOST_USERS)
    _check_at_most("cache_disk", spec.cache_disk, MOST_DISK_BYTES)
    _check_at_most("end_layer", spec.end_layer, MOST_LAYERS)
    if spec.first_layer > spec.end_layer:
        raise InputError(f"layers {spec.first_layer} to {spec.end_layer}: invalid range")
    _check_at_most("devices", len(spec.devices), MOST_DEVICES)
    for share in spec.devices:
        _check_word("devices", share.name)
    _check_sources(spec.sources)
    for name in (*spec.hub_files, *spec.draft.hub_files):
        FileName(name)
    if spec.HasField("draft"):
        check_model(spec.draft.model, spec.draft.revision)
        _check_word("draft.quant", spec.draft.quant)
    if running >= MOST_STAGES:
        raise DoesNotFitError(f"{running} stages run on this machine already, and no more may")


def check_model(model: str, revision: str) -> None:
    """Raises InputError unless they name a model, and for a directory its revision.

    A caller that can't name the contents of a directory of this machine may not use it.
    """
    ModelName(model)
    if revision:
        Revision(revision)
    elif Path(model).is_absolute():
        raise InputError(f"{shown(model)}: a directory on this machine needs its revision")


def _check_sources(sources: Iterable[str]) -> None:
    addresses = list(sources)
    _check_at_most("sources", len(addresses), MOST_SOURCES)
    for address in addresses:
        split_address(f"caller{address}" if address.startswith(":") else address)


def _check_word(field: str, text: str) -> None:
    if len(text) > WORD_CHARACTERS or not text.isprintable():
        raise InputError(f"{field}: invalid: {shown(text)}")


def _check_at_most(field: str, value: int, most: int) -> None:
    if value > most:
        raise InputError(f"{field}: {value}, and at most {most}")
