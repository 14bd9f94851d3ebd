"""Measurements on this cluster, and the calibrated machines and links that plans use.

One JSON file in unicluster's folder: for each machine and model the seconds its stage took for a
token, and for each pair of machines the seconds of a hop. `serve` writes it, `plan` reads it.
"""

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from filelock import FileLock

from coordinator.fleet.fleet import Fleet
from coordinator.planning.engines import DEFAULT
from coordinator.planning.hardware import known_compute
from coordinator.planning.links import Link, Network
from coordinator.planning.machine import EngineSpeeds, Machine
from coordinator.planning.placement import Layout, Stage, decode_seconds
from coordinator.planning.variants import ModelVariants
from unicluster.trust.store import default_folder

log = logging.getLogger(__name__)

FILE = "measured.json"
# Another process that writes it takes milliseconds.
LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Measurement:
    """Seconds that a machine took for one token through layers [first, end) of a model.

    has_lm_head: through the lm_head too, which comes after the last layer.
    """

    first: int
    end: int
    seconds_per_token: float
    has_lm_head: bool = False

    @property
    def seconds_per_layer(self) -> float:
        return self.seconds_per_token / (self.end - self.first)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Measurement":
        return cls(row["first"], row["end"], row["seconds_per_token"], row.get("finishes", False))

    def as_json(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "end": self.end,
            "seconds_per_token": self.seconds_per_token,
            "finishes": self.has_lm_head,
        }


@dataclass(frozen=True)
class TokenTimes:
    """Seconds that a token of one user took on each stage of a ring, and on each hop.

    hops[i] leads from stage i to the next, or from the last back to the head; None where hops
    were not timed, so that earlier measurements of them stay.
    """

    stages: tuple[float, ...]
    hops: tuple[float, ...] | None = None


def token_times(
    predicted: Sequence[Stage], stages: Sequence[float], hops: Sequence[float], seconds: float
) -> TokenTimes:
    """Splits the seconds of a token by stage and hop, by their own reports.

    Numbers are in the order of the ring; 0 is unknown. Unless all are known the time is split
    in the predicted proportions.
    """
    if len(predicted) == 1:
        return TokenTimes((seconds,))
    known = len(stages) == len(predicted) == len(hops) and all(stages) and all(hops)
    return _added_up(stages, hops, seconds) if known else shared_out(predicted, seconds)


def _added_up(stages: Sequence[float], hops: Sequence[float], seconds: float) -> TokenTimes:
    """Scales times of stages and hops to add up to the whole token.

    Time that nobody reports is the head's: sampling, text, and the gaps between steps. Where
    reports exceed the whole, several tokens were in flight at once, and shared it.
    """
    rest = seconds - sum(stages) - sum(hops)
    if rest >= 0:
        return TokenTimes((stages[0] + rest, *stages[1:]), tuple(hops))
    share = seconds / (seconds - rest)
    return TokenTimes(tuple(s * share for s in stages), tuple(h * share for h in hops))


def shared_out(predicted: Sequence[Stage], seconds: float) -> TokenTimes:
    """Splits the seconds of a token over stages in the predicted proportions.

    For where only the whole token was timed. Hops keep their known times, up to half of the whole.
    """
    hops = [stage.hop_s for stage in predicted]
    known = min(sum(hops), seconds / 2)
    computing = sum(stage.seconds_per_token for stage in predicted)
    stages = tuple((seconds - known) * s.seconds_per_token / computing for s in predicted)
    if known == sum(hops):
        return TokenTimes(stages)
    return TokenTimes(stages, tuple(hop / sum(hops) * known for hop in hops))


