"""The documentation is right: generated pages are up to date, links have targets, and commands parse."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import combine, common, estimates, quality, recipe_quality, scaling, throughput
from bert_glue.__main__ import ALIASES, COMMANDS
from bert_glue.config.arguments import FLAGS
from bert_glue.launch.requirements import STACK
from tools import build_docs, make_measurements, make_migration, make_pictures, make_tree

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_the_migration_page_is_what_the_tables_say():
    assert (ROOT / "docs" / "migration.md").read_text(encoding="utf-8") == make_migration.page()


@pytest.mark.parametrize("name", ["results.md", "benchmarks.md"])
def test_measurements_are_what_the_files_hold(name):
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == make_measurements.PAGES[name]()


def test_the_tables_of_scaling_are_what_was_measured_and_estimated():
    found = json.loads((ROOT / "benchmarks" / "results" / "scaling-cpu-2-cores.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scaling.page(found) in page
    assert estimates.page() in page


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


def test_the_scores_of_both_languages_are_those_of_the_rows():
    rows = common.read_rows(ROOT / "benchmarks" / "results" / "quality.jsonl")
    for name in ("results.md", "results.zh-CN.md"):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert not [line for line in quality.table(rows).splitlines()[2:] if line not in text]
    count, higher, lower = quality.pairs(rows)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"of {count} pairs of runs, ours is higher in {higher} and lower in {lower}" in readme
    chinese = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    assert f"{count} 对比较中，本项目 {higher} 次较高，{lower} 次较低" in chinese


def test_the_speeds_of_both_languages_are_those_of_the_reports():
    measured = json.loads((ROOT / "benchmarks" / "results" / "cpu-amd-avx512.json").read_text(encoding="utf-8"))
    lines = throughput.summary(*measured["reports"])
    assert len(lines) == 5
    for name in ("results.md", "results.zh-CN.md"):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert not [line for line in lines if line not in text]
    intel = json.loads((ROOT / "benchmarks/results/cpu-intel-avx512-amx.json").read_text(encoding="utf-8"))
    for name, word, unit in (("README.md", "x to", "x"), ("README.zh-CN.md", " 到", " 倍")):
        text = (ROOT / name).read_text(encoding="utf-8")
        for content, processor in ((measured, "AMD EPYC"), (intel, "Intel Xeon")):
            assert content["date"] in text and processor in text
        spans = zip(*(throughput.spans(content["reports"][0]) for content in (measured, intel)), strict=True)
        for both in spans:
            cells = " | ".join(f"{low:.2f}{word} {high:.2f}{unit}" for low, high in both)
            assert f"| {cells} |" in text


def test_the_stacks_of_both_readmes_are_the_tested_ranges():
    for name, word in (("README.md", "to"), ("README.zh-CN.md", "到")):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not [package for package, known in STACK.items() if str(known).replace("to", word) not in text]


def test_both_readmes_are_short_and_show_the_same_pictures():
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert len(text.split()) < 900
        for scheme in ("light", "dark"):
            picture = ROOT / "docs" / "images" / f"report-{scheme}.png"
            assert f'"docs/images/{picture.name}"' in text
            assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size <= make_pictures.LARGEST


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
        "running",
        "launchers",
        "outputs",
    }
    assert pages <= {page.stem for page in PAGES}
    faq = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8").lower()
    for subject in ("eight devices", "libgomp", "wnli", "hf_hub_offline", "mirror", "modelscope"):
        assert subject in faq


def test_no_link_leads_nowhere():
    assert build_docs.dead_links() == []
    made = re.compile(r"\.|build$|output$|templates$")
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    everything = {ROOT / path for path in found if not any(map(made.match, path.parts))}
    assert everything == {*build_docs.pages(), ROOT / "test/README.md"}  # no page is left out of the check


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:bert_glue|test|tests|tools|docs|configs|benchmarks)/[\w./-]+\.\w+)`", text)
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](docs/none.md)", "p.md:1: docs/none.md: no such file"),
        ("\n[a](other.md#nothing)", "p.md:2: other.md#nothing: no such heading"),
        ("[a](#b)", "p.md:1: #b: no such heading"),
        ('<img src="x.png">', "p.md:1: x.png: no such file"),
        ("[a](other.md#一二-c)", "p.md:1: other.md#一二-c: no such heading"),
    ],
)
def test_a_dead_link_is_found(tmp_path, text, problem):
    (tmp_path / "p.md").write_text(f"{text}\n```\n[code](none.md)\n```\n`[code](none.md)` [web](https://a.example/x)\n")
    (tmp_path / "other.md").write_text("# A\n\n## The `--flag`, [here](p.md)!\n\n## 一二 b\n\n## A\n")
    assert build_docs.dead_links(tmp_path) == [problem]
    (tmp_path / "p.md").write_text("[a](other.md#the---flag-here) [b](other.md#一二-b) [c](other.md#a-1) [d](other.md)")
    assert build_docs.dead_links(tmp_path) == []


def test_the_navigation_of_the_site_has_every_page():
    text = (ROOT / "tools" / "mkdocs.yml").read_text(encoding="utf-8")
    named = sorted(re.findall(r": (\S+\.md)$", text, re.MULTILINE))
    assert named == sorted(str(page.relative_to(ROOT)) for page in build_docs.pages())


def test_without_mkdocs_one_plain_page_has_everything(tmp_path):
    """pip finds no index here, as on a machine without a network."""
    clone = tmp_path / "clone"
    for folder in ("docs", "benchmarks/results"):  # the pages, and the files that they link to
        shutil.copytree(ROOT / folder, clone / folder)
    for name in ("tools/build_docs.sh", "tools/build_docs.py", "requirements/docs.txt", "bert_glue/errors.py"):
        (clone / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    for page in (*ROOT.glob("*.md"), ROOT / "LICENSE"):
        shutil.copy(page, clone)
    (clone / "bert_glue" / "__init__.py").touch()
    call = ["bash", str(clone / "tools/build_docs.sh"), f"--folder={tmp_path / 'site'}"]
    settings = {**os.environ, "PIP_NO_INDEX": "1", "PYTHONPATH": ""}
    done = subprocess.run(call, env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "could not be installed" in done.stderr, done.stderr
    page = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert (
        page.count("<details>") == len(build_docs.pages())
        and "# 退出码" in page
        and "://" not in page.partition("<details>")[0]
    )
    (clone / "docs" / "faq.md").write_text("[x](none.md)")
    done = subprocess.run(call, env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and "error: docs/faq.md:1: none.md: no such file" in done.stderr


@pytest.mark.slow
def test_the_site_has_a_search_in_both_languages(tmp_path):
    """Needs a package index, or an earlier .venv-docs."""
    call = ["bash", str(ROOT / "tools/build_docs.sh"), f"--folder={tmp_path / 'site'}"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    if "could not be installed" in done.stderr:
        pytest.skip("mkdocs-material cannot be installed here")
    index = json.loads((tmp_path / "site/search/search_index.json").read_text(encoding="utf-8"))
    assert index["config"]["lang"] == ["en", "zh"]
    texts = " ".join(part["text"] for part in index["docs"])
    assert "samples/s counts" in texts and "\u200b" in texts  # Chinese words are split
    loaded = re.findall(
        r"<(?:script|link|img)[^>]*(?:src|href)=\"?(https?:[^\"> ]+)", (tmp_path / "site/index.html").read_text()
    )
    assert loaded == []


def test_the_tree_in_the_architecture_is_that_of_the_files():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert text == make_tree.page(text), "python tools/make_tree.py"


def test_files_named_in_the_architecture_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`?((?:\w+/)*\w+\.py)\b", text))
    assert len(named) > 20
    # Not of .venv, which has a hundred thousand files and some of the same names.
    own = [top for top in ROOT.iterdir() if not top.name.startswith(".")]
    files = [f"/{path.relative_to(ROOT)}" for top in own for path in (top.rglob("*.py") if top.is_dir() else [top])]
    assert not [name for name in named if not any(file.endswith(f"/{name}") for file in files)]


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
    return [
        file for name in names for file in _files_of(COMMANDS[ALIASES.get(name, name)].module.removesuffix(".__main__"))
    ]


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
