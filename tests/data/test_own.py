"""Columns and classes of own data: recognised, set by a flag, or refused."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest

from bert_glue.config.arguments import Arguments
from bert_glue.config.parser import parse
from bert_glue.data.own.classes import LabelFlags, as_number, classes_of, labelled_rows
from bert_glue.data.own.columns import ColumnFlags, check_quoting, choose_columns
from bert_glue.data.own.vocabulary import ClassVocabulary
from bert_glue.data.sources import load_task_data
from bert_glue.data.splits import Split, parted
from bert_glue.data.tables import Table
from bert_glue.errors import DataError, UsageError
from bert_glue.tasks import own_task

PAGE = Path(__file__).parents[2] / "docs" / "own-data.md"
TEXTS = [f"the {animal} of {place} {verb}" for animal in ["dog", "cat", "owl"] for place in ["Rome", "Oslo"]
         for verb in ["runs", "sleeps", "sings"]]  # fmt: skip
N = len(TEXTS)
TWO = [["no", "yes"][i % 2] for i in range(N)]


def table(**columns):
    return Table("FILE", columns, range(2, 2 + len(next(iter(columns.values())))))


def chosen(columns, **flags):
    return choose_columns(table(**columns), ColumnFlags(**flags), True)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ([f"T-{7919 * i}" for i in range(N)], "identifiers"),
        ([str(i) for i in range(N)], "numbers"),
        ([["bad film", "good film"][i % 2] for i in range(N)], "one value for each label"),
        (["web"] * N, "single words"),
        ([["from the web", "by mail", "on paper"][i % 3] for i in range(N)], "few different values"),
        ([""] * N, "empty"),
        ([[]] * N, "empty"),
        ([{"a": 1}] * N, "lists or objects"),
    ],
)
def test_what_is_no_text_is_left_out_and_named(other, why):
    found = chosen({"zz": other, "body": TEXTS, "Label": TWO})
    assert found.texts == ("body",) and found.label == "Label" and found.left_out == {"zz": why}
    lines = list(found.lines(table(zz=other, body=TEXTS, Label=TWO)))
    assert f"left out: 'zz' ({why})" in lines[0] and len(lines) == 4


def test_two_texts_are_not_a_pair_unless_their_names_say_so():
    with pytest.raises(DataError, match="the text may be 'title' or 'body'.*--text_column_names"):
        chosen({"title": TEXTS, "body": TEXTS[::-1], "label": TWO})
    pair = {"premise": TEXTS, "hypothesis": TEXTS[::-1], "premise_parse": TEXTS, "label": TWO}
    assert chosen(pair).texts == ("premise", "hypothesis")
    with pytest.raises(DataError, match="note"):
        chosen({**pair, "note": TEXTS})
    assert chosen({"title": TEXTS, "body": TEXTS, "label": TWO}, texts=("body",)).left_out == {"title": "not named"}


def test_a_name_that_is_not_there_and_a_file_without_names():
    with pytest.raises(DataError, match="--text_column_names Body: no column 'Body'.*did you mean 'body'"):
        chosen({"body": TEXTS, "label": TWO}, texts=("Body",))
    with pytest.raises(DataError, match="no column 'label'.*'mood' has 2 different values"):
        chosen({"body": TEXTS, "mood": TWO})
    with pytest.raises(DataError, match="the first line looks like a row"):
        chosen({"1": TWO, "a film that is not very good": TEXTS})


@pytest.mark.parametrize("names", [("1_1", "1_2"), ("inf", "other"), ("nan", "x"), ("1e3", "2b4"), ("infinity", "1_0")])
def test_names_that_float_reads_stay_names(names):
    labels = [names[i % 3 > 0] for i in range(N)]
    assert classes_of(table(label=labels), "label", LabelFlags({}))[0] == tuple(sorted(names))


def test_whole_numbers_written_as_fractions_need_a_flag():
    data = table(label=["1.0", "2.0"] * 4)
    with pytest.raises(DataError, match="FILE:2: .*'1.0'.*--do_regression"):
        classes_of(data, "label", LabelFlags({}))
    assert classes_of(data, "label", LabelFlags({}, is_regression=True))[0] == ()
    assert classes_of(data, "label", LabelFlags({}, is_regression=False))[0] == ("1.0", "2.0")
    with pytest.raises(DataError, match="has a comma. Write numbers with a decimal point"):
        classes_of(table(label=["1,5", "2,5"]), "label", LabelFlags({}))


def test_classes_that_look_the_same_are_told():
    _, notes = classes_of(table(label=["pos", "pos ", "Neg", "neg"]), "label", LabelFlags({}))
    assert len(notes) == 2 and "'pos' (1 rows) and 'pos ' (1 rows)" in "".join(notes)
    flags = LabelFlags.of(Arguments(label_map="pos =pos,Neg=neg"))
    assert labelled_rows(table(label=["pos ", "Neg", "neg"]), "label", flags)[0].columns["label"] == [
        "pos",
        "neg",
        "neg",
    ]


@pytest.mark.parametrize(
    ("columns", "flag", "rows"),
    [
        ({"label": ["-", "neutral", "contradiction"]}, "label=-", 2),
        ({"label": ["a", "b", "c"], "answer": ["accept", "reject", "ignore"]}, "answer=ignore,answer=reject", 1),
        ({"label": ["a", "b", "c"], "was_cancelled": [False, True, False]}, "was_cancelled=true", 2),
        ({"label": ["a", "b", "c"], "status": ["submitted", "discarded", "submitted"]}, "status=discarded", 2),
    ],
)
def test_rows_that_count_for_nothing_are_asked_about(columns, flag, rows):
    with pytest.raises(DataError, match=re.escape(f'--drop_rows "{flag}"')):
        labelled_rows(table(**columns), "label", LabelFlags({}))
    kept, notes = labelled_rows(table(**columns), "label", LabelFlags.of(Arguments(drop_rows=flag)))
    assert len(kept) == rows and "left out" in notes[0]
    assert len(labelled_rows(table(**columns), "label", LabelFlags.of(Arguments(drop_rows="nothing")))[0]) == 3


def test_lists_of_labels():
    kept, notes = labelled_rows(table(label=[["a"], ["b"]]), "label", LabelFlags({}))
    assert kept.columns["label"] == ["a", "b"]
    with pytest.raises(DataError, match="FILE:3: the label is a list of 2"):
        labelled_rows(table(label=[["a"], ["a", "b"]]), "label", LabelFlags({}))
    with pytest.raises(UsageError, match="--drop_rows x: expected NAME=VALUE"):
        LabelFlags.of(Arguments(drop_rows="x"))


@pytest.mark.parametrize(
    ("names", "labels", "found"),
    [
        (("World", "Law"), ["law", "World"], {"law": "Law", "World": "World"}),
        (("a", "A"), ["A"], {"A": "A"}),
        (("LABEL_0", "LABEL_1"), ["1"], {"1": "LABEL_1"}),
        (("LABEL_0", "LABEL_1"), ["pos", "neg"], {"neg": "LABEL_0", "pos": "LABEL_1"}),
    ],
)
def test_labels_match_by_name(names, labels, found):
    assert ClassVocabulary(names, "the model").match(table(label=labels), "label")[0] == found


@pytest.mark.parametrize(
    ("names", "labels"),
    [(("neg", "pos"), ["neg", "0"]), (("Neg", "nEg"), ["neg"]), (("LABEL_0", "LABEL_1"), list("xyz"))],
)
def test_labels_of_no_class_show_both_lists(names, labels):
    with pytest.raises(DataError) as caught:
        ClassVocabulary(names, "the model").match(table(label=labels), "label")
    assert all(repr(name) in str(caught.value) for name in (*names, *labels)) and "--label_map" in str(caught.value)


def write(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return str(path)


@pytest.mark.parametrize(
    ("names", "labels", "example"),
    [
        (("neg", "pos"), ["pos ", "neg"], '"pos =pos"'),
        (("not_entailment", "entailment"), ["Not Entailment", "entailment"], '"Not Entailment=not_entailment"'),
        (("caf\u00e9", "th\u00e9"), ["cafe\u0301", "th\u00e9"], '"cafe\u0301=caf\u00e9"'),
        (("neg", "pos"), ["pos", "mixed"], '"mixed=CLASS"'),
        (("neg", "pos"), ["0", "1"], '"0=neg,1=pos"'),
    ],
)
def test_the_example_of_a_map_is_never_plainly_wrong(names, labels, example):
    with pytest.raises(DataError) as error:
        ClassVocabulary(names, "the model").match(table(label=labels), "label")
    assert str(error.value).endswith(f"--label_map, such as {example}")


def test_a_finished_model_says_what_the_classes_are(tmp_path):
    labelled = write(tmp_path / "a.csv", [["text", "label"], *zip(TEXTS, TWO, strict=True)])
    model = own_task("own", (), ("yes", "maybe", "no"))
    data = load_task_data(Arguments(validation_file=labelled), frozenset({"evaluation"}), model)
    assert data.task.labels == model.labels and set(data.splits["validation"].labels) == {0, 2}
    unlabelled = write(tmp_path / "b.csv", [["text", "label"], *((text, "?") for text in TEXTS)])
    data = load_task_data(Arguments(test_file=unlabelled), frozenset({"test"}), model)
    assert data.splits["test"].labels is None and data.task.labels == model.labels


@pytest.mark.parametrize("space", ["\x1c", "\x1f", "\x85", "\u3000", "\t"])
def test_a_number_between_any_spaces_is_a_number(space):
    assert as_number(f"{space}-2.5{space}") == -2.5


def test_scores_of_a_finished_regression_are_whole_numbers_too(tmp_path):
    path = write(tmp_path / "a.csv", [["text", "label"], *((text, i % 5) for i, text in enumerate(TEXTS))])
    data = load_task_data(Arguments(validation_file=path), frozenset({"evaluation"}), own_task("own", (), ()))
    assert data.task.is_regression and data.splits["validation"].labels[:3] == [0.0, 1.0, 2.0]


def test_held_out_rows_are_a_share_of_each_class():
    split = Split("train", (TEXTS * 20,), [int(i % 10 == 0) for i in range(20 * N)], "FILE")
    train, held_out = parted(split, 10, seed=3)
    assert sorted(train + held_out) == list(range(20 * N)) and len(held_out) == 2 * N
    assert sum(split.labels[row] for row in held_out) == round(0.2 * N)
    assert parted(split, 10, seed=3) == (train, held_out) != parted(split, 10, seed=4)


@pytest.mark.parametrize("text", ['"he said ""bad"""', '"""a"" is it"', '"a ""b"", c"'])
def test_a_tsv_with_the_quoting_of_csv_is_refused(text):
    quoted = Table("a.tsv", {"text": ['"plain" or not', '"whole"', text]}, range(2, 5))
    with pytest.raises(DataError, match="a.tsv:4: column 'text' is quoted as in csv"):
        check_quoting(quoted, ("text",))
    check_quoting(Table("a.csv", quoted.columns, quoted.places), ("text",))
    check_quoting(Table("a.tsv", {"text": ['"a" ""', '"a" and "b"', '""', "a"]}, range(2, 6)), ("text",))


def test_three_texts_are_joined(tmp_path):
    path = write(
        tmp_path / "a.csv", [["t", "b", "c", "stars"], *((x, "one", "two", y) for x, y in zip(TEXTS, TWO, strict=True))]
    )
    flags = {"text_column_names": "t,b,c", "label_column_name": "stars", "text_column_delimiter": r"\n"}
    data = load_task_data(Arguments(train_file=path, **flags), frozenset({"train"}))
    assert data.splits["train"].texts[0][0] == f"{TEXTS[0]}\none\ntwo"


@pytest.mark.parametrize(
    "command",
    [
        "--dataset_name amazon_reviews_multi --dataset_config_name en --shuffle_train_dataset --metric_name accuracy"
        ' --text_column_name "review_title,review_body,product_category" --text_column_delimiter "\\n"'
        " --label_column_name stars --do_train --do_eval --max_seq_length 512 --per_device_train_batch_size 32",
        "--dataset_name reuters21578 --dataset_config_name ModApte --shuffle_train_dataset --remove_splits unused"
        " --metric_name f1 --text_column_name text --label_column_name topics --do_train --do_eval",
    ],
)
def test_command_lines_of_run_classification_are_accepted(command):
    args = parse(shlex.split(f"--model_name_or_path google-bert/bert-base-uncased --output_dir out {command}"))
    assert args.text_column_names and args.label_column_name in ("stars", "topics")


def test_the_pages_three_commands_run(tmp_path, monkeypatch):
    """The page's commands as they stand, but for the model, which is a tiny one."""
    from tiny_models import write_model

    from bert_glue.pipeline.run import run
    from bert_glue.predict.__main__ import main as predict

    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    for name in ("reviews.csv", "later.csv"):
        write(tmp_path / name, [["text", "label"], *zip(TEXTS * 2, TWO * 2, strict=True)])
    write(tmp_path / "unlabelled.csv", [["text"], *([text] for text in TEXTS)])
    block = re.search(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1].replace("\\\n", " ")
    first, second, third = (shlex.split(line) for line in block.strip().splitlines())
    quick = ["--max_steps", "2", "--report_to", "none", "--disable_tqdm", "--use_cpu"]
    first[first.index("google-bert/bert-base-cased")] = "model"
    assert run(parse([*first[2:], *quick])) == 0 and run(parse([*second[2:], *quick[2:]])) == 0
    assert predict(third[3:]) == 0
    results = json.loads((tmp_path / "output" / "later" / "all_results.json").read_text())
    assert results["eval_samples"] == 2 * N and results["text_columns"] == ["text"]
    with (tmp_path / "labelled.csv").open(newline="") as file:
        assert {row["prediction"] for row in csv.DictReader(file)} <= {"no", "yes"}


