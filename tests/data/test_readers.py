"""Every trap a data file can hold: read exactly, or refused with file:line."""

import gzip
import json
import subprocess
import sys
import time

import pytest

from bert_glue.data.readers import header_of, read_csv, read_json, read_parquet, read_table, read_tsv
from bert_glue.data.tables import SHOWN_PROBLEMS
from bert_glue.errors import DataError


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(read, path):
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.exit_code == 3
    return str(caught.value).replace(str(path), "FILE")


def test_tsv_keeps_quotes_spaces_na_and_unicode_line_separators(tmp_path):
    texts = [
        'a "quoted',
        'x"',
        "NA",
        "ends in a space ",
        "nbsp\u00a0here",
        "ls\u2028ps\u2029nel\x85ff\x0c",
        "",
        "n/a",
    ]
    path = write(tmp_path, "a.tsv", "\ufeffindex\tsentence\r\n" + "\r\n".join(f"{i}\t{t}" for i, t in enumerate(texts)))
    table = read_tsv(path)
    assert table.columns["sentence"] == texts
    assert list(table.columns) == ["index", "sentence"]
    assert table.where(2) == f"{path}:4"


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n\n"])
def test_tsv_end_of_file_makes_no_row(tmp_path, end):
    assert len(read_tsv(write(tmp_path, "a.tsv", "a\tb\n1\t2\n3\t" + end))) == 2


def test_tsv_without_header_and_with_a_selection(tmp_path):
    path = write(tmp_path, "a.tsv", "s\t1\t\tone\ns\t0\t*\ttwo\n")
    table = read_tsv(path, header=False, only={1, 3})
    assert table.columns == {1: ["1", "0"], 3: ["one", "two"]}
    assert table.where(0) == f"{path}:1"
    with pytest.raises(DataError, match="no column 'x'; columns: s, 1, , one"):
        read_tsv(path, only={"x"}).column("x")


def test_tsv_ragged_rows_are_named_and_none_is_skipped(tmp_path):
    path = write(tmp_path, "a.tsv", "a\tb\n1\t2\n1\n1\t2\t3\n\n1\t2\n")
    lines = refusal(read_tsv, path).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["FILE:3", "FILE:4", "FILE:5"]
    assert lines[0].startswith("FILE:3: 1 columns instead of 2")
    assert lines[2] == "FILE:5: the line is empty"


def test_only_the_first_problems_are_shown_and_the_rest_is_counted(tmp_path):
    lines = refusal(read_tsv, write(tmp_path, "a.tsv", "a\tb\n" + "1\n" * 12)).splitlines()
    assert len(lines) == SHOWN_PROBLEMS + 1
    assert lines[-1] == "FILE: 7 more problems like these"


def test_tsv_reads_400_000_rows_in_seconds(tmp_path):
    row = "\t".join(["123", "n/a", "n/a", "a short question of some words", "another one of that kind", "1"])
    path = write(tmp_path, "big.tsv", "a\tb\tc\td\te\tf\n" + (row + "\n") * 400_000)
    start = time.process_time()
    assert len(read_tsv(path, only={"d", "e", "f"})) == 400_000
    assert time.process_time() - start < 4  # measured: under 1 s


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "FILE: is empty"),
        (b"\xef\xbb\xbf\n", "FILE: is empty"),
        ("a,b\n1,2\n".encode("utf-16"), "FILE:1: is UTF-16; save it as UTF-8"),
        ("a,b\n1,2\n".encode("utf-32"), "FILE:1: is UTF-32; save it as UTF-8"),
        (b"\xfe\xff\0a\0,", "FILE:1: is UTF-16; save it as UTF-8"),
        (b"\0\0\xfe\xff\0\0\0a", "FILE:1: is UTF-32; save it as UTF-8"),
        (gzip.compress(b"a,b\n1,2\n", mtime=0), "FILE:1: is compressed by gzip; unpack it"),
        (b"PK\x03\x04" + bytes(30), "FILE:1: is a zip archive, as Excel's workbooks are"),
        (b"PAR1\x15\x04", "FILE:1: is parquet; let its name end in .parquet"),
        ("a,b\n1,2\n".encode("utf-16-le"), "FILE:1: has a NUL byte"),
        (b"ab\nx\0y\n", "FILE:2: has a NUL byte"),
        (b"ab\ncaf\xe9\nna\xefve\n", "FILE:2: not UTF-8 (byte 0xe9)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "FILE:1: is a Git-LFS pointer"),
    ],
)
def test_what_is_no_text_file(tmp_path, name, content, problem):
    assert problem in refusal(read_table, write(tmp_path, name, content))