class Measurements:
    """Measurements by machine and model, and hops by pairs of machines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stages: dict[str, dict[str, Measurement]] = {}
        self.hops: dict[str, float] = {}

    @classmethod
    def load(cls, folder: Path | None = None) -> "Measurements":
        """Stored measurements; none if the file is missing, or damaged, which is logged."""
        path = (folder or default_folder()) / FILE
        stored = cls(path)
        try:
            content = json.loads(path.read_text("utf-8"))
            for machine, models in content["stages"].items():
                stored.stages[machine] = {
                    m: Measurement.from_json(row) for m, row in models.items()
                }
            stored.hops = {pair: float(seconds) for pair, seconds in content["hops"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is damaged, so nothing in it counts: %s", path, error)
            return cls(path)
        return stored

    @classmethod
    def record(
        cls, model: str, stages: Sequence[Stage], times: TokenTimes, folder: Path | None = None
    ) -> "Measurements":
        """Stores the times of `stages` of a model, in place of earlier ones.

        Returns all measurements. Raises OSError when it can't be written, or another process keeps
        the file locked.
        """
        path = (folder or default_folder()) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several models may be served from here.
        with FileLock(path.with_suffix(".lock"), timeout=LOCK_SECONDS):
            known = cls.load(folder)
            for stage, seconds in zip(stages, times.stages, strict=True):
                row = Measurement(stage.first, stage.end, seconds, stage.has_lm_head)
                known.stages.setdefault(stage.machine.name, {})[_key(model, stage.engine)] = row
            if times.hops is not None and len(stages) > 1:
                names = [stage.machine.name for stage in stages]
                pairs = map(_pair, names, [*names[1:], names[0]])
                both_ways: dict[str, list[float]] = {}
                for pair, seconds in zip(pairs, times.hops, strict=True):
                    both_ways.setdefault(pair, []).append(seconds)
                known.hops |= {pair: fmean(times) for pair, times in both_ways.items()}
            known._save()
        return known

    def fleet(
        self, machines: Sequence[Machine], model: str, layout: Layout | ModelVariants
    ) -> Fleet:
        """The machines that are there, at the speeds known of them for this model."""
        known = [_with_compute(machine) for machine in machines]
        calibrated = self.calibrated(known, model, layout)
        return Fleet(tuple(calibrated), Network(pairs=self.links(calibrated)))

    def calibrated(
        self, machines: Sequence[Machine], model: str, layout: Layout | ModelVariants
    ) -> list[Machine]:
        """The machines, those that were measured with this model with their measured slowdown.

        The others are taken to be off by as much as these: a machine must not look faster for
        not having been tried, nor an engine.
        """
        variants = layout if isinstance(layout, ModelVariants) else ModelVariants(layout)
        known = {
            variant.engine: {
                m.name: s for m in machines if (s := self._slowdown(m, model, variant))
            }
            for variant in variants.layouts
        }
        every = [slowdown for of_engine in known.values() for slowdown in of_engine.values()]
        for engine, slowdowns in known.items():
            usual = median(slowdowns.values() or every or [1.0])
            machines = [
                _calibrated(m, engine, slowdowns.get(m.name, usual), m.name in slowdowns)
                for m in machines
            ]
        return list(machines)

    def links(self, machines: Sequence[Machine]) -> dict[frozenset[str], Link]:
        """Measured links between these machines, by pairs of names."""
        names = [m.name for m in machines]
        return {
            frozenset((one, other)): Link("measured", seconds, float("inf"), measured=True)
            for i, one in enumerate(names)
            for other in names[i + 1 :]
            if (seconds := self.hops.get(_pair(one, other))) is not None
        }

    def _slowdown(self, machine: Machine, model: str, layout: Layout) -> float | None:
        """Slowdown of a machine: measured over predicted seconds, for the measured layers."""
        measured = self.stages.get(machine.name, {}).get(_key(model, layout.engine))
        if measured is None or not machine.can(layout.engine):
            return None
        if not 0 <= measured.first < measured.end <= layout.layers:
            return None
        variant = layout.with_lm_head() if measured.has_lm_head else layout.without_lm_head()
        layers = slice(measured.first, measured.end)
        read, resident = sum(variant.read_bytes[layers]), sum(variant.resident_bytes[layers])
        if measured.first == 0:
            read, resident = read + layout.head_read_bytes, resident + layout.head_bytes
        nominal = _calibrated(machine, layout.engine, 1.0, measured=False)
        count = measured.end - measured.first
        predicted = decode_seconds(layout, nominal, read, count, resident)
        return measured.seconds_per_token / predicted

    def _save(self) -> None:
        content: dict[str, Any] = {
            "stages": {
                machine: {model: row.as_json() for model, row in models.items()}
                for machine, models in self.stages.items()
            },
            "hops": self.hops,
        }
        # Readers see the old file or the new one, never half of either.
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=FILE)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        Path(temporary).replace(self.path)


def _with_compute(machine: Machine) -> Machine:
    """The machine with its GPU's compute from the catalogue, for engines that run on the GPU."""
    known = known_compute(machine.chip)
    return machine.with_speeds(
        {
            engine: _speeds_with_compute(speeds, known)
            for engine, speeds in machine.engines.items()
            if speeds.backend != "cpu"
        }
    )


def _speeds_with_compute(speeds: EngineSpeeds, of_chip: float) -> EngineSpeeds:
    """Speeds with the compute of each device, or `of_chip` where it is the machine's own GPU."""
    alone = len(speeds.devices) < 2
    devices = tuple(
        replace(d, compute=d.compute or known_compute(d.chip) or (of_chip if alone else 0.0))
        for d in speeds.devices
    )
    first = devices[0].compute if devices else of_chip
    return replace(speeds, compute=speeds.compute or first, devices=devices)


def _calibrated(machine: Machine, engine: str, slowdown: float, measured: bool) -> Machine:
    """The machine with a slowdown of one engine, if it has that."""
    if not machine.can(engine):
        return machine
    speeds = replace(machine.engines[engine], slowdown=slowdown, measured=measured)
    return machine.with_speeds({engine: speeds})


def _key(model: str, engine: str) -> str:
    """Key of a model's measurement by one engine."""
    return model if engine == DEFAULT else f"{model} ({engine})"


def _pair(one: str, other: str) -> str:
    return " ".join(sorted((one, other)))
