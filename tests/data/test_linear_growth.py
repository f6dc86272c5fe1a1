"""Reading grows with the file, not with its square: headers, long lines, keys."""

from __future__ import annotations

import hashlib
import io
import json
import time

import pytest

from bert_glue.data.readers import read_table
from bert_glue.data.streaming import text_lines
from bert_glue.data.tables import check_header, pieces
from bert_glue.errors import DataError


def seconds(action) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def test_a_header_of_a_hundred_thousand_columns() -> None:
    names = [f"c{n}" for n in range(100_000)]
    assert seconds(lambda: check_header("x", names)) < 5  # comparing each with each takes minutes
    with pytest.raises(DataError, match="'c7'"):
        check_header("x", [*names, "c7"])


@pytest.mark.parametrize("ends", ["", "\n", "\nlast"])
def test_lines_longer_than_a_block_stay_whole(ends) -> None:
    long = "ä" * 1_500_000  # three blocks, cut inside of a character
    content = f"first\n{long}\nb{ends}".encode()
    lines = list(text_lines(io.BytesIO(content), "x"))
    assert "".join(lines).encode() == content and lines[1] == f"{long}\n"


def test_objects_without_a_key_in_common_are_refused(tmp_path) -> None:
    path = tmp_path / "keys.jsonl"
    path.write_text("".join(json.dumps({f"k{n}": "a", f"l{n}": "b"}) + "\n" for n in range(20_000)))
    with pytest.raises(DataError, match="share hardly any key"):
        read_table(path)


@pytest.mark.parametrize("rows", [0, 1, 9_999, 10_000, 10_001, 25_000])
def test_pieces_are_the_column(rows) -> None:
    column = [f"row {n}" for n in range(rows)]
    assert [value for part in pieces(column) for value in part] == column


def test_the_hash_of_rows_is_that_of_earlier_versions() -> None:
    from bert_glue.data.sources import TaskData
    from bert_glue.data.splits import Split
    from bert_glue.results.provenance import data_hashes
    from bert_glue.tasks import own_task

    texts, labels = [f"row {n}" for n in range(10_003)], [0, 1]
    split = Split("train", (texts, texts[::-1]), labels, "")
    digest = hashlib.sha256("\0".join(texts).encode())
    digest.update("\0".join(texts[::-1]).encode())
    digest.update(repr(labels).encode())
    data = TaskData(own_task("own", ("a", "b"), ("x", "y")), {"train": split}, "")
    assert data_hashes(data) == {"train": digest.hexdigest()}
