"""Broken data files of every format: refused with file and line and exit code 3, or read; never a traceback."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from fuzzing import EXAMPLES, hypothesis_test
from hypothesis import strategies as st
from tiny_run import make_model

from bert_glue.config.arguments import Arguments
from bert_glue.data.sources import load_task_data
from bert_glue.data.tokenization import TextTokenizer
from bert_glue.errors import DataError

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["a dog runs", "NA", "null", "nan", "", " ", '"', '""', '"open', "a\tb", "a\nb", "a\r\nb", "a,b",
                     "\u2028", "\x00", "\ufeff", "\ud800", "\u4f60\u597d", "'", "\\", "x" * 140_000]),
)  # fmt: skip
LABELS = st.one_of(
    st.sampled_from(["0", "1", "yes", "no", "2", "-1", "", "0.5", "inf", "nan", "1e999", "equivalent"]),
    st.text(max_size=5),
)
VALUES = st.one_of(
    TEXTS,
    LABELS,
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats(),
    st.lists(st.integers(0, 2), max_size=2),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=1),
)
NAMES = st.sampled_from(
    ["sentence1", "sentence2", "label", "sentence", "idx", "", "sentence1", "question1", "\ufefflabel"]
)
HEADS = st.one_of(
    st.just(["sentence1", "sentence2", "label"]), st.just(["sentence", "label"]), st.lists(NAMES, max_size=4)
)
ENCODINGS = st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "gbk", "latin-1", "utf-32"])
ENDS = st.sampled_from(["\n", "\r\n", "\r", "\n\n"])


@st.composite
def _rows(draw, cells) -> tuple[list[str], list[list]]:
    """A header and rows, most of them as wide as it; a third is sound, so that damage alone makes it broken."""
    if draw(st.integers(0, 2)) == 0:
        label = st.sampled_from(["equivalent", "not_equivalent"])
        sound = st.tuples(st.just("a dog runs"), st.sampled_from(["NA", 'a "cat', "\u4f60"]), label).map(list)
        rows = draw(st.lists(sound, max_size=4))
        return ["sentence1", "sentence2", "label"], [["a", "b", "equivalent"], ["a", "c", "not_equivalent"], *rows]
    head = draw(HEADS)
    wide = st.lists(cells, min_size=len(head), max_size=len(head))
    ragged = st.lists(cells, max_size=5)
    return head, draw(st.lists(st.one_of(wide, wide, wide, ragged), max_size=6))


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if set(cell) & set('",\n\r') else cell


@st.composite
def _separated(draw, separator: str) -> bytes:
    head, rows = draw(_rows(st.one_of(TEXTS, LABELS)))
    quote = _quoted if draw(st.booleans()) else str
    end = draw(ENDS)
    text = end.join(separator.join(map(quote, row)) for row in [head, *rows]) + draw(st.sampled_from(["", end]))
    return text.encode(draw(ENCODINGS), "ignore")


@st.composite
def _glue(draw) -> bytes:
    rows = draw(st.lists(st.lists(st.one_of(TEXTS, LABELS), min_size=4, max_size=6), max_size=5))
    head = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    return draw(ENDS).join("\t".join(row) for row in [head, *rows]).encode(draw(ENCODINGS), "ignore")


@st.composite
def _json(draw) -> bytes:
    head, rows = draw(_rows(VALUES))
    objects = [draw(st.sampled_from([dict(zip(head, row, strict=False)), row])) for row in rows]
    form = draw(st.sampled_from(["lines", "list", "data", "value"]))
    if form == "lines":
        text = draw(ENDS).join(json.dumps(o) for o in objects)
    else:
        value = {"list": objects, "data": {"data": objects}, "value": draw(VALUES)}[form]
        text = json.dumps(value, indent=draw(st.sampled_from([None, 1])))
    if draw(st.integers(0, 9)) == 0:
        text = text.replace("\\u", "\\x")
    return text.encode(draw(ENCODINGS), "ignore")


# What stands under the metadata key `huggingface`, where `datasets` keeps the names of classes.
CARDS = st.sampled_from([
    None, b"{", b"[1]", b"\xff", b'{"info": null}', b'{"info": {"features": []}}',
    b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": 3}}}}',
    b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["yes", "no"]}}}}',
])  # fmt: skip


@st.composite
def _parquet(draw) -> bytes:
    head, rows = draw(_rows(st.one_of(TEXTS.filter(lambda text: text != "\ud800"), st.none())))
    rows = [row for row in rows if len(row) == len(head)]
    columns = []
    for at in range(len(head)):
        values = [row[at] for row in rows]
        kinds = {
            "text": values,
            "number": [None if v is None else len(v) / 2 for v in values],
            "list": [[v] for v in values],
            "bytes": [None if v is None else v.encode("utf-8", "replace") + b"\xff" for v in values],
        }
        columns.append(pyarrow.array(kinds[draw(st.sampled_from(list(kinds)))]))
    card, out = draw(CARDS), io.BytesIO()
    fields = [(name, column.type) for name, column in zip(head, columns, strict=True)]
    schema = pyarrow.schema(fields, metadata=None if card is None else {b"huggingface": card})
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, schema=schema), out)
    return out.getvalue()


@st.composite
def _damaged(draw, content) -> bytes:
    """The file, or the file with a few bytes changed, cut off, doubled or put in."""
    data = bytearray(draw(content))
    for _ in range(draw(st.sampled_from([0, 0, 1, 3]))):
        at = draw(st.integers(0, len(data)))
        what = draw(st.sampled_from(["cut", "byte", "insert", "nul", "bom"]))
        if what == "cut":
            del data[at:]
        elif what == "byte" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        else:
            data[at:at] = {"nul": b"\0", "bom": codecs.BOM_UTF16_LE}.get(what, draw(st.binary(max_size=4)))
    return bytes(data)


FORMATS = {
    "csv": _separated(","),
    "tsv": _separated("\t"),
    "json": _json(),
    "jsonl": _json(),
    "parquet": _parquet(),
}
# Messages about a whole file or column: there is no line to name.
WHOLE = re.compile(
    r"is empty|has no rows|cannot be read as parquet|cannot be read: |no column looks like text|all labels are"
    r"|no labels|column name more than once|no column |do not match|class names|is not UTF-8|the text may be"
    r"|--drop_rows|lone CR|as pandas writes|several lists of rows|--problem_type"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    return TextTokenizer(make_model(tmp_path_factory.mktemp("model")))


def read(path: Path, tokenizer: TextTokenizer, task: str | None) -> str:
    """What became of a file: read, or the kind of refusal."""
    flags = {"task_name": task, "validation_file": str(path), "do_eval": True}
    try:
        data = load_task_data(Arguments(**flags), frozenset({"evaluation"}))
    except DataError as error:
        assert error.exit_code == 3
        lines = str(error).splitlines()
        assert all(str(path) in line or line.startswith("...") for line in lines[:1]), error
        assert re.search(rf"{re.escape(str(path))}(:\d+| row \d+)", str(error)) or WHOLE.search(str(error)), error
        return "named with a line" if re.search(r":\d+:| row \d+", lines[0]) else "named"
    for split in data.splits.values():
        assert len(tokenizer.encode(split, 32)) == len(split)
    return "read"


@EXAMPLES
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_broken_file_is_named_or_read(tmp_path, report, tokenizer, suffix, examples):
    """200 files of each of five formats are the thousand; each is read as own data and as MRPC."""
    found: Counter = Counter()

    @hypothesis_test(examples, _damaged(FORMATS[suffix]))
    def _(content: bytes) -> None:
        path = tmp_path / f"rows.{suffix}"
        path.write_bytes(content)
        found.update([read(path, tokenizer, None), read(path, tokenizer, "mrpc")])

    assert found["named with a line"] and found.total() >= 2 * examples
    report(f"{found.total() // 2} {suffix} files, each as own data and as mrpc: {dict(found)}")


@EXAMPLES
def test_a_broken_glue_folder_is_named_or_read(tmp_path, report, examples):
    """GLUE's own TSV files, which are not quoted and have columns of their own."""
    found: Counter = Counter()

    @hypothesis_test(examples, _damaged(_glue()))
    def _(content: bytes) -> None:
        folder = tmp_path / "MRPC"
        folder.mkdir(exist_ok=True)
        (folder / "dev.tsv").write_bytes(content)
        flags = {"task_name": "mrpc", "data_path": str(tmp_path), "do_eval": True}
        try:
            load_task_data(Arguments(**flags), frozenset({"evaluation"}))
            found["read"] += 1
        except DataError as error:
            assert error.exit_code == 3 and str(tmp_path) in str(error)
            found["named with a line" if re.search(r"dev\.tsv:\d+", str(error)) else "named"] += 1

    assert found["named with a line"]
    report(f"{found.total()} GLUE folders: {dict(found)}")
