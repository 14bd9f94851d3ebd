"""Parts of all tables here: columns, bars, and figures as people read them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

# More columns than any table takes.
ENDLESS = 10_000


@dataclass(frozen=True)
class Ink:
    """One part of a bar: distinguished by colour, and without colours by its glyph."""

    name: str
    glyph: str
    ascii: str
    style: str


WEIGHTS = Ink("weights", "█", "#", "cyan")
KV = Ink("KV cache", "▓", "=", "blue")
RESERVE = Ink("reserve", "▒", "-", "bright_black")
FREE = Ink("free", "░", ".", "bright_black")


@dataclass(frozen=True)
class Bar:
    """A bar as wide as its column, up to `width`, of parts in proportion to their sizes."""

    parts: Sequence[tuple[int, Ink]]
    width: int = 24

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(8, self.width), self.width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, self.width)
        total = sum(max(size, 0) for size, _ in self.parts) or 1
        done = edge = 0
        for size, ink in self.parts:
            done += max(size, 0)
            start, edge = edge, round(done * width / total)
            glyph = ink.ascii if options.ascii_only else ink.glyph
            yield Segment(glyph * (edge - start), Style.parse(ink.style))


def new_table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold") if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        header_style="dim",
        pad_edge=False,
        show_edge=False,
    )


def fitting(console: Console, options: ConsoleOptions, tables: Iterable[Table]) -> Table:
    """The first of the tables that is no wider than the screen, else the last: its names fold."""
    endless = options.update(width=ENDLESS)
    for table in tables:
        if Measurement.get(console, endless, table).maximum <= options.max_width:
            break
    return table


def add_names(table: Table, *headers: str) -> None:
    """Columns that give way first: what is too long goes on in the next line, and none is cut."""
    for header in headers:
        table.add_column(header, overflow="fold")


def whole(text: str, style: str = "") -> Text:
    """A name, which must be read to its end: machines of a kind differ there."""
    return Text(text, style, overflow="fold")


def who(name: str, chip: str, wide: bool, *below: str) -> list[RenderableType]:
    """A machine's name and chip: side by side where there is room, else one above the other.

    `below` are further lines under them.
    """
    cells = [whole(name), whole(chip, "dim")]
    if wide:
        return [*cells]
    return [Group(*(cell for cell in cells if cell), *(whole(line, "dim") for line in below))]


def stacked(items: str) -> str:
    """A list with a line for each item."""
    return items.replace(", ", ",\n")


def add_words(table: Table, *headers: str) -> None:
    for header in headers:
        table.add_column(header, no_wrap=True, overflow="fold")


def add_bar(table: Table, width: int, header: str = "") -> None:
    """A column for bars of up to so many columns; none for 0."""
    if width:
        table.add_column(header)


def add_numbers(table: Table, *headers: str) -> None:
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)


def layer_range(first: int, end: int) -> str:
    """Layers [first, end) as people count them, both ends named."""
    return str(first) if end - first == 1 else f"{first}-{end - 1}"
