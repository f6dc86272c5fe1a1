"""Gathers the pages for tools/build_docs.sh, checks their links, and writes one plain page where there is no mkdocs.

    python -m tools.build_docs --folder build/pages           pages and mkdocs.yml, as mkdocs takes them
    python -m tools.build_docs --plain --folder build/site    index.html with all pages and a search

Only the standard library is used. No link is fetched: those to other hosts are not checked.
"""

from __future__ import annotations

import argparse
import html
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from bert_glue.errors import DataError, exit_code_of, print_lines

ROOT = Path(__file__).resolve().parents[1]
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>bert-glue</title>
<style>:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere }} input {{ font: inherit; width: 100% }}</style>
<h1>bert-glue</h1>
<input type="search" placeholder="search / 搜索" aria-label="search / 搜索">
{pages}
<script>
const pages = [...document.querySelectorAll("details")];
document.querySelector("input").addEventListener("input", (event) => {{
  const words = event.target.value.toLowerCase().split(/\\s+/);
  for (const page of pages) page.hidden = !words.every((word) => page.textContent.toLowerCase().includes(word));
}});
</script></html>
"""


def pages(root: Path = ROOT) -> list[Path]:
    """The pages of the site: README and the others of the root, and those of docs/."""
    return sorted([*root.glob("*.md"), *(root / "docs").rglob("*.md")])


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", _without_code(text), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{n}" if n else slug for slug, most in found.items() for n in range(most + 1)}


def links(text: str) -> Iterator[tuple[int, str]]:
    """(line, target) of every link and picture that leads to no other host."""
    for number, line in enumerate(_without_code(text).splitlines(), 1):
        line = re.sub(r"`[^`]*`", "", line)
        for target in re.findall(r"\]\(\s*<?([^)\s>]+)|\b(?:src|srcset|href)=\"([^\"]+)\"", line):
            address = target[0] or target[1]
            if not re.match(r"[a-z][a-z0-9+.-]*:", address):
                yield number, address


def dead_links(root: Path = ROOT) -> list[str]:
    """One line for each link of the pages and of test/README.md to a file or a heading that does not exist."""
    found = []
    for page in (*pages(root), *(root / "test").glob("*.md")):
        for number, address in links(page.read_text(encoding="utf-8")):
            name, _, anchor = unquote(address).partition("#")
            target = page.parent / name if name else page
            if not target.exists():
                found.append(f"{page.relative_to(root)}:{number}: {address}: no such file")
            elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8")):
                found.append(f"{page.relative_to(root)}:{number}: {address}: no such heading")
    return found


def gather(folder: Path, root: Path = ROOT) -> None:
    """Copy the pages and their pictures in the layout of the repository, so that every link holds, and mkdocs.yml."""
    shutil.rmtree(folder, ignore_errors=True)
    for file in (*pages(root), *sorted((root / "docs").rglob("*.png"))):
        target = folder / "pages" / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    shutil.copyfile(root / "tools" / "mkdocs.yml", folder / "mkdocs.yml")


def plain_page(root: Path = ROOT) -> str:
    """All pages as text on one page, with a search that needs no network."""
    parts = []
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        title = html.escape(next(iter(re.findall(r"^# +(.+)$", text, re.MULTILINE)), page.stem))
        name = html.escape(str(page.relative_to(root)))
        parts.append(
            f"<details><summary>{title} <small>{name}</small></summary><pre>{html.escape(text)}</pre></details>"
        )
    return _PAGE.format(pages="\n".join(parts))


def _without_code(text: str) -> str:
    """Fenced code as empty lines, so that the numbers of lines stay."""
    return re.sub(r"^```.*?^```", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 usage, 3 a dead link."""
    parser = argparse.ArgumentParser(prog="python -m tools.build_docs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the pages go")
    parser.add_argument("--plain", action="store_true", help="write one page, without mkdocs")
    args = parser.parse_args(argv)

    def build() -> int:
        if dead := dead_links():
            raise DataError("\n".join(dead))
        if args.plain:
            args.folder.mkdir(parents=True, exist_ok=True)
            (args.folder / "index.html").write_text(plain_page(), encoding="utf-8")
            print_lines(f"wrote {args.folder / 'index.html'}")
        else:
            gather(args.folder)
        return 0

    return exit_code_of(build)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
