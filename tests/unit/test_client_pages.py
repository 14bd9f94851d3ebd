"""The pages of docs/clients/: the programs in them are programs, and the list names every page."""

import re
from pathlib import Path

import pytest

from tests.support.pages import ROOT, fenced

CLIENTS = ROOT / "docs" / "clients"
PAGES = sorted(CLIENTS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_programs_of_a_page_compile(page: Path) -> None:
    text = page.read_text("utf-8")
    programs = fenced(text, "python")

    assert len(programs) == text.count("```python")
    for at, program in enumerate(programs):
        compile(program, f"{page.name}, block {at}", "exec")


def test_the_list_names_every_page() -> None:
    listed = re.findall(r"^\| \[.+?\]\((.+?)\)", (CLIENTS / "README.md").read_text("utf-8"), re.M)

    assert sorted(listed) == [page.name for page in PAGES if page.name != "README.md"]