def test_all_undecodable_lines_are_named(tmp_path):
    text = refusal(read_tsv, write(tmp_path, "a.tsv", b"a\n\xe9\nb\n\xff\n"))
    assert "FILE:2: not UTF-8" in text and "FILE:4: not UTF-8 (byte 0xff)" in text


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_headers(tmp_path, name):
    gap = "\t" if name.endswith("tsv") else ","
    assert "FILE: has no rows" in refusal(read_table, write(tmp_path, name, gap.join("ab") + "\n"))
    doubled = write(tmp_path, name, gap.join("aba") + "\n" + gap.join("123") + "\n")
    assert refusal(read_table, doubled) == "FILE:1: column name more than once: 'a'"


def test_missing_file_and_unknown_suffix(tmp_path):
    assert "FILE: cannot be read: No such file" in refusal(read_table, tmp_path / "none.csv")
    assert "choices: .csv, .tsv, .json, .jsonl, .parquet" in refusal(read_table, tmp_path / "a.xlsx")
    assert "cannot be read: Is a directory" in refusal(read_tsv, tmp_path)


def test_csv_quoting_and_the_line_a_row_starts_at(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\r\n"two\r\nlines, ""quoted""",1\r\nNA,0\r\n')
    table = read_csv(path)
    assert table.columns == {"text": ['two\r\nlines, "quoted"', "NA"], "label": ["1", "0"]}
    assert [table.where(0), table.where(1)] == [f"{path}:2", f"{path}:4"]


def test_csv_broken_quoting_and_ragged_rows(tmp_path):
    assert "FILE:3: broken csv in the row that starts here" in refusal(
        read_csv, write(tmp_path, "a.csv", 'a,b\n1,2\n"never closed,2\n3,4\n5,6\n')
    )
    text = refusal(read_csv, write(tmp_path, "b.csv", 'a,b\n"x\ny",2\n1,2,3\n\n4,5\n'))
    assert text.startswith("FILE:4: 3 columns instead of 2")
    assert "FILE:5: the line is empty" in text


def test_csv_lone_carriage_return_is_a_character_in_quotes_and_an_error_outside(tmp_path):
    path = write(tmp_path, "a.csv", 'a,b\n"x\ry",1\nz,2\n')
    table = read_csv(path)
    assert table.columns["a"] == ["x\ry", "z"] and table.where(1) == f"{path}:3"
    assert "FILE:2: broken csv" in refusal(read_csv, write(tmp_path, "b.csv", "a,b\nx\ry,1\n"))


def test_csv_takes_fields_of_any_length(tmp_path):
    assert len(read_csv(write(tmp_path, "a.csv", f"a,b\n{'x' * 300_000},1\n")).columns["a"][0]) == 300_000


ROWS = [{"text": "one\u2028", "label": 0}, {"text": "two", "label": 1}]


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ("\n".join(map(json.dumps, ROWS)), ":2"),
        (json.dumps(ROWS), ":1"),
        (json.dumps(ROWS, indent=1), ":6"),
        (json.dumps({"version": "1", "data": ROWS}), " row 2"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_the_forms_of_json(tmp_path, name, content, where):
    path = write(tmp_path, name, content)
    table = read_json(path)
    assert table.columns == {"text": ["one\u2028", "two"], "label": [0, 1]}
    assert table.where(1) == f"{path}{where}"


def test_json_keys_that_some_rows_lack_are_none(tmp_path):
    assert read_json(write(tmp_path, "a.jsonl", '{"a": 1}\n{"b": 2}\n')).columns == {
        "a": [1, None],
        "b": [None, 2],
    }


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"a": 1}\n{"a": \n{"a": 2}\n', "FILE:2: not JSON"),
        ('{"a": 1}\n\n{"a": 2}\n', "FILE:2: the line is empty"),
        ('{"a": 1}\n[1]\n7\n', "FILE:2: [1] is not an object\nFILE:3: 7 is not an object"),
        ('[{"a": 1},\n{"a": 2}\n{"a": 3}]', "FILE:3: not JSON that can be read: a comma or ] is missing"),
        ('[{"a": 1},\n{"a": 2},\n]', "FILE:3: not JSON"),
        ('[{"a": 1},\n{"a": 2}', "FILE:2: not JSON"),
        ('[{"a": 1}]\nmore', "FILE:1: not JSON that can be read: there is text after"),
        ('[{"a": 1},\n 5]', "FILE:2: 5 is not an object"),
        ('{"data": [{"a": 1}, 5]}', "FILE row 2: 5 is not an object"),
        ("[]", "FILE: has no rows"),
        ('{"data": []}', "FILE: has no rows"),
        ('[{"a": 1},\n{"a": 1, "a": 2}]', "FILE:2: not JSON that can be read: a key occurs more than once"),
        ("[" * 200_000, "FILE:1: not JSON that can be read"),
    ],
)
def test_broken_json(tmp_path, content, problem):
    assert problem in refusal(read_json, write(tmp_path, "a.json", content))


