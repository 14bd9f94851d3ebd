"""Speed of a deployment, measured from outside: rounds of measures, and their table.

Prompts have exact lengths, no end token ends an answer, and nothing computed before is used but
where that is measured. Subjects to compare with, each an `Ask`, take turns within each round.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median, quantiles
from typing import Any

from rich.table import Table

from unicluster.benchmark import measure
from unicluster.benchmark.measure import Ask
from unicluster.client.answers import ChatInfo
from unicluster.client.client import AsyncClient
from unicluster.errors import InputError
from unicluster.units import counted

MEASURES = ("decode", "users", "prefill", "turns", "gap", "hops")
FRAMES = 20


@dataclass(frozen=True)
class Sizes:
    """Tokens of prompts and answers, and how many users."""

    decode: int = 64
    prefill: int = 512
    history: int = 2048
    long: int = 4096
    users: tuple[int, ...] = (2, 4)

    def fitted(self, context: int, users: int) -> "Sizes":
        """The sizes a deployment allows. Raises InputError if they are too small to measure."""
        room = context - measure.SHORT - self.decode
        if room < measure.SHORT:
            raise InputError(
                f"the model is served with a context of {context}: "
                f"measuring needs {2 * measure.SHORT + self.decode}"
            )
        return replace(
            self,
            prefill=min(self.prefill, room),
            history=min(self.history, room),
            long=min(self.long, room),
            users=tuple(count for count in self.users if 1 < count <= users),
        )


@dataclass
class Figure:
    """A value of each round."""

    name: str
    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.values)


class Bench:
    """Rounds of measures of what `client` reaches, and figures by name.

    `others` are decoded and prefilled with besides, by name; the first is what hops are
    compared with.
    """

    def __init__(
        self,
        client: AsyncClient,
        info: ChatInfo,
        sizes: Sizes,
        others: Mapping[str, Ask] | None = None,
    ) -> None:
        self.figures: dict[str, Figure] = {}
        self.rounds = 0
        self.info = info
        self.sizes = sizes.fitted(info.context, info.users)
        self._client = client
        self._ask = of_client(client)
        self._others = dict(others or {})
        self._measures: dict[str, Callable[[], Awaitable[None]]] = {
            "decode": self._decode,
            "users": self._users,
            "prefill": self._prefill,
            "turns": self._turns,
            "gap": self._gap,
            "hops": self._hops,
        }

    async def warm_up(self) -> None:
        """The first answer of everything is slower than all after it."""
        for ask in (self._ask, *self._others.values()):
            await measure.timed(ask, measure.new_prompt(measure.SHORT), measure.UNDER_WAY)

    async def measure(self, names: Sequence[str] = MEASURES) -> None:
        """One round."""
        for name in names:
            await self._measures[name]()
        self.rounds += 1

    def as_json(self) -> dict[str, Any]:
        """Everything, in seconds and tokens."""
        return {
            "model": self.info.model,
            "quant": self.info.quant,
            "stages": [
                {"node": s.node, "first_layer": s.first_layer, "end_layer": s.end_layer}
                for s in self.info.stages
            ],
            "lanes": self.info.lanes,
            "sizes": vars(self.sizes),
            "rounds": self.rounds,
            "figures": [
                {"name": f.name, "unit": f.unit, "median": f.median, "values": f.values}
                for f in self.figures.values()
            ],
        }

    def _note(self, name: str, unit: str, value: float) -> None:
        self.figures.setdefault(name, Figure(name, unit)).values.append(value)

    def _in_turn(self) -> list[tuple[str, Ask]]:
        """All subjects, another one first in each round, so that drift hits all alike."""
        subjects = [("", self._ask), *self._others.items()]
        first = self.rounds % len(subjects)
        return subjects[first:] + subjects[:first]

    async def _decode(self) -> None:
        seconds = {}
        for name, ask in self._in_turn():
            steps = await measure.step_seconds(ask, self.sizes.decode)
            seconds[name] = median(steps)
            if not name:
                slow = quantiles(steps, n=100)[98]
        self._note("decode, per token", "s", seconds[""])
        self._note("decode, per token, p99", "s", slow)
        self._note("decode", "tokens/s", 1 / seconds[""])
        for number, name in enumerate(self._others):
            self._note(f"decode, per token, {name}", "s", seconds[name])
            self._note(f"decode, per token, against {name}", "x", seconds[""] / seconds[name])
            if number == 0 and len(self.info.stages) > 1:
                added = (seconds[""] - seconds[name]) / len(self.info.stages)
                self._note("decode, added per hop", "s", added)

    async def _users(self) -> None:
        one = await measure.speed(self._ask, 1, self.sizes.decode)
        for count in self.sizes.users:
            together = await measure.speed(self._ask, count, self.sizes.decode)
            self._note(f"{count} users together", "tokens/s", together)
            self._note(f"{count} users, against 1", "x", together / one)

    async def _prefill(self) -> None:
        tokens, seconds = self.sizes.prefill, {}
        for name, ask in self._in_turn():
            seconds[name] = await measure.first_token(ask, tokens)
        self._note(f"TTFT, prompt of {tokens}", "s", seconds[""])
        self._note(f"prefill of {tokens}", "tokens/s", tokens / seconds[""])
        for name in self._others:
            self._note(f"TTFT, prompt of {tokens}, {name}", "s", seconds[name])
            self._note(f"prefill of {tokens}, against {name}", "x", seconds[name] / seconds[""])
        short = await measure.first_token(self._ask, measure.SHORT)
        self._note(f"TTFT, prompt of {measure.SHORT}", "s", short)

    async def _turns(self) -> None:
        first, second = await measure.turns(self._ask, self.sizes.history)
        self._note(f"TTFT, first turn of {self.sizes.history}", "s", first)
        self._note("TTFT, next turn", "s", second)
        self._note("next turn, against the first", "x", second / first)

    async def _gap(self) -> None:
        if self.info.users < 2:
            return
        longest = self.info.context - measure.SHORT
        gap = await measure.gap(self._ask, self.sizes.long, longest)
        name = f"maximum inter-token latency during a prefill of {self.sizes.long}"
        self._note(name, "s", gap.longest_s)

    async def _hops(self) -> None:
        stages = len(self.info.stages)
        if stages < 2:
            return
        trips = [(await self._client.describe()).ring_s for _ in range(FRAMES)]
        self._note("empty hop", "s", median(trips) / stages)


def of_client(client: AsyncClient) -> Ask:
    """Asks a deployment."""

    async def ask(prompt: Sequence[int], tokens: int, *, reuse: bool = False) -> Any:
        events = client.stream(
            prompt, max_tokens=tokens, temperature=0, ignore_eos=True, no_reuse=not reuse
        )
        try:
            async for event in events:
                if ids := getattr(event, "token_ids", ()):
                    yield ids
        finally:
            await events.aclose()

    return ask


def table(bench: Bench) -> Table:
    """The figures for people: medians, and what the rounds lie between."""
    info = bench.info
    made = Table(
        title=f"{info.model} {info.quant}, {counted(len(info.stages), 'stage')}, "
        f"{counted(info.lanes, 'lane')}, {counted(bench.rounds, 'round')}",
        title_justify="left",
        box=None,
    )
    made.add_column("")
    made.add_column("median", justify="right")
    made.add_column("rounds", justify="right", style="dim")
    for figure in bench.figures.values():
        low, high = min(figure.values), max(figure.values)
        between = f"{_number(low, figure.unit)} to {_number(high, figure.unit)}"
        made.add_row(figure.name, _shown(figure.median, figure.unit), between)
    return made


def _shown(value: float, unit: str) -> str:
    shown = {"s": "ms", "x": "x"}.get(unit, unit)
    return f"{_number(value, unit)} {shown}"


def _number(value: float, unit: str) -> str:
    value = value * 1e3 if unit == "s" else value
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
