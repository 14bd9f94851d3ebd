"""Plans of one service over the machines that there are, and the files that each needs."""

import asyncio
from collections.abc import Mapping, Sequence

from coordinator.fleet.fleet import Fleet
from coordinator.fleet.measured import Measurements
from coordinator.models.catalog import Source
from coordinator.planning.machine import Machine
from coordinator.planning.placement import Objective, Plan, Stage
from coordinator.planning.planner import plan
from coordinator.planning.shortfall import scaled
from coordinator.recovery.keeping import WORSE, keeping
from coordinator.recovery.survey import MARGIN, Survey, survey
from coordinator.serving.deployment import Files
from coordinator.serving.inspected import Inspected
from coordinator.serving.sourcing import hub_files
from coordinator.state.cut import Cut
from unicluster.trust.identity import Credentials
from unicluster.v1.node_pb2 import Draft, StageSpec


class Plans:
    """Plans of a model, by which as little moves as may be.

    served: stages that stand, or stood last: their machines have them in memory or on disk.
    Empty before the first.
    """

    def __init__(
        self,
        source: Source,
        gguf: Source | None,
        inspected: Inspected,
        objective: Objective,
        identity: Credentials,
        own_sources: list[str],
        generation: StageSpec,
        last: Plan | None = None,
    ) -> None:
        """own_sources: where this process itself offers the files. last: that was carried out."""
        self._standing = last
        self._source = source
        self._variants = inspected.variants_for(generation)
        self._inspected = inspected
        self._objective: Objective = objective
        self._identity = identity
        self._own_sources = own_sources
        self._generation = generation
        self._models: Mapping[str, Source] = {
            engine: model
            for engine, model in zip(inspected.by_engine, (source, gguf), strict=False)
            if model is not None
        }
        self._resume: Cut | None = None

    @property
    def served(self) -> tuple[Stage, ...]:
        return self._standing.stages if self._standing is not None else ()

    def stands(self, plan: Plan) -> None:
        """Notes the plan by which the model answers."""
        self._standing = plan

    def go_back(self) -> None:
        """Has the next plan be the one that stood, where its machines are there."""
        self._resume = Cut.of(self._standing) if self._standing is not None else None

    def resume(self, cut: Cut | None) -> None:
        """Has the next plan be this one, where its machines are there."""
        self._resume = cut

    async def next(self, machines: Sequence[Machine], names: Sequence[str] | None) -> Plan:
        """The plan to carry out over these machines; `names`: of those that may be used, or all.

        The best one, or one nearly as good by which less moves. Raises as `plan` does.
        """
        resume, self._resume = self._resume, None
        resumed = resume.on(machines) if resume is not None else None
        if resumed is not None:
            return resumed
        fleet, best = await self._best(machines, names)
        if not self.served:
            return best
        allowed = [m for m in fleet.machines if names is None or m.name in names]
        return keeping(best, self.served, self._variants, allowed, fleet.network, WORSE)

    async def survey(
        self,
        machines: Sequence[Machine],
        names: Sequence[str] | None,
        margin: float = MARGIN,
    ) -> Survey | None:
        """The plan that stands beside a better one; None where it has lost a machine."""
        fleet, best = await self._best(machines, names)
        allowed = [m for m in fleet.machines if names is None or m.name in names]
        return survey(best, self.served, self._variants, allowed, fleet.network, margin)

    async def _best(
        self, machines: Sequence[Machine], names: Sequence[str] | None
    ) -> tuple[Fleet, Plan]:
        model = self._source.display
        fleet = Measurements.load().fleet(machines, model, self._variants)
        # A search over many machines takes a second; answers go on meanwhile.
        best = await asyncio.to_thread(
            plan,
            self._variants,
            fleet.machines,
            self._objective,
            model=model,
            nodes=names,
            network=fleet.network,
            alternatives=scaled(quants=self._source.quants or not self._variants.layout.quantized),
        )
        return fleet, best

    async def files(self, placed: Plan, addresses: list[str]) -> Files:
        """Sources of the files of each stage. addresses: agents that may have some already."""
        inspected, draft = self._inspected.by_engine, self._inspected.draft
        revisions = {engine: layout.revision for engine, layout in inspected.items()}
        agents = [stage.machine.address for stage in placed.stages]
        from_hub: list[list[str]] = [[] for _ in placed.stages]
        for engine in placed.engines:
            indices = [i for i, stage in enumerate(placed.stages) if stage.engine == engine]
            assigned = await hub_files(
                self._models[engine].model,
                revisions[engine],
                inspected[engine].files,
                [(placed.stages[i].first, placed.stages[i].end) for i in indices],
                [agents[i] for i in indices],
                addresses,
                self._identity,
                has_lm_head=placed.stages[indices[-1]].has_lm_head,
            )
            for index, files in zip(indices, assigned, strict=True):
                from_hub[index] = files
        sources = [*self._own_sources, *addresses]
        if draft is None:
            return Files(self._models, revisions, sources, from_hub)
        source = self._generation.draft
        (of_draft,) = await hub_files(
            source.model,
            draft.revision,
            draft.files,
            [(0, len(draft.layer_bytes))],
            agents[:1],
            addresses,
            self._identity,
        )
        drafting = Draft(
            model=source.model, quant=source.quant, revision=draft.revision, hub_files=of_draft
        )
        return Files(self._models, revisions, sources, from_hub, drafting)
