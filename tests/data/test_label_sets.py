"""Several labels per row in the forms of users' tables: recognised, set by a flag, or refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from bert_glue.config.arguments import Arguments
from bert_glue.config.parser import parse
from bert_glue.data.own.label_sets import join_labels, part_labels
from bert_glue.data.sources import TaskData, load_task_data
from bert_glue.data.splits import Split, parted
from bert_glue.errors import DataError, UsageError
from bert_glue.tasks import own_task

NEEDED = frozenset({"train", "evaluation"})
TEXTS = [f"the {animal} of {place} {verb}" for animal in ("dog", "cat", "owl") for place in ("Rome", "Oslo")
         for verb in ("runs", "sleeps", "sings")]  # fmt: skip
SETS = [["sport"], ["art", "sport"], [], ["news"], ["news", "art"], ["sport", "news", "art"]] * 3
CLASSES = ("art", "news", "sport")


def jsonl(path: Path, labels: list, name: str = "label") -> str:
    path.write_text("".join(json.dumps({"text": t, name: v}) + "\n" for t, v in zip(TEXTS, labels, strict=False)))
    return str(path)


def table(path: Path, columns: dict[str, list]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return str(path)


def load(train: str, needed: frozenset = frozenset({"train"}), finished=None, **flags) -> TaskData:
    return load_task_data(Arguments(train_file=train, **flags), needed, finished)


def names_of(data: TaskData, split: str = "train") -> list[list[str]]:
    return [sorted(data.task.labels[at] for at in ids) for ids in data.splits[split].labels]


def test_lists_are_several_labels_and_an_empty_one_is_none(tmp_path):
    data = load(jsonl(tmp_path / "a.jsonl", SETS))
    assert data.task.is_multi_label and data.task.labels == CLASSES and data.task.headline == "f1_micro"
    assert names_of(data) == [sorted(labels) for labels in SETS]
    assert any("multi_label_classification" in line and "--problem_type" in line for line in data.warnings)
    assert any("3 of 18 rows have none of the classes" in line for line in data.warnings)


def test_parquet_lists_with_the_names_of_a_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = ["joy", "anger", "fear", "never"]
    features = datasets.Features(
        {"text": datasets.Value("string"), "labels": datasets.List(datasets.ClassLabel(names=names))}
    )
    labels = [[0, 2], [], [1]] * 6
    made = datasets.Dataset.from_dict({"text": TEXTS, "labels": labels}, features=features)
    made.to_parquet(str(tmp_path / "a.parquet"))
    data = load(str(tmp_path / "a.parquet"))
    assert data.task.labels == tuple(names) and data.splits["train"].labels == [tuple(ids) for ids in labels]
    assert any("no row has 'never'" in line for line in data.warnings)
    named = load(str(tmp_path / "a.parquet"), label_map="joy=happy,anger=cross")
    assert named.task.labels == ("happy", "cross", "fear", "never")


@pytest.mark.parametrize("delimiter", [";", " | ", "\\t", ","])
def test_texts_are_parted_by_the_delimiter_that_is_named(tmp_path, delimiter):
    joined = [delimiter.replace("\\t", "\t").join(labels) for labels in SETS]
    path = table(tmp_path / "a.csv", {"text": TEXTS, "label": joined})
    data = load(path, label_delimiter=delimiter)
    assert data.task.labels == CLASSES and names_of(data) == [sorted(labels) for labels in SETS]
    assert data.task.label_delimiter == delimiter.replace("\\t", "\t")


@pytest.mark.parametrize("delimiter", [";", "|", ","])
def test_texts_that_look_joined_are_refused_until_a_flag_says_what_they_are(tmp_path, delimiter):
    path = table(tmp_path / "a.csv", {"text": TEXTS, "label": [delimiter.join(labels) or "none" for labels in SETS]})
    with pytest.raises(DataError, match="--label_delimiter .*--problem_type single_label_classification"):
        load(path)
    single = load(path, problem_type="single_label_classification").task
    assert not single.is_multi_label and len(single.labels) == 6


def test_names_with_a_comma_and_decimal_commas_are_not_taken_for_several(tmp_path):
    names = ["Toys, Games", "Books, Music", "Garden"] * 6
    assert load(table(tmp_path / "a.csv", {"text": TEXTS, "label": names})).task.num_labels == 3
    with pytest.raises(DataError, match="has a comma. Write numbers with a decimal point"):
        load(table(tmp_path / "b.csv", {"text": TEXTS, "label": ["1,5", "2,0", "1,0", "2,5", "5,0", "0,5"] * 3}))


def test_a_column_a_class(tmp_path):
    columns = {
        "id": list(range(18)), "comment": TEXTS, "toxic": [0, 1] * 9, "threat": ["0", "0", "1"] * 6,
        "insult": [0] * 18, "obscene": ["False", "True", "True"] * 6,
    }  # fmt: skip
    path = table(tmp_path / "a.csv", columns)
    with pytest.raises(DataError, match="one column of 0 and 1 per class: toxic,threat,insult,obscene"):
        load(path)
    data = load(path, label_column_name="toxic,threat,obscene,insult")
    assert data.task.labels == ("toxic", "threat", "obscene", "insult"), "in the order given"
    assert data.task.columns == ("comment",)
    assert names_of(data)[:3] == [[], ["obscene", "toxic"], ["obscene", "threat"]]
    assert any("no row has 'insult'" in line for line in data.warnings)


@pytest.mark.parametrize("wrong", [-1, "", "maybe", 0.5])
def test_a_cell_that_is_neither_0_nor_1_is_refused_or_dropped(tmp_path, wrong):
    path = table(tmp_path / "a.csv", {"text": TEXTS, "a": [wrong, *[0, 1] * 8, 1], "b": [wrong, *[1, 0, 0] * 5, 1, 1]})
    with pytest.raises(DataError, match=rf"a.csv:2: column 'a' is .*--drop_rows \"a={wrong}\""):
        load(path, label_column_name="a,b")
    assert len(load(path, label_column_name="a,b", drop_rows=f"a={wrong}").splits["train"]) == 17


def test_vectors_of_0_and_1_are_positions(tmp_path):
    vectors = [[float(name in labels) for name in CLASSES] for labels in SETS]
    data = load(jsonl(tmp_path / "a.jsonl", vectors, "labels"), label_map="0=art,1=news,2=sport")
    assert data.task.labels == CLASSES and names_of(data) == [sorted(labels) for labels in SETS]
    assert load(jsonl(tmp_path / "a.jsonl", vectors, "labels")).task.labels == ("0", "1", "2")


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_lists_written_as_text_need_a_flag(tmp_path, write):
    path = table(tmp_path / "a.csv", {"text": TEXTS, "label": [write(labels) for labels in SETS]})
    with pytest.raises(DataError, match="looks like a list: --problem_type multi_label_classification"):
        load(path)
    data = load(path, problem_type="multi_label_classification")
    assert names_of(data) == [sorted(labels) for labels in SETS]


def test_lists_of_one_stay_one_label_unless_a_flag_or_an_empty_list_says_otherwise(tmp_path):
    ones = [[["yes"], ["no"], ["perhaps"]][n % 3] for n in range(18)]
    data = load(jsonl(tmp_path / "a.jsonl", ones))
    assert not data.task.is_multi_label and any("--problem_type multi_label" in line for line in data.warnings)
    assert load(jsonl(tmp_path / "a.jsonl", ones), problem_type="multi_label_classification").task.is_multi_label
    path = jsonl(tmp_path / "b.jsonl", [[], *ones[1:]])
    with pytest.raises(DataError, match="1 of 18 are empty"):
        load(path)
    assert load(path, problem_type="multi_label_classification").splits["train"].labels[0] == ()
    single = load(path, problem_type="single_label_classification", drop_rows="label=")
    assert not single.task.is_multi_label and len(single.splits["train"]) == 17


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([["a", "b"], None, ["a"]], "a.jsonl:2: no label"),
        ([["a", "b"], ["a", {"x": 1}]], "a.jsonl:2: label .* is an object: a name is needed"),
        ([["a", "b"], "a;b"], "a.jsonl:2: label 'a;b' may hold several labels.*--label_delimiter"),
        ([["a", "b"], ["b", "a"]], "all labels are"),
        ([["a", "b"], ["a", None]], "in a list cannot be a class"),
    ],
)
def test_what_is_no_set_of_labels_is_refused(tmp_path, labels, said):
    with pytest.raises(DataError, match=said):
        load(jsonl(tmp_path / "a.jsonl", labels))


def finished(**changes):
    return replace(own_task("own", ("text",), CLASSES, is_multi_label=True), **changes)


def test_a_finished_model_says_the_classes_and_both_lists_are_shown(tmp_path):
    only, path = frozenset({"evaluation"}), jsonl(tmp_path / "a.jsonl", [["Sport"], ["news", "art"], []])
    data = load(None, only, finished(), validation_file=path)
    assert names_of(data, "validation") == [["sport"], ["art", "news"], []] and data.task.labels == CLASSES
    path = jsonl(tmp_path / "b.jsonl", [["sport", "weather"], ["news"]])
    with pytest.raises(
        DataError, match="b.jsonl:1: label 'weather' is not a class of the model.*'art'.*labels of the file"
    ):
        load(None, only, finished(), validation_file=path)


def test_a_finished_model_finds_its_classes_as_columns_or_as_texts(tmp_path):
    only = frozenset({"evaluation"})
    columns = {"text": TEXTS, **{name: [int(name in labels) for labels in SETS] for name in CLASSES}, "other": [1] * 18}
    data = load(None, only, finished(), validation_file=table(tmp_path / "a.csv", columns))
    assert names_of(data, "validation") == [sorted(labels) for labels in SETS]
    path = table(tmp_path / "b.csv", {"text": TEXTS, "label": ["+".join(labels) for labels in SETS]})
    data = load(None, only, finished(label_delimiter="+"), validation_file=path)
    assert names_of(data, "validation") == [sorted(labels) for labels in SETS]
    words = table(tmp_path / "c.csv", {"text": TEXTS[:3], "label": ["art", "sport", ""]})
    assert names_of(load(None, only, finished(), validation_file=words), "validation") == [["art"], ["sport"], []]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"problem_type": "regression"}, "problem_type multi_label_classification, but the flags ask for regression"),
        ({"problem_type": "single_label_classification"}, "ask for single_label_classification"),
        ({"do_regression": True}, "ask for regression"),
    ],
)
def test_a_finished_model_and_a_flag_that_contradicts_it(tmp_path, flags, said):
    path = jsonl(tmp_path / "a.jsonl", SETS)
    with pytest.raises(UsageError, match=said):
        load(None, frozenset({"evaluation"}), finished(), validation_file=path, **flags)
    single = own_task("own", ("text",), CLASSES)
    with pytest.raises(UsageError, match="the model has problem_type single_label_classification"):
        load(None, frozenset({"evaluation"}), single, validation_file=path, label_delimiter=";")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--task_name sst2 --label_delimiter ;", "sst2 has one"),
        ("--task_name sst2 --problem_type multi_label_classification", "sst2 is single_label_classification"),
        ("--train_file a.csv --problem_type multi_label_classification --do_regression", "contradicts --do_regression"),
        ("--train_file a.csv --problem_type regression --label_delimiter ;", "--problem_type regression for one"),
        ("--train_file a.csv --do_regression --label_threshold 0.4", "--do_regression for a score"),
        ("--train_file a.csv --label_threshold 1", "label_threshold"),
        ("--train_file a.csv --problem_type several", "Choices|choices"),
    ],
)
def test_flags_that_contradict_each_other_are_a_usage_error(flags, said):
    with pytest.raises(UsageError, match=said):
        parse(f"--model_name_or_path m --output_dir o --do_train {flags}".split())


@pytest.mark.parametrize("delimiter", [";", "::", "|", ", "])
@pytest.mark.parametrize(
    "labels", [["a", "b"], [], ["a;b", "c"], ["back\\slash"], ["x\\;y", "::", "a::b"], ["Toys, Games", "|"], ["\\"]]
)
def test_joined_labels_can_be_parted_again(labels, delimiter):
    assert part_labels(join_labels(labels, delimiter), delimiter) == labels


def test_what_users_write_between_delimiters():
    assert part_labels(" a ; b;;c;", ";") == ["a", "b", "c"] and part_labels("C:\\x;b", ";") == ["C:\\x", "b"]


@pytest.mark.parametrize("percentage", [10, 25, 50])
def test_each_class_has_its_share_in_the_rows_held_out(percentage):
    import numpy as np

    draw = np.random.default_rng(0)
    labels = [tuple(np.flatnonzero(draw.random(4) < [0.5, 0.3, 0.1, 0.03]).tolist()) for _ in range(1000)]
    split = Split("train", (["a"] * 1000,), labels, "FILE")
    train, held = parted(split, percentage, 3)
    assert sorted(train + held) == list(range(1000)) and abs(len(held) - 10 * percentage) <= 2
    for number in range(4):
        whole = sum(number in ids for ids in labels)
        share = sum(number in labels[row] for row in held)
        assert abs(share - whole * percentage / 100) <= max(2, 0.25 * whole * percentage / 100), number
    assert parted(split, percentage, 3)[1] == held != parted(split, percentage, 4)[1]


def test_texts_among_lists_are_one_label(tmp_path):
    labels = [["a", "b"] if n % 3 else "c" for n in range(18)]
    assert names_of(load(jsonl(tmp_path / "a.jsonl", labels)))[:2] == [["c"], ["a", "b"]]


@pytest.mark.parametrize("labels", [[[0.2, 0.8], [0.9, 0.1]], [[1.0, 0.5], [0.0, 1.0]]])
def test_probabilities_are_no_names(tmp_path, labels):
    with pytest.raises(DataError, match="a.jsonl:1: label 0.[25] in a list has a fraction"):
        load(jsonl(tmp_path / "a.jsonl", labels * 9))


def test_digits_with_spaces_between_are_not_names(tmp_path):
    vectors = table(tmp_path / "a.csv", {"text": TEXTS, "label": ["0 1 0", "1 1 0", "0 0 0"] * 6})
    ids = table(tmp_path / "b.csv", {"text": TEXTS, "label": ["3 17", "17", "3", "4 3", "4 17 3", "4"] * 3})
    for path in (vectors, ids):
        with pytest.raises(DataError, match='--label_delimiter " "'):
            load(path)
    assert load(vectors, label_delimiter=" ").splits["train"].labels[:3] == [(1,), (0, 1), ()]
    assert load(ids, label_delimiter=" ").task.labels == ("3", "4", "17")
    names = table(
        tmp_path / "c.csv", {"text": TEXTS, "label": ["very good", "good", "very bad", "bad"] * 4 + ["bad"] * 2}
    )
    assert load(names).task.num_labels == 4


def test_columns_are_named_with_commas_or_spaces(tmp_path):
    for words in (["toxic,threat"], ["toxic", "threat"], ["toxic, threat"]):
        line = ["--model_name_or_path", "m", "--output_dir", "o", "--do_train", "--train_file", "a.csv"]
        path = table(tmp_path / "a.csv", {"text": TEXTS, "toxic": [0, 1] * 9, "threat": [1, 0, 1] * 6})
        args = replace(parse([*line, "--label_column_name", *words]), train_file=path)
        assert load_task_data(args, frozenset({"train"})).task.labels == ("toxic", "threat")