def test_parquet_and_its_class_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, -1]}, features=features).to_parquet(path)
    table = read_parquet(path)
    assert table.columns == {"text": ["x", "y"], "label": [1, -1]}
    assert table.class_names == {"label": ("no", "yes")}
    assert table.where(1) == f"{path} row 2"


def test_broken_parquet(tmp_path):
    assert "FILE: cannot be read as parquet" in refusal(read_parquet, write(tmp_path, "a.parquet", b"PAR1 no"))
    assert "FILE: cannot be read as parquet" in refusal(read_parquet, tmp_path / "none.parquet")


def test_header_of(tmp_path):
    assert header_of(write(tmp_path, "a.tsv", "\ufeffa\tb\r\n1\t2\r\n")) == ["a", "b"]
    assert header_of(tmp_path / "none.tsv") == []
    assert header_of(write(tmp_path, "b.tsv", b"\xff\xfea\0")) == []


# --- another layout than the suffix says: the cause, and a command that mends it --------------------------


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", "\ufeffText;Label\r\ngood;1\r\n", "FILE:1: the fields are separated by ';', not by ','"),
        ("a.csv", 'text;"the label"\n"a; b, c";1\n', "FILE:1: the fields are separated by ';'"),
        ("a.csv", "text\tlabel\ngood, really\t1\n", "FILE:1: the fields are separated by a tab"),
        ("a.csv", "text|label|id\na|1|2\n", "FILE:1: the fields are separated by '|'"),
        ("a.csv", "id;a long text, of one;label\n1;x;2\n", "FILE:1: the fields are separated by ';'"),
        ("a.tsv", "text,label\na,1\n", "FILE:1: the fields are separated by ',', not by a tab"),
        ("a.tsv", "text;label\na;1\n", "FILE:1: the fields are separated by ';', not by a tab"),
        ("a.csv", "sep=;\ntext;label\na;1\n", "FILE:1: is Excel's line about the separator"),
        ("a.csv", "sep=,\ntext,label\na,1\n", "FILE:1: is Excel's line about the separator"),
        ("a.csv", "text,label\ra,1\rb,0\r", "FILE: its lines end in a lone CR"),
        ("a.csv", '"text","label"\r"a, b","1"\r', "FILE: its lines end in a lone CR"),
        ("a.tsv", "text\tlabel\ra\t1\rb\t0", "FILE: its lines end in a lone CR"),
        ("a.jsonl", '{"a": 1}\r{"a": 2}\r', "FILE: its lines end in a lone CR"),
        ("a.csv", "text,label\na,1\rb,0\rc,1\n", "(the row has a lone CR; if lines end so, tr '\\r' '\\n' <FILE >NEW"),
        ("a.tsv", "text\tlabel\na\t1\rb\t0\n", "(the row has a lone CR; if lines end so, tr '\\r' '\\n' <FILE >NEW"),
        ("a.jsonl", '{\n "a": 1\n}\n{\n "a": 2\n}\n', "FILE:1: an object spans several lines; jq -c . <FILE"),
        ("a.json", '{"text": ["a", "b"], "label": [0, 1]}', 'to_json(FILE, orient="records", lines=True)'),
        ("a.json", '{"text": {"0": "a"}, "label": {"0": 1}}', "FILE: is one object with 'text', 'label', as pandas"),
        ("a.json", '{"columns": ["a"], "index": [0], "data": [["x"]]}', "as pandas writes columns"),
        ("a.json", '{"train": [{"a": 1}], "test": [{"a": 2}]}', "FILE: has several lists of rows: train, test"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "FILE: is a Git-LFS pointer"),
    ],
)
def test_another_layout_is_named_with_the_way_out(tmp_path, name, content, problem):
    assert problem in refusal(read_table, write(tmp_path, name, content))


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("a.csv", "text\na; b\n", {"text": ["a; b"]}),
        ("a.csv", '"note (a; b; c)",label\nx,1\n', {"note (a; b; c)": ["x"], "label": ["1"]}),
        ("a.csv", 'text,label\n"a\rb",1\n', {"text": ["a\rb"], "label": ["1"]}),
        ("a.tsv", "text\tlabel\na\rb\t1\n", {"text": ["a\rb"], "label": ["1"]}),
        ("a.tsv", "text\na, b\n", {"text": ["a, b"]}),
        ("a.json", '{"version": 1, "data": [{"a": 1}, {"a": 2}]}', {"a": [1, 2]}),
        ("a.json", '{"count": 2, "rows": [{"a": 1}, {"a": 2}], "errors": [{"b": 1}]}', {"a": [1, 2]}),
        ("a.json", '{"sentences": [{"a": 1}]}', {"a": [1]}),
        ("a.json", '[\r {"a": 1},\r {"a": 2}]\r', {"a": [1, 2]}),
        ("a.json", '{\n  "a": "x",\n  "spans": [{"start": 1}]\n}\n', {"a": ["x"], "spans": [[{"start": 1}]]}),
    ],
)
def test_what_only_looks_like_another_layout_is_read(tmp_path, name, content, columns):
    assert read_table(write(tmp_path, name, content)).columns == columns


