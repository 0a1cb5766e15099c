"""The docs site without building it: its pages are there, and what the API page names can be imported."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
NAMES = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inner = entry.values() if isinstance(entry, dict) else entry
        return [page for value in inner for page in pages(value)]  # type: ignore[union-attr]

    site = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(pages(site["nav"])) == sorted(page.name for page in DOCS.glob("*.md"))


@pytest.mark.parametrize("name", NAMES)
def test_what_the_api_page_names_is_there_and_documented(name: str) -> None:
    module, _, member = name.rpartition(".")
    thing = getattr(importlib.import_module(module), member, None) or importlib.import_module(name)
    assert (thing.__doc__ or "").strip()
