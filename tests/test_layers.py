"""The layout of bert_glue/: packages in layers, imports downwards, modules of a size that a reader can hold."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bert_glue"

# Lowest first. A package imports from the rows below its own and from itself, type-only imports included.
LAYERS = (
    ("errors", "tasks", "result_keys"),
    ("storage",),
    ("config",),
    ("devices", "hub"),
    ("data", "precision"),
    ("model",),
    ("evaluation", "results"),
    ("training", "report", "launch", "check"),
    ("pipeline", "predict", "doctor"),
    ("sweep", "soup", "submission", "glue_metric", "onnx_variants"),
    ("export",),
    ("__main__",),
)
ROW = {name: number for number, row in enumerate(LAYERS) for name in row}
# All at the bottom: an unknown task is a usage error, and a task decides the names of its results.
WITHIN_A_ROW = {("tasks", "errors"), ("result_keys", "tasks")}
FLOOR, CAP, MOST_MODULES = 75, 400, 15
LONGER = {"arguments": 450, "tasks": 450}  # tables: a row a flag, a row a task


def modules() -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*.py")) if file.name != "__init__.py"]


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


NAMES = {name_of(file) for file in modules()}


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, module below bert_glue) of every import, in functions and below TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bert_glue":
            below = (node.module or "").removeprefix("bert_glue").lstrip(".")
            for alias in node.names:
                whole = f"{below}.{alias.name}".lstrip(".")
                yield node.lineno, whole if whole in NAMES else below
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("bert_glue."):
                    yield node.lineno, alias.name.removeprefix("bert_glue.")


def edges() -> Iterator[tuple[str, str, str]]:
    """(file:line, importing module, imported module), both below bert_glue."""
    for file in modules():
        for line, target in imported(ast.parse(file.read_text(encoding="utf-8"))):
            if target:  # `from bert_glue import __version__` is no module of ours
                yield f"{file.relative_to(PACKAGE.parent)}:{line}", name_of(file), target


def upward(found: Iterator[tuple[str, str, str]]) -> list[str]:
    """The imports that do not go down, as `file:line imports module`."""
    bad = []
    for where, source, target in found:
        own, other = source.split(".")[0], target.split(".")[0]
        if own != other and (own, other) not in WITHIN_A_ROW and ROW[other] >= ROW[own]:
            bad.append(f"{where} imports {target}: row {ROW[other]} is not below row {ROW[own]}")
    return bad


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules along one cycle, [] if there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            if found := walk(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_every_package_has_its_row() -> None:
    found = {name.split(".")[0] for name in NAMES}
    assert found == set(ROW), "LAYERS and the tree differ"


def test_imports_go_down_the_layers() -> None:
    bad = upward(edges())
    assert not bad, "\n".join(bad)


def test_modules_do_not_import_in_circles() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for _, source, target in edges():
        if source != target:
            graph[source].add(target)
    found = cycle(graph)
    assert not found, " -> ".join(found)


@pytest.mark.parametrize("source, target", [("errors", "tasks"), ("data.tables", "model.loading"), ("check", "report")])
def test_an_import_that_goes_up_or_sideways_is_found(source: str, target: str) -> None:
    assert upward(iter([("here.py:1", source, target)])) == [
        f"here.py:1 imports {target}: row {ROW[target.split('.')[0]]} is not below row {ROW[source.split('.')[0]]}"
    ]


def test_a_cycle_is_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_modules_fit_a_reader() -> None:
    lines = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in modules()}
    importers = Counter(target for _, source, target in set((w.split(":")[0], s, t) for w, s, t in edges()))
    too_long = {name: n for name, n in lines.items() if n > LONGER.get(name.split(".")[-1], CAP)}
    # A door (`__main__`) may be small, and so may what several modules share.
    too_small = {
        name: n for name, n in lines.items() if n < FLOOR and importers[name] == 1 and not name.endswith("__main__")
    }
    assert not too_long
    assert not too_small, "join them to their only importer"


def test_folders_fit_a_reader() -> None:
    counts = Counter(file.parent for file in modules())
    assert max(counts.values()) <= MOST_MODULES


def test_subpackages_import_nothing_when_they_are_named() -> None:
    filled = [str(file) for file in PACKAGE.rglob("*/__init__.py") if file.read_text(encoding="utf-8").strip()]
    assert not filled, "--help and a usage error must not import torch"