@pytest.mark.parametrize(
    ("labels", "place"),
    [
        (["no", "yes", "\udfff"], "train.jsonl:3: "),
        (["\ud800", "no", "yes"], "train.jsonl:1: "),
        ([["no"], ["no", "a\ud800"], []], "train.jsonl:2: "),
    ],
)
def test_half_a_surrogate_pair_in_a_label_is_named_with_its_line(tmp_path, labels, place):
    path = tmp_path / "train.jsonl"
    rows = [json.dumps({"text": f"a film {number}", "label": label}) for number, label in enumerate(labels)]
    path.write_text("\n".join(rows))
    with pytest.raises(DataError, match="half a surrogate pair") as caught:
        load_task_data(Arguments(train_file=str(path), do_train=True), frozenset({"train"}))
    assert place in str(caught.value)


def test_half_a_surrogate_pair_in_the_metadata_is_named_with_the_file(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "train.parquet"
    names = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["no", "yes", "\ud800"]}}}}
    columns = pyarrow.table({"text": ["a film", "a book"], "label": [0, 1]})
    parquet.write_table(columns.replace_schema_metadata({"huggingface": json.dumps(names)}), path)
    with pytest.raises(DataError, match="half a surrogate pair") as caught:
        load_task_data(Arguments(train_file=str(path), do_train=True), frozenset({"train"}))
    assert str(path) in str(caught.value)
