"""Writes the tree of bert_glue/ into docs/architecture.md: one line per file, from its docstring's first line.

python tools/make_tree.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree -->\n", "<!-- /tree -->\n"


def summary(file: Path) -> str:
    """The first line of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].rstrip(".")


def tree() -> str:
    """The tree as a fenced block, folders before files."""
    return "\n".join(["```text", *_lines(ROOT / "bert_glue", 0), "```", ""])


def _lines(folder: Path, depth: int) -> list[str]:
    """A package's name, its packages, then its modules with their purposes."""
    lines = [f"{'  ' * depth}{folder.name}/"]
    for package in sorted(path.parent for path in folder.glob("*/__init__.py")):
        lines += _lines(package, depth + 1)
    for file in sorted(folder.glob("*.py")):
        if file.name != "__init__.py":
            lines.append(f"{'  ' * depth}  {file.name:<{24 - 2 * depth}}{summary(file)}")
    return lines


def page(text: str) -> str:
    """The page with its tree replaced by a new one."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{tree()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