def test_the_command_that_mends_a_separator_does(tmp_path):
    path = write(tmp_path, "a.csv", '\ufefftext;label\n"a; ""b""";1\nc, d;0\n')
    command = refusal(read_table, path).split("commas: ")[1].removeprefix("python").replace("FILE", str(path))
    subprocess.run(f"{sys.executable}{command}", shell=True, check=True, cwd=tmp_path)
    assert read_table(tmp_path / "NEW.csv").columns == {"text": ['a; "b"', "c, d"], "label": ["1", "0"]}


@pytest.mark.parametrize(
    ("name", "content", "columns", "first"),
    [
        ("a.csv", "a,b\n1,2\n3\n4,5,6\n7,8\n", {"a": ["1", "7"], "b": ["2", "8"]}, "FILE:3: 1 columns"),
        ("a.csv", 'a,b\n"x\ny",2\n\n7,8\n', {"a": ["x\ny", "7"], "b": ["2", "8"]}, "FILE:4: the line is empty"),
        ("a.tsv", "a\tb\n1\t2\n3\n4\t5\n", {"a": ["1", "4"], "b": ["2", "5"]}, "FILE:3: 1 columns"),
    ],
)
def test_broken_rows_are_left_out_when_asked_and_counted(tmp_path, name, content, columns, first):
    path = write(tmp_path, name, content)
    table = read_table(path, drop_broken=True)
    assert table.columns == columns and table.where(1) == f"{path}:{content.count(chr(10))}"
    assert f"left out; the first is {first}" in table.notes[0].replace(str(path), "FILE")
    assert refusal(read_table, path).startswith(first)


def test_broken_quoting_is_refused_all_the_same(tmp_path):
    path = write(tmp_path, "a.csv", 'a,b\n1\n"x,2\n')
    with pytest.raises(DataError, match="broken csv in the row that starts here"):
        read_table(path, drop_broken=True)
