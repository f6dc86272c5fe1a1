"""Tables as annotation tools export them: read as they are meant, or refused with the way out."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from bert_glue.config.parser import parse
from bert_glue.data.sources import TaskData, load_task_data
from bert_glue.errors import DataError

TEXTS = [f"{who} {what} of the long day in town" for what in ("loved", "hated") for who in ("she", "he", "they", "we")]
ROWS = [(text, "neg" if "hated" in text else "pos") for text in TEXTS]
SEVERAL = "multi_label_classification"


def load(file: Path, *flags: str) -> TaskData:
    words = ["--model_name_or_path", "m", "--do_train", "--output_dir", "o", "--train_file", str(file), *flags]
    return load_task_data(parse(words), frozenset({"train"}))


def refusal(file: Path, *flags: str) -> str:
    with pytest.raises(DataError) as error:
        load(file, *flags)
    return str(error.value)


def lines(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def table(file: Path, header: list[str], rows: list[list]) -> Path:
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([header, *rows])
    return file


def test_several_choices_of_label_studio_are_lists(tmp_path: Path) -> None:
    rows = [[at, text, json.dumps({"choices": [label, "long"]})] for at, (text, label) in enumerate(ROWS)]
    file = table(tmp_path / "a.csv", ["id", "text", "label"], rows)
    assert f"looks like a list: --problem_type {SEVERAL} reads its labels" in refusal(file)
    found = load(file, "--problem_type", SEVERAL)
    assert found.task.labels == ("long", "neg", "pos") and found.splits["train"].labels[:5:4] == [(0, 2), (0, 1)]
    whole = load(file, "--problem_type", "single_label_classification")
    assert whole.task.labels[0] == '{"choices": ["neg", "long"]}'


@pytest.mark.parametrize(
    ("row", "column", "says"),
    [
        (lambda text, label: {"doc": {"text": text}, "meta": {"label": label}}, None, "'doc', 'meta': objects"),
        (lambda text, label: {"data": {"text": text}, "annotations": [{"result": label}]}, None,
         "'data', 'annotations': objects, whose fields must become columns of their own (pandas.json_normalize)"),
        (lambda text, label: {"fields": {"text": text}, "label": label}, None, "no column looks like text"),
        (lambda text, label: {"text": text, "cats": {"pos": label == "pos"}}, "cats", "is an object: a name is needed"),
        (lambda text, label: {"text": text, "label": {"value": label}}, None, "is an object: a name is needed"),
        (lambda text, label: {"text": text, "spans": [{"label": label}]}, "spans", "is an object: a name is needed"),
        (lambda text, label: {"text": text, "label": [[label]]}, None, "is a list in a list: a name is needed"),
        (lambda text, label: [text, label], None, "each line is a list; one object a row is needed"),
    ],
)  # fmt: skip
def test_nested_rows_say_what_is_needed(tmp_path: Path, row, column: str | None, says: str) -> None:
    file = lines(tmp_path / "a.jsonl", [row(*one) for one in ROWS])
    text = refusal(file, *(["--label_column_name", column] if column else []))
    assert says in text and "has 2 different values" not in text


@pytest.mark.parametrize("name", ["label.responses.status", "status", "review"])
def test_rejected_rows_are_told_in_lists_too(tmp_path: Path, name: str) -> None:
    states = ["discarded", *["submitted"] * (len(ROWS) - 1)]
    rows = [{"text": t, "label": label, name: [state]} for (t, label), state in zip(ROWS, states, strict=True)]
    file = lines(tmp_path / "a.jsonl", rows)
    assert f"column '{name}' is 'discarded' in 1 of 8 rows; --drop_rows \"{name}=discarded\"" in refusal(file)
    assert len(load(file, "--drop_rows", f"{name}=discarded").splits["train"]) == 7


def test_binary_answers_of_prodigy_may_be_the_label(tmp_path: Path) -> None:
    answers = {"pos": "accept", "neg": "reject"}
    file = lines(tmp_path / "a.jsonl", [{"text": t, "label": "GOOD", "answer": answers[one]} for t, one in ROWS])
    flags = "--label_column_name answer --drop_rows nothing"
    assert refusal(file).endswith(f"; if it is the label: {flags}")
    assert load(file, *flags.split()).task.labels == ("accept", "reject")


def test_labels_that_identify_rows_are_told(tmp_path: Path) -> None:
    rows = [[f"{text} {at}", f"r{at}"] for at, (text, _) in enumerate(ROWS * 4)]
    found = load(table(tmp_path / "a.csv", ["text", "label"], rows))
    assert any("32 classes for 32 rows, most with one row" in line for line in found.warnings)
    rows = [[f"{text} {at}", f"r{at % 3}"] for at, (text, _) in enumerate(ROWS * 4)]
    assert not any(
        "most with one row" in one for one in load(table(tmp_path / "b.csv", ["text", "label"], rows)).warnings
    )


def test_every_other_encoding_has_its_name(tmp_path: Path) -> None:
    text = "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)
    for encoding, says in (("utf-16", "is UTF-16"), ("utf-32", "is UTF-32"), ("utf-16-le", "NUL byte")):
        (tmp_path / "a.csv").write_bytes(text.encode(encoding))
        assert says in refusal(tmp_path / "a.csv") and "UTF-8" in refusal(tmp_path / "a.csv")


@pytest.mark.parametrize("blank", ["", " ", "\u00a0\t"])
def test_rows_with_an_empty_text_are_counted(tmp_path: Path, blank: str) -> None:
    rows = [[text if at % 4 else blank, label] for at, (text, label) in enumerate(ROWS)]
    file = table(tmp_path / "a.csv", ["text", "label"], rows)
    assert f"{file}: 2 of 8 rows have an empty text" in load(file).warnings
    whole = load(table(tmp_path / "b.csv", ["text", "label"], [list(row) for row in ROWS]))
    assert not any("empty text" in line for line in whole.warnings)
