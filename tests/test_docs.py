"""Documentation says what the program does: generated pages are fresh, links lead somewhere, commands parse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import combine, common, quality, recipe_quality, scaling, throughput
from bert_glue.__main__ import COMMANDS
from bert_glue.config.arguments import FLAGS
from tools import make_measurements, make_migration, make_tree

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_the_migration_page_is_what_the_tables_say():
    assert (ROOT / "docs" / "migration.md").read_text(encoding="utf-8") == make_migration.page()


@pytest.mark.parametrize("name", ["results.md", "benchmarks.md"])
def test_measurements_are_what_the_files_hold(name):
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == make_measurements.PAGES[name]()


def test_the_tables_of_scaling_are_what_was_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "scaling-cpu-2-cores.json").read_text(encoding="utf-8"))
    assert scaling.page(found) in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_the_tables_of_recipes_and_techniques_are_what_the_rows_hold():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    tables = (
        ("techniques", quality.technique_table),
        ("recipes", recipe_quality.table),
        ("combinations", combine.table),
    )
    rows = {name: common.read_rows(ROOT / "benchmarks" / "results" / f"{name}.jsonl") for name, _ in tables}
    assert not [name for name, table in tables if table(rows[name]) not in page]
    plain = common.read_rows(ROOT / "benchmarks" / "results" / "quality.jsonl")
    of_plain = [row for row in rows["techniques"] if row["run"] == "ours"]
    assert of_plain and all(row in plain for row in of_plain)


def test_the_scores_in_the_readmes_are_those_of_the_rows():
    rows = common.read_rows(ROOT / "benchmarks" / "results" / "quality.jsonl")
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not [line for line in quality.table(rows).splitlines()[2:] if line not in text]
    count, higher, lower = quality.pairs(rows)
    assert f"of {count} pairs, ours is higher in {higher} and lower in {lower}" in (ROOT / "README.md").read_text()


def test_the_speeds_in_the_readmes_are_those_of_the_reports():
    reports = json.loads((ROOT / "benchmarks" / "results" / "cpu-2-cores.json").read_text(encoding="utf-8"))["reports"]
    lines = throughput.summary(*reports)
    assert len(lines) == 5
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not [line for line in lines if line not in text]


def test_the_docs_are_complete():
    pages = {
        "scaling",
        "architecture",
        "results",
        "benchmarks",
        "reliability",
        "faq",
        "migration",
        "recipes",
        "own-data",
    }
    assert pages <= {page.stem for page in PAGES}
    faq = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8").lower()
    for subject in ("eight devices", "libgomp", "wnli", "hf_hub_offline", "mirror", "modelscope"):
        assert subject in faq


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    named = re.findall(r"`((?:bert_glue|test|tests|docs|configs|benchmarks)/[\w./-]+\.\w+)`", text)
    missing = [name for name in links if not (page.parent / name).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_the_tree_in_the_architecture_is_that_of_the_files():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert text == make_tree.page(text), "python tools/make_tree.py"


def test_files_named_in_the_architecture_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`?((?:\w+/)*\w+\.py)\b", text))
    assert len(named) > 20
    assert not [name for name in named if not list(ROOT.glob(f"**/{name}"))]


def _inline_commands() -> list[tuple[str, str]]:
    """(page, command) of every command in running text, such as `bert-glue soup RUN RUN... --output_dir FOLDER`."""
    found = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        found += [(page.name, " ".join(c.split())) for c in re.findall(r"`((?:python|bash|bert-glue) [^`]+)`", text)]
    return sorted(set(found))


def _program(words: list[str]) -> list[Path]:
    """Files whose text has to know a command's flags."""
    if words[0] == "python":
        return _files_of(words[2]) if words[1] == "-m" else [ROOT / words[1]]
    if words[0] == "bash":
        return [ROOT / words[1], *(ROOT / "test").glob("*.sh")]
    names = [name for name in words[1].split("|") if name not in ("...", "completion")]  # train|eval|predict|...
    return [file for name in names for file in _files_of(COMMANDS[name].module.removesuffix(".__main__"))]


def _files_of(module: str) -> list[Path]:
    path = ROOT / module.replace(".", "/")
    return sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


@pytest.mark.parametrize(("page", "command"), _inline_commands(), ids=" ".join)
def test_commands_in_the_text_are_understood(page, command):
    """Programs exist and know the flags; those of run_glue.py in its own list."""
    files, flags = _program(command.split()), re.findall(r"(?<!\S)--\w+", command)
    assert all(file.is_file() for file in files), files
    known = "".join(file.read_text(encoding="utf-8") for file in files)
    if ROOT / "run_glue.py" in files:
        known = " ".join(f"--{name}" for name in ("help", *FLAGS))
    assert not [flag for flag in flags if not re.search(rf"{flag}\b", known)]


def test_the_text_has_commands_at_all():
    assert {words.split()[0] for _, words in _inline_commands()} == {"python", "bash", "bert-glue"}
