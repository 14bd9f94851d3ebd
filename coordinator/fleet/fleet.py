"""Hypothetical fleets: from `--fleet`, a YAML file, `--link` and `--memory`."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from coordinator.planning import hardware, links
from coordinator.planning.engines import ENGINES
from coordinator.planning.links import Link, Network
from coordinator.planning.machine import Machine
from unicluster.command_line import beginning, in_list
from unicluster.errors import InputError
from unicluster.units import parse_bytes

_COUNTED = re.compile(r"(?:(\d+)\s*x\s*)?(.+)")
_COUNT = re.compile(r"\s*(?:\d+\s*x\s*)?")
_MACHINE_KEYS = {"name", "hardware", "count", "memory", "usable", "bandwidth", "compute", "link"}
_MACHINE_KEYS |= {"engines", *(f"{e}_{key}" for e in ENGINES for key in ("bandwidth", "usable"))}
_LINK_KEYS = {"between", "link", "latency", "bandwidth"}
_SECONDS = re.compile(r"([0-9.]+)\s*(us|µs|ms|s)")
_SECOND_UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Fleet:
    """Machines and what connects them."""

    machines: tuple[Machine, ...]
    network: Network


def parse(text: str) -> Fleet:
    """`"2x mac-studio-m3-ultra-512, framework-desktop-128"`, or the name of a YAML file.

    Raises InputError for an unknown machine, or whatever is wrong with the file.
    """
    if text.strip().endswith((".yaml", ".yml")):
        return _from_file(Path(text.strip()).expanduser())
    machines: list[Machine] = []
    for part in text.split(","):
        match = _COUNTED.fullmatch(part.strip())
        if match is None:
            raise InputError(
                f"--fleet {text!r}: write it like 2x dgx-spark-128, framework-desktop-128"
            )
        machines += [hardware.find(match[2]).machine()] * int(match[1] or 1)
    return Fleet(_numbered(machines), Network())


def fleet_names(text: str) -> Iterable[str]:
    """Completions of `--fleet` for a shell: `2x mac` becomes `2x mac-studio-m3-ultra-512`."""

    def last(part: str) -> Iterable[str]:
        count = _COUNT.match(part)
        before = count[0] if count is not None else ""
        names = beginning(hardware.boxes)(part[len(before) :])
        return [f"{before}{name}" for name in names]

    return in_list(last)(text)


def link_names(text: str) -> Iterable[str]:
    """Completions of `--link`: the kinds of links, also after `A:B=`."""
    pair, equals, kind = text.rpartition("=")
    return [f"{pair}{equals}{name}" for name in beginning(lambda: links.LINKS)(kind)]


def with_links(fleet: Fleet, stated: Sequence[str]) -> Fleet:
    """The fleet with `--link` applied: a kind of link for all, or `ANN:BOB=KIND` for a pair."""
    network = fleet.network
    for text in stated:
        pair, _, kind = text.rpartition("=")
        link = links.find(kind)
        if pair:
            names = _pair(pair.split(":"), fleet.machines)
            network = replace(network, pairs={**network.pairs, names: link})
        else:
            network = replace(network, default=link)
    return replace(fleet, network=network)


def with_memory(fleet: Fleet, stated: Sequence[str]) -> Fleet:
    """The fleet with `--memory` applied: usable bytes of each machine, or `ANN=SIZE` of one."""
    machines = list(fleet.machines)
    for text in stated:
        name, _, size = text.rpartition("=")
        if name and name not in {m.name for m in machines}:
            raise InputError(f"--memory {text}: {_nobody(name, machines)}")
        usable = parse_bytes(size)
        machines = [m if name and m.name != name else m.with_usable(usable) for m in machines]
    return replace(fleet, machines=tuple(machines))


def _from_file(path: Path) -> Fleet:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"--fleet {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--fleet {path}: no YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("machines"), list):
        raise InputError(f"--fleet {path}: it needs a list `machines`")
    if extra := set(content) - {"machines", "links", "link"}:
        raise InputError(f"--fleet {path}: unknown {', '.join(sorted(map(str, extra)))}")
    try:
        described = [m for row in content["machines"] for m in _described(row)]
        machines = _numbered(described)
        pairs = dict(_link(row, machines) for row in content.get("links") or ())
        default = links.find(str(content["link"])) if "link" in content else None
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"--fleet {path}: {type(error).__name__}: {error}") from error
    except InputError as error:
        raise InputError(f"--fleet {path}: {error}") from error
    return Fleet(machines, Network(default, pairs))


def _described(row: dict[str, Any]) -> list[Machine]:
    """A row of a fleet file: a machine of the catalogue, changed or not, or one of its own."""
    if extra := set(row) - _MACHINE_KEYS:
        raise InputError(f"a machine has no {', '.join(sorted(map(str, extra)))}")
    if "hardware" in row:
        machine = hardware.find(str(row["hardware"])).machine(str(row.get("name", "")))
    elif "bandwidth" in row and ("usable" in row or "memory" in row):
        machine = Machine.uniform(str(row.get("name", "machine")), 0, 0.0)
    else:
        raise InputError(f"{row.get('name', row)}: give its hardware, or memory and bandwidth")
    if "memory" in row or "usable" in row:
        machine = machine.with_usable(_size(row.get("usable", row.get("memory"))))
    if "bandwidth" in row:
        machine = _with_bandwidth(machine, ENGINES, row["bandwidth"])
    for engine in ENGINES:
        if (stated := row.get(f"{engine}_bandwidth")) is not None:
            machine = _with_bandwidth(machine, [engine], stated)
        if (stated := row.get(f"{engine}_usable")) is not None:
            machine = machine.with_usable(_size(stated), [engine])
    if "engines" in row:
        machine = machine.only(_engines(row["engines"]))
    if "compute" in row:
        compute = float(row["compute"]) * 1e12
        speeds = {e: replace(s, compute=compute) for e, s in machine.engines.items()}
        machine = machine.with_speeds(speeds)
    if "link" in row:
        machine = replace(machine, link=links.find(str(row["link"])).name)
    return [machine] * int(row.get("count", 1))


def _with_bandwidth(machine: Machine, engines: Iterable[str], stated: Any) -> Machine:
    """The machine with that bandwidth for those of the engines that it has."""
    there, bandwidth = machine.engines, float(_size(stated))
    changed = {e: replace(there[e], bandwidth=bandwidth) for e in engines if e in there}
    return machine.with_speeds(changed)


def _engines(stated: Any) -> tuple[str, ...]:
    engines = tuple(stated) if isinstance(stated, list) else (str(stated),)
    if not engines or set(engines) - set(ENGINES):
        raise InputError(f"engines {stated}: a list of {', '.join(ENGINES)}")
    return engines


def _link(row: dict[str, Any], machines: Sequence[Machine]) -> tuple[frozenset[str], Link]:
    if extra := set(row) - _LINK_KEYS:
        raise InputError(f"a link has no {', '.join(sorted(map(str, extra)))}")
    link = links.find(str(row["link"])) if "link" in row else links.LAN
    if "latency" in row:
        link = replace(link, latency_s=_seconds(str(row["latency"])))
    if "bandwidth" in row:
        link = replace(link, bytes_per_s=float(_size(row["bandwidth"])))
    return _pair(row["between"], machines), link


def _pair(names: Sequence[str], machines: Sequence[Machine]) -> frozenset[str]:
    for name in names:
        if name not in {m.name for m in machines}:
            raise InputError(f"a link of {':'.join(names)}: {_nobody(name, machines)}")
    if len(set(names)) != 2:
        raise InputError(f"a link is between two machines, not {':'.join(names)}")
    return frozenset(names)


def _numbered(machines: Sequence[Machine]) -> tuple[Machine, ...]:
    """Names made different: the second of two called ann is ann-2."""
    total, seen = Counter(m.name for m in machines), Counter[str]()
    numbered = []
    for machine in machines:
        seen[machine.name] += 1
        alone = total[machine.name] == 1
        name = machine.name if alone else f"{machine.name}-{seen[machine.name]}"
        numbered.append(replace(machine, name=name))
    if not numbered or len({m.name for m in numbered}) < len(numbered):
        raise InputError("a fleet needs at least one machine, and a name for each")
    return tuple(numbered)


def _size(value: Any) -> int:
    """Bytes, or bytes per second: 96GB, 256 GB/s, or a plain number of GB."""
    if isinstance(value, int | float):
        return int(value * 1e9)
    return parse_bytes(str(value).removesuffix("/s"))


def _seconds(text: str) -> float:
    match = _SECONDS.fullmatch(text.strip())
    if match is None:
        raise InputError(f"latency {text!r}: write it like 0.3ms or 50us")
    return float(match[1]) * _SECOND_UNITS[match[2]]


def _nobody(name: str, machines: Sequence[Machine]) -> str:
    return f"no machine {name!r} in the fleet: it has {', '.join(m.name for m in machines)}"
