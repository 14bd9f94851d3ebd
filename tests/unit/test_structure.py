"""docs/structure.md describes the code as it is, and links between pages lead somewhere."""

import re
from functools import cache
from pathlib import Path

import pytest

from tests.unit.test_architecture import FLOORS

ROOT = Path(__file__).parents[2]
STRUCTURE = ROOT / "docs" / "structure.md"
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/**/*.md")]
    if not {".venv", "build", "node_modules"} & set(path.relative_to(ROOT).parts)
)

# What stands in code can look like a link and is none.
FENCED = re.compile(r"^```.*?^```$|`[^`\n]*`", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)
PATH = re.compile(r"`([\w.-]+/[\w./-]*)`")
TERM = re.compile(r"^- \*\*(.+?)\*\*", re.M)


def rooms() -> list[str]:
    return [
        f"{package}/" if room == "." else f"{package}/{room.replace('.', '/')}/"
        for package, names in FLOORS.items()
        for room in names
    ]


@cache
def words_of_the_code() -> str:
    """All sources in small letters, one space between words: identifiers are words too."""
    files = [
        *(path for package in FLOORS for path in (ROOT / package).rglob("*.py")),
        *(ROOT / "proto").rglob("*.proto"),
    ]
    return " ".join(normal(path.read_text()) for path in files)


def normal(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text).lower().strip()


def anchors(page: Path) -> set[str]:
    """Ids of a page's headings, as GitHub makes them."""
    headings = HEADING.findall(re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("room", [*rooms(), "tests/", "bench/", "proto/", "deploy/", "ansible/"])
def test_every_room_is_described(room: str) -> None:
    assert re.search(rf"^(- |\| )`{room}`", STRUCTURE.read_text(), re.M)


def test_every_path_exists() -> None:
    named = PATH.findall(STRUCTURE.read_text())

    assert len(named) > 50
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_term_of_the_glossary_is_used_in_the_code() -> None:
    _, _, glossary = STRUCTURE.read_text().partition("## Words")
    terms = [
        part for term in TERM.findall(glossary) for part in re.sub(r"\(.*?\)", "", term).split(", ")
    ]

    assert len(terms) > 30
    assert [term for term in terms if normal(term) not in words_of_the_code()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(FENCED.sub("", page.read_text())):
        target, _, anchor = link.partition("#")
        if re.match(r"\w+:", target):
            continue
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)

    assert broken == []
