"""The committed pages are what their commands write now."""

import pytest

from bench import pages
from coordinator.models.catalog import entries


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["memory", "published"])
def test_a_page_is_fresh(name: str) -> None:
    """Slow: it looks into some forty models, ten seconds in all."""
    assert (pages.DOCS / f"{name}.md").read_text("utf-8") == pages.PAGES[name]()


def test_the_page_of_machines_is_fresh() -> None:
    """A sample: the whole takes a minute."""
    page = (pages.DOCS / "machines.md").read_text("utf-8")
    some = [e for e in entries() if e.id in ("gemma-3-27b", "deepseek-r1", "gpt-oss-120b")]

    for row in pages.machine_rows(some):
        assert row in page
    assert page.count("\n| ") == 1 + sum(len(set(e.quants) & set(pages.QUANTS)) for e in entries())


def test_the_page_of_ggufs_is_fresh() -> None:
    name = "gguf_architectures"
    assert (pages.DOCS / f"{name}.md").read_text("utf-8") == pages.PAGES[name]()
