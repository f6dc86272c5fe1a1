"""public_address_statement.md: that it is true, and what its generator does with new, old and unknown rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from bert_glue.errors import DataError
from tools import public_addresses
from tools.public_addresses import STATEMENT, addresses_in, main, refresh, rows_of

REPOSITORY = Path(__file__).parents[1]
HEADER = "# Addresses\n\n| type | source address | file | public address | purpose |\n|---|---|---|---|---|\n"
HOST = "https://hub.some-host.com"


def project(folder: Path, rows: str, **files: str) -> Path:
    """A folder with a statement and files."""
    (folder / STATEMENT).write_text(f"{HEADER}{rows}\nAnd some words.\n")
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def row(file: str, address: str, purpose: str = "p") -> str:
    return f"| open source | Owner | {file} | {address} | {purpose} |\n"


def test_every_public_address_is_declared_and_no_other():
    try:
        refresh(REPOSITORY, check=True)
    except DataError as error:
        pytest.fail(str(error))


def test_what_counts_as_public():
    text = f"see <{HOST}/a_b>, ({HOST}/c). http://localhost:1/x http://127.0.0.1 https://a.example/x http://{{host}}/"
    assert addresses_in(text + " me@some-host.org") == {f"{HOST}/a_b", f"{HOST}/c", "me@some-host.org"}


def test_rows_are_kept_dropped_and_added(tmp_path):
    root = project(tmp_path, row("a.py", HOST, "why") + row("gone.py", HOST), a=HOST, b=f"{HOST}/other")
    with pytest.raises(DataError) as error:
        refresh(root, check=True)
    assert f"gone: gone.py {HOST}" in str(error.value) and f"new: b.py {HOST}/other" in str(error.value)
    assert "gone.py" in (root / STATEMENT).read_text()  # a check changes nothing
    refresh(root, check=False)
    text = (root / STATEMENT).read_text()
    assert [tuple(r) for r in rows_of(text)] == [
        ("open source", "Owner", "a.py", HOST, "why"),
        ("open source", "Owner", "b.py", f"{HOST}/other", "why"),
    ]
    assert text.startswith(HEADER) and text.endswith("\nAnd some words.\n")
    assert refresh(root, check=True) == [f"{STATEMENT}: 2 addresses"]


def test_an_address_nobody_explained_is_refused(tmp_path, capsys):
    root = project(tmp_path, row("a.py", HOST), a=HOST, b="ftp://files.other-host.net/x")
    assert main(["--root", str(root)]) == 3
    assert "add | open source | OWNER | b.py | ftp://files.other-host.net/x | PURPOSE |" in capsys.readouterr().err


def test_a_broken_row_and_a_missing_statement(tmp_path, capsys):
    root = project(tmp_path, "| one | two |\n")
    assert main(["--root", str(root), "--check"]) == 3
    assert f"{STATEMENT}:5: 2 columns where 5 are expected" in capsys.readouterr().err
    assert main(["--root", str(tmp_path / "none")]) == 3
    assert "run this in the root of a checkout" in capsys.readouterr().err


def test_files_without_text_are_passed_over(tmp_path):
    root = project(tmp_path, row("a.py", HOST), a=HOST)
    (root / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    assert public_addresses.found(root) == {("a.py", HOST)}
