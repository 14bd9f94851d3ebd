"""A plan as it is kept in the state file: which layers each machine holds, as JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from coordinator.planning.devices import Share
from coordinator.planning.machine import Machine
from coordinator.planning.placement import Objective, Plan, Stage

_NUMBER = (int, float)
# Of Stage, but for its machine and its shares.
_STAGE_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("first", "end", "weight_bytes", "kv_bytes", "reserve_bytes"), (int,)),
    **dict.fromkeys(("seconds_per_token", "batch_seconds", "hop_s"), _NUMBER),
    **dict.fromkeys(("head", "hop_measured", "has_lm_head"), (bool,)),
    "chunk_seconds": (*_NUMBER, type(None)),
    "engine": (str,),
}


@dataclass(frozen=True)
class Cut:
    """Stages in the order of their layers, on machines that may or may not be there.

    addresses: of each machine, where it was.
    """

    plan: Plan
    addresses: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, plan: Plan) -> "Cut":
        """The cut of a plan that is carried out."""
        return cls(plan, {s.machine.name: tuple(s.machine.addresses) for s in plan.stages})

    def on(self, machines: Sequence[Machine]) -> Plan | None:
        """The plan on machines as they are now; None where one is missing, or lacks the engine."""
        named = {machine.name: machine for machine in machines}
        stages = []
        for stage in self.plan.stages:
            machine = named.get(stage.machine.name)
            if machine is None or not machine.can(stage.engine):
                return None
            stages.append(replace(stage, machine=machine))
        used = {stage.machine.name for stage in stages}
        reasons = {machine.name: reason for machine, reason in self.plan.left_out}
        stay = "the layers are where they were"
        left_out = tuple((m, reasons.get(m.name, stay)) for m in machines)
        return replace(
            self.plan,
            stages=tuple(stages),
            left_out=tuple(pair for pair in left_out if pair[0].name not in used),
        )

    def to_json(self) -> str:
        plan = self.plan
        return json.dumps(
            {
                "objective": plan.objective,
                "users": plan.users,
                "chunk_tokens": plan.chunk_tokens,
                "gap": plan.gap,
                "stages": [_as_json(stage, self.addresses) for stage in plan.stages],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "Cut":
        """Undoes `to_json`. Raises ValueError for anything else."""
        try:
            values = json.loads(text)
            rows = values.pop("stages")
            stages = tuple(_stage(row) for row in rows)
            addresses = {row["machine"]: tuple(row["addresses"]) for row in rows}
            plan = Plan(stages=stages, left_out=(), **values)
            _check(plan)
            return cls(plan, addresses)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no cut: {type(error).__name__}: {error}") from error


def _as_json(stage: Stage, addresses: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(stage, name) for name in _STAGE_FIELDS}
    name = stage.machine.name
    shares = [[share.device, share.layers, share.bytes] for share in stage.shares]
    return row | {"machine": name, "addresses": addresses[name], "shares": shares}


def _stage(row: dict[str, Any]) -> Stage:
    for name, kinds in _STAGE_FIELDS.items():
        if not isinstance(row[name], kinds):
            raise ValueError(f"no cut: {name} of a stage is {row[name]!r}")
    machine = Machine(str(row["machine"]), "", 0, {})
    shares = tuple(Share(str(device), int(n), int(size)) for device, n, size in row["shares"])
    return Stage(machine=machine, shares=shares, **{name: row[name] for name in _STAGE_FIELDS})


def _check(plan: Plan) -> None:
    """Raises ValueError unless the stages follow one another, each with some layers."""
    ends = [0, *(stage.end for stage in plan.stages)]
    firsts = [stage.first for stage in plan.stages]
    if not plan.stages or firsts != ends[:-1] or any(s.end <= s.first for s in plan.stages):
        raise ValueError("no cut: the ranges of its stages don't follow one another")
    if plan.objective not in get_args(Objective) or plan.users < 1:
        raise ValueError("no cut: its objective or users are none")
