"""Documentation says what the program does: generated pages are fresh, links lead somewhere, commands parse."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_the_migration_page_is_what_the_tables_say():
    spec = importlib.util.spec_from_file_location("make_migration", ROOT / "docs" / "make_migration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "migration.md").read_text(encoding="utf-8") == module.page()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    named = re.findall(r"`((?:bert_glue|test|tests|docs|configs|benchmarks)/[\w./-]+\.\w+)`", text)
    missing = [name for name in links if not (page.parent / name).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_rooms_named_in_the_architecture_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = set(re.findall(r"\b(\w+\.py)\b", text))
    assert len(rooms) > 20
    assert not [room for room in rooms if not list(ROOT.glob(f"**/{room}"))]
