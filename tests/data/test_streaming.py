"""Streams give the rows, lines and messages of files read whole, whatever the size of the blocks."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from bert_glue.data import streaming
from bert_glue.data.readers import read_table
from bert_glue.data.streaming import STANDARD, stream_tables
from bert_glue.errors import DataError

TEXTS = {
    "csv": '\ufeffa,b\r\n"two\r\nlines, ""q""",1\r\nNA,2\r\n\u2028x,3\r\n caf\u00e9 ,4\r\n\r\n\r\n',
    "tsv": '\ufeffa\tb\r\n"open quote\t1\r\nNA\t2\r\n\u2028x\t3\r\n caf\u00e9 \t4\r\n\n\n',
    "jsonl": '{"a": "\u2028x", "b": 1}\n{"a": "NA", "b": 2}\n{"a": "caf\u00e9", "b": null}\n\n \n',
}


def joined(path: Path, kind: str, rows: int) -> tuple[dict, list[str]]:
    """Columns and places of all chunks end to end."""
    columns: dict[str, list] = {}
    places: list[str] = []
    for table in stream_tables(path, kind, rows):
        assert len(table) <= rows
        for name, values in table.columns.items():
            columns.setdefault(name, []).extend(values)
        places += [table.where(row) for row in range(len(table))]
    return columns, places


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_stream_is_the_file_read_whole(tmp_path, monkeypatch, kind, rows, block):
    monkeypatch.setattr(streaming, "_BLOCK", max(block, 3))  # a mark has three bytes
    path = tmp_path / f"a.{kind}"
    path.write_bytes(TEXTS[kind].encode())
    whole = read_table(path)
    assert joined(path, kind, rows) == (whole.columns, [whole.where(row) for row in range(len(whole))])


BROKEN = {
    "ragged.tsv": "a\tb\n1\t2\n3\n4\t5\n",
    "blank.tsv": "a\tb\n1\t2\n\n4\t5\n",
    "ragged.csv": "a,b\n1,2\n3\n",
    "blank.csv": "a,b\n1,2\n\n3,4\n",
    "quote.csv": 'a,b\n1,2\n"open,3\n4,5\n',
    "double.csv": "a,a\n1,2\n",
    "double.tsv": "a\ta\n1\t2\n",
    "word.jsonl": '{"a": 1}\nno\n',
    "list.jsonl": '{"a": 1}\n[1]\n',
    "blank.jsonl": '{"a": 1}\n\n{"a": 2}\n',
    "bytes.tsv": b"a\tb\n1\t2\n\xff\t3\n",
    "nul.jsonl": b'{"a": 1}\n{"a": "\0"}\n',
    "wide.tsv": "a\tb\n".encode("utf-16"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_stream_is_refused_as_the_file_is(tmp_path, name):
    path, content = tmp_path / name, BROKEN[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as whole:
        read_table(path)
    with pytest.raises(DataError) as streamed:
        joined(path, path.suffix[1:], 1)
    assert str(streamed.value) == str(whole.value)


@pytest.mark.parametrize(("kind", "content"), [("csv", ""), ("tsv", "a\tb\n"), ("jsonl", " \n")])
def test_no_rows_are_an_error(tmp_path, kind, content):
    path = tmp_path / f"a.{kind}"
    path.write_text(content)
    with pytest.raises(DataError, match="has no rows"):
        joined(path, kind, 5)


def test_rows_before_an_error_are_handed_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\nno\n')
    tables = stream_tables(path, "jsonl", 2)
    assert next(tables).columns == {"a": [1, 2]}
    with pytest.raises(DataError, match=r"a\.jsonl:3: not JSON"):
        next(tables)


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"a": 1}\nno\n')))
    tables = stream_tables(STANDARD, "jsonl", 1)
    assert next(tables).where(0) == "stdin:1"
    with pytest.raises(DataError, match="^stdin:2: not JSON"):
        next(tables)


def test_parquet_in_chunks_counts_its_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x", "y", "z"]}), path, row_group_size=2)
    columns, places = joined(path, "parquet", 2)
    assert columns == {"a": ["x", "y", "z"]} and places == [f"{path} row {n}" for n in (1, 2, 3)]
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        joined(path, "parquet", 2)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        joined(tmp_path / "none.csv", "csv", 2)


@pytest.mark.parametrize(
    ("kind", "content", "problem"),
    [
        ("csv", "text;label\na;1\n", "separated by ';'"),
        ("tsv", "text,label\na,1\n", "separated by ','"),
        ("csv", "text,label\ra,1\r", "lines end in a lone CR"),
        ("tsv", "text\tlabel\ra\t1", "lines end in a lone CR"),
        ("jsonl", '{"a": 1}\r{"a": 2}', "lines end in a lone CR"),
    ],
)
def test_another_layout_is_named_as_for_whole_files(tmp_path, kind, content, problem):
    path = tmp_path / f"a.{kind}"
    path.write_text(content, newline="")
    with pytest.raises(DataError, match=problem):
        list(stream_tables(path, kind, 10))
