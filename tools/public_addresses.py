"""Keeps public_address_statement.md up to date: `python -m tools.public_addresses [--check]`.

Run it in the root of a checkout. The rows come from the files themselves. The purpose of an address comes from the
existing rows, so you must write the purpose of a new address by hand, once.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from bert_glue.errors import DataError, exit_code_of

STATEMENT = "public_address_statement.md"
_HEADER = "| type | source address | file | public address | purpose |"
_RULE = "|---|---|---|---|---|"
_ADDRESS = re.compile(r"(?:https?|ftp|git|ssh)://[^\s\"'`<>|)\]}\\]+|[\w.+-]+@[\w-]+\.(?:com|org|net|io|cn)\b")
# Loopback, names reserved by RFC 2606, and addresses filled in at run time.
_NOT_PUBLIC = re.compile(r"//(localhost|127\.|0\.0\.0\.0|\[::1\]|[\w.-]*\.(example|invalid|test|local)\b|[{$%])")
# Not searched: the statement, and the two files that hold the pattern and its tests.
_NOT_SEARCHED = (STATEMENT, "tools/public_addresses.py", "tests/test_public_addresses.py")


class Row(NamedTuple):
    """One line of the statement."""

    type: str
    source: str
    file: str
    address: str
    purpose: str


def tree(root: Path) -> list[Path]:
    """Files that are or will be committed. Without git: all files except those of `.venv` and `output`."""
    if shutil.which("git") and (root / ".git").exists():
        command = ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard", "-z"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        files = [root / name for name in listed if name]
    else:
        files = [file for file in root.rglob("*") if not {".venv", "output"} & set(file.parts)]
    return [file for file in files if file.is_file()]


def addresses_in(text: str) -> set[str]:
    """Public addresses of a text."""
    return {m[0].rstrip(".,;:") for m in _ADDRESS.finditer(text) if not _NOT_PUBLIC.search(m[0])}


def found(root: Path) -> set[tuple[str, str]]:
    """(file, address) of every public address in the tree."""
    pairs = set()
    for file in tree(root):
        name = file.relative_to(root).as_posix()
        if name not in _NOT_SEARCHED:
            try:
                pairs |= {(name, address) for address in addresses_in(file.read_text(encoding="utf-8"))}
            except UnicodeDecodeError:
                continue  # not a text file
    return pairs


def rows_of(statement: str) -> list[Row]:
    """The table of a statement.

    Raises:
        DataError: a row does not have five columns.
    """
    rows = []
    for number, line in enumerate(statement.splitlines(), 1):
        if line.startswith("|") and line not in (_HEADER, _RULE):
            cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
            if len(cells) != 5:
                raise DataError(f"{STATEMENT}:{number}: {len(cells)} columns where 5 are expected")
            rows.append(Row(*cells))
    return rows


def updated(rows: Iterable[Row], pairs: set[tuple[str, str]]) -> list[Row]:
    """Rows for exactly `pairs`. A new row takes type, source and purpose from a row with the same address or host.

    Raises:
        DataError: no row has the address or its host; the message has the row to complete.
    """
    known = {(row.file, row.address): row for row in rows}
    # Reversed, so that the first of several rows with one address or host counts.
    by_address = {row.address: row for row in reversed(known.values())}
    by_host = {urlsplit(row.address).netloc: row for row in reversed(known.values())}
    result, unknown = [], []
    for file, address in sorted(pairs):
        like = known.get((file, address)) or by_address.get(address) or by_host.get(urlsplit(address).netloc)
        if like is None:
            unknown.append(f"{STATEMENT}: add | open source | OWNER | {file} | {address} | PURPOSE |")
        else:
            result.append(like._replace(file=file, address=address))
    if unknown:
        raise DataError("\n".join(unknown))
    return result


def with_rows(statement: str, rows: Iterable[Row]) -> str:
    """The statement with its table replaced."""
    return "\n".join(_lines(statement, rows)) + "\n"


def _lines(statement: str, rows: Iterable[Row]) -> Iterator[str]:
    for line in statement.splitlines():
        if line == _RULE:
            yield line
            yield from (f"| {' | '.join(row)} |" for row in rows)
        elif line == _HEADER or not line.startswith("|"):
            yield line


def refresh(root: Path, check: bool) -> list[str]:
    """Brings the statement up to date, or only checks it.

    Returns:
        Lines about the changes.

    Raises:
        DataError: `check` is set and the statement is not up to date, or the purpose of an address is not known.
    """
    path = root / STATEMENT
    try:
        statement = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); run this in the root of a checkout") from None
    before = rows_of(statement)
    after = updated(before, found(root))
    changes = [f"gone: {row.file} {row.address}" for row in before if row not in after]
    changes += [f"new: {row.file} {row.address}" for row in after if row not in before]
    text = with_rows(statement, after)
    if text != statement and check:
        raise DataError("\n".join([*changes, f"{STATEMENT} is not up to date; run python -m tools.public_addresses"]))
    if text != statement:
        path.write_text(text, encoding="utf-8")
    return [*changes, f"{STATEMENT}: {len(after)} addresses"]


def main(argv: list[str]) -> int:
    """Exit code: 0 up to date, 2 usage, 3 not up to date or a purpose is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.public_addresses", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 3 if something would change")
    parser.add_argument("--root", type=Path, default=Path(), help="root of the checkout; default: the current folder")
    args = parser.parse_args(argv)

    def answer() -> int:
        print("\n".join(refresh(args.root, args.check)))
        return 0

    return exit_code_of(answer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
