"""Looks at machines for a plan that is better than the one that stands. Pure functions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from coordinator.planning.links import Network
from coordinator.planning.machine import Machine
from coordinator.planning.placement import Plan, Stage
from coordinator.planning.variants import ModelVariants
from coordinator.recovery.keeping import WORSE, keeping, seconds, standing

# Of a token's time that a better plan must save, unless another part is asked for.
MARGIN = 0.1
# The least growth of usable memory for which a machine counts as one that has come.
GROWTH = 1.1


@dataclass(frozen=True)
class Survey:
    """The plan that stands, and the best that could stand instead, at the speeds of now."""

    standing: Plan
    better: Plan

    @property
    def gain(self) -> float:
        """The part of the seconds that the objective counts which the better plan saves."""
        before = seconds(self.standing)
        return max(0.0, 1 - seconds(self.better) / before) if before > 0 else 0.0


def survey(
    best: Plan,
    served: Sequence[Stage],
    variants: ModelVariants,
    machines: Sequence[Machine],
    network: Network,
    margin: float = MARGIN,
) -> Survey | None:
    """The better plan is `best`, or one nearly so by which less moves: by half the margin.

    None where the plan that stands has lost a machine: then it does not stand.
    """
    now = standing(best, served, variants, machines, network)
    if now is None:
        return None
    worse = min(WORSE, margin) / 2
    return Survey(now, keeping(best, served, variants, machines, network, worse))


def offers(machines: Iterable[Machine]) -> dict[str, int]:
    """Usable bytes by machine."""
    return {machine.name: machine.usable for machine in machines}


def has_grown(known: Mapping[str, int], machines: Iterable[Machine]) -> bool:
    """Whether a machine has come since the `offers` that a plan was made over, or offers more.

    Without that, figures that are measured anew would move layers between equal machines.
    """
    return any(m.usable > GROWTH * known.get(m.name, 0) for m in machines)
