"""A service whose coordinator may be lost: claimed, noted as wanted, and taken up by the next."""

import asyncio
import base64
import contextlib
import json
import logging
from collections.abc import AsyncIterator

from coordinator.fleet.members import Members
from coordinator.models.offer import Offered
from coordinator.planning.placement import Plan
from coordinator.serving.inspected import Inspected
from coordinator.serving.options import ServeOptions
from coordinator.state.claim import Claim, already_served, claimed
from coordinator.state.cut import Cut
from coordinator.state.database import Database
from coordinator.state.drains import Drains
from coordinator.state.services import Services, Wanted
from unicluster.errors import UnavailableError, UniclusterError
from unicluster.trust.identity import default_name

log = logging.getLogger(__name__)

# Until machines have noticed that a coordinator is gone without a word, and some.
HELD_SECONDS = 8.0
LOOK_SECONDS = 0.5


@contextlib.asynccontextmanager
async def lasting(options: ServeOptions) -> "AsyncIterator[Lasting | None]":
    """The service of `serve`, wanted from here on; no more when the block is left.

    None for a service without a name, which nobody takes up. Raises InputError where another
    process here serves it, and for a state file that can't be used; UnavailableError for one whose
    disk is full.
    """
    if not options.service:
        yield None
        return
    async with claimed(options.service, default_name()) as claim:
        with contextlib.closing(Database()) as database:
            services = Services(database)
            wanted = services.begin(options.service, fingerprint(options))
            record = Lasting(services, Drains(database), wanted, claim)
            try:
                yield record
            finally:
                if not record.comes_back:
                    _end(services, options.service)


def _end(services: Services, service: str) -> None:
    """Wanted no more. Where that can't be kept, the next start looks for stages that are gone."""
    try:
        services.end(service)
    except UniclusterError as error:
        log.warning("%s still counts as wanted: %s", service, error)


class Lasting:
    """A service's record: as an earlier process left it, and as this one leaves it.

    comes_back: it stays wanted when this process ends, and the next one takes up its stages.
    """

    def __init__(self, services: Services, drains: Drains, wanted: Wanted, claim: Claim) -> None:
        self.comes_back = False
        self._services = services
        self.drains = drains
        self._wanted = wanted
        self.claim = claim

    @property
    def last(self) -> Cut | None:
        """Where the layers were when the service was served before."""
        return self._wanted.last

    async def resume(self, members: Members, offered: Offered) -> tuple[Inspected, Cut] | None:
        """The sizes and the cut of stages that a lost coordinator has left, and all still stand.

        None where the service is to be begun from nothing.
        """
        wanted = self._wanted
        if wanted.cut is None or wanted.inspected is None:
            return None
        try:
            inspected = Inspected.from_json(wanted.inspected)
        except ValueError as error:
            log.warning("state file: sizes of %s: %s", wanted.name, error)
            return None
        known = {layout.revision for layout in inspected.by_engine.values()}
        if inspected.draft is not None:
            known.add(inspected.draft.revision)
        if not set(offered.revisions.values()) <= known:
            log.info("%s has changed since it was loaded", wanted.name)
            return None
        members.expect(address for known in wanted.cut.addresses.values() for address in known)
        with contextlib.suppress(UnavailableError):
            await members.machines()
        standing = {(o.machine.name, o.spec.first_layer, o.spec.end_layer) for o in members.orphans}
        stages = wanted.cut.plan.stages
        if not standing >= {(s.machine.name, s.first, s.end) for s in stages}:
            return None
        return inspected, wanted.cut

    def keep(self, inspected: Inspected, plan: Plan) -> None:
        """Keeps how the service is carried out. A full disk is no reason to end it."""
        try:
            self._services.keep(self._wanted.name, inspected.to_json(), Cut.of(plan))
        except UniclusterError as error:
            log.warning("a restart will load everything again: %s", error)

    async def until_free(self, members: Members) -> None:
        """Returns when no other coordinator of the cluster holds stages of the service.

        Raises InputError where one still does after HELD_SECONDS, which names it.
        """
        clock = asyncio.get_running_loop().time
        until = clock() + HELD_SECONDS
        while members.holders:
            if clock() > until:
                raise already_served(self._wanted.name, members.holders[0])
            await asyncio.sleep(LOOK_SECONDS)
            await members.machines()


def fingerprint(options: ServeOptions) -> str:
    """Model and options as JSON; equal where the stages of one can be the other's."""
    gguf = options.gguf
    return json.dumps(
        {
            "model": options.source.model,
            "quant": options.source.quant,
            "gguf": [gguf.model, gguf.quant] if gguf is not None else None,
            "context": options.context,
            "users": options.users,
            "objective": options.objective,
            "nodes": options.nodes,
            "engine": base64.b64encode(
                options.generation.SerializeToString(deterministic=True)
            ).decode(),
        }
    )
