"""One source a run, the layouts of --data_path, one's own files, and the labels of all of them."""

import json
import os
from pathlib import Path

import pytest
from glue_folder import make_glue, write

from bert_glue.config.arguments import Arguments
from bert_glue.data.own.classes import sorted_labels
from bert_glue.data.sources import Split, load_task_data
from bert_glue.data.splits import make_split
from bert_glue.data.tables import Table
from bert_glue.errors import DataError, UsageError
from bert_glue.tasks import TASKS, get_task

ALL = frozenset({"train", "evaluation", "test"})
REAL = Path(os.environ.get("GLUE_DATA_DIR", Path(__file__).parents[2] / ".." / "shared" / "glue"))


def load(needed=ALL, **flags):
    return load_task_data(Arguments(**flags), frozenset(needed))


def refusal(kind=DataError, needed=ALL, **flags):
    with pytest.raises(kind) as caught:
        load(needed, **flags)
    return str(caught.value)


def table_of(**columns):
    return Table("FILE", columns, range(2, 2 + len(next(iter(columns.values())))))


# --- one source -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        {"sample": True, "data_path": "x"},
        {"data_path": "x", "train_file": "a.csv"},
        {"dataset_name": "x", "validation_file": "a.csv"},
        {"sample": True, "dataset_name": "x"},
    ],
)
def test_several_sources_are_refused(flags):
    text = refusal(UsageError, task_name="mrpc", **flags)
    assert "give one source of data" in text and all(f"--{name}" in text for name in flags)


@pytest.mark.parametrize("flags", [{}, {"data_path": "x"}, {"sample": True}])
def test_a_task_name_is_needed(flags):
    assert "give --task_name" in refusal(UsageError, **flags)


def test_sample_is_marked_and_takes_the_companion_along():
    data = load({"evaluation", "test"}, task_name="mnli", sample=True)
    assert data.is_sample and data.source == "sample data, not GLUE"
    assert list(data.splits) == [
        "validation_matched", "validation_mismatched", "test_matched", "test_mismatched", "ax:test",
    ]  # fmt: skip
    assert data.splits["test_matched"].labels is None
    assert {split.origin for split in data.splits.values()} == {"sample data, not GLUE"}


def test_a_folder_named_like_the_task_is_not_a_source(tmp_path, monkeypatch):
    write(tmp_path / "mrpc" / "train.csv", ["sentence1", "sentence2", "label"], ["a", "b", "1"], gap=",")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bert_glue.data.hub_datasets.open_hub", lambda name, *_: (_ for _ in ()).throw(DataError(name)))
    assert refusal(task_name="mrpc") == "nyu-mll/glue"


# --- --data_path ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.predicted_with is None])
def test_glue_tsv_folder_of_every_task(tmp_path, name):
    task = get_task(name)
    make_glue(tmp_path, task)
    for folder in (tmp_path, tmp_path / task.folder):
        data = load(task_name=name, data_path=str(folder))
        assert data.source == f"GLUE TSV folder {tmp_path / task.folder}"
        assert list(data.splits) == list(task.splits)
        train = data.splits["train"]
        assert len(train) == 3 and len(train.texts) == len(task.columns)
        assert all(text.endswith(" ") for column in train.texts for text in column)
        assert train.labels in ([2.5] * 3, [task.num_labels - 1] * 3, [0, 1, 0])
        assert all(data.splits[split].labels is None for split, _ in task.test)


def test_mrpc_columns_are_found_by_name_behind_a_byte_order_mark(tmp_path):
    path = tmp_path / "MRPC" / "train.tsv"
    header = ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    write(path, header, ["1", "7", "8", '" open', "NA"], ["0", "7", "8", "a\u00a0b", 'x "y" '], end="\r\n")
    train = load({"train"}, task_name="mrpc", data_path=str(tmp_path)).splits["train"]
    assert train.texts == (['" open', "a\u00a0b"], ["NA", 'x "y" ']) and train.labels == [1, 0]


def test_a_row_that_lost_columns_stops_the_run(tmp_path):
    make_glue(tmp_path, TASKS["qqp"])
    path = tmp_path / "QQP" / "train.tsv"
    path.write_text(path.read_text() + "9\ta question broken by its own\n")
    text = refusal(needed={"train"}, task_name="qqp", data_path=str(tmp_path))
    assert text.startswith(f"{path}:5: 2 columns instead of 5")


def test_a_missing_column_is_named_with_those_there(tmp_path):
    path = write(tmp_path / "train.tsv", ["id", "text", "Quality"], ["1", "x", "1"])
    text = refusal(needed={"train"}, task_name="mrpc", data_path=str(tmp_path))
    assert text == f"{path}:1: no column '#1 String'; columns: id, text, Quality"


def test_only_what_is_needed_is_read(tmp_path):
    make_glue(tmp_path, TASKS["mrpc"])
    (tmp_path / "MRPC" / "train.tsv").write_bytes(b"\xff\xfe broken")
    assert list(load({"evaluation"}, task_name="mrpc", data_path=str(tmp_path)).splits) == ["validation"]
    (tmp_path / "MRPC" / "dev.tsv").unlink()
    text = refusal(needed={"evaluation"}, task_name="mrpc", data_path=str(tmp_path))
    assert "no validation; splits there: train, test" in text


def test_the_companion_is_read_or_missed_aloud(tmp_path):
    make_glue(tmp_path, TASKS["mnli"])
    data = load({"test"}, task_name="mnli", data_path=str(tmp_path))
    assert "ax:test" not in data.splits and "no predictions for ax" in data.warnings[0]
    make_glue(tmp_path, TASKS["ax"])
    for folder in (tmp_path, tmp_path / "MNLI"):
        data = load({"test"}, task_name="mnli", data_path=str(folder))
        assert len(data.splits["ax:test"]) == 3 and data.warnings == ()


def write_rows(path, rows):
    """Rows of (sentence1, sentence2, label or None) in the format the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [dict(zip(("sentence1", "sentence2", "label", "idx"), (*row, 0), strict=True)) for row in rows]
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        gap = "," if path.suffix == ".csv" else "\t"
        write(path, list(records[0]), *[list(map(str, record.values())) for record in records], gap=gap)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("form", ["{}/part-0", "{}", "mrpc/{}/part-0", "MRPC/{}"])
def test_data_files_in_folders_or_beside(tmp_path, suffix, form):
    for name, label in (("train", 1), ("dev", 0), ("test", -1)):
        write_rows(tmp_path / (form.format(name) + suffix), [(f"{name} NA ", "b", label)])
    data = load(task_name="mrpc", data_path=str(tmp_path))
    assert data.source.startswith("data files ")
    assert data.splits["train"].texts == (["train NA "], ["b"])
    assert [split.labels for split in data.splits.values()] == [[1], [0], None]


def test_several_files_are_joined_in_order(tmp_path):
    for part in (1, 0, 2):
        write_rows(tmp_path / "train" / f"p{part}.csv", [(str(part), "x", "equivalent")])
    (tmp_path / "train" / "README.txt").write_text("no rows")
    train = load({"train"}, task_name="mrpc", data_path=str(tmp_path)).splits["train"]
    assert train.texts[0] == ["0", "1", "2"] and train.labels == [1, 1, 1]
    assert train.origin == f"{tmp_path}/train/p0.csv and 2 more"
    write_rows(tmp_path / "train" / "p3.json", [("3", "x", 0)])
    text = refusal(needed={"train"}, task_name="mrpc", data_path=str(tmp_path))
    assert "has .csv and .json files for one split" in text


def test_nothing_there(tmp_path):
    text = refusal(task_name="mrpc", data_path=str(tmp_path))
    assert "no data of mrpc" in text and "GLUE TSV folder" in text and "saved data sets" in text
    assert "cannot be read: No such file" in refusal(task_name="mrpc", data_path=str(tmp_path / "none"))


# --- labels and texts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        ["not_equivalent", "equivalent"],
        ["0", "1"],
        [0, 1],
        [0.0, 1.0],
        ["0.0", "1.0"],
    ],
)
def test_labels_by_name_or_number(values):
    table = table_of(sentence1=["a", "b"], sentence2=["c", "d"], label=values)
    assert make_split(TASKS["mrpc"], "train", table, True).labels == [0, 1]


def test_the_numbers_of_a_data_set_are_its_own():
    table = Table("F", {"sentence1": ["a"] * 2, "sentence2": ["b"] * 2, "label": [0, 1]}, [1, 2], "row",
                  {"label": ("equivalent", "not_equivalent")})  # fmt: skip
    assert make_split(TASKS["mrpc"], "train", table, True).labels == [1, 0]
    table.class_names["label"] = ("same", "different")
    with pytest.raises(DataError, match="'same', 'different' do not match .* not_equivalent, equivalent"):
        make_split(TASKS["mrpc"], "train", table, True)


@pytest.mark.parametrize(
    ("task", "value", "problem"),
    [
        ("mrpc", "maybe", "label 'maybe' is not one of: not_equivalent, equivalent or 0-1"),
        ("mrpc", 2, "label 2 (int) is not one of"),
        ("mrpc", True, "label True (bool) is not one of"),
        ("mrpc", 0.5, "label 0.5 (float) is not one of"),
        ("mrpc", float("nan"), "label nan (float) is not one of"),
        ("mrpc", [1], "label [1] (list) is not one of"),
        ("mrpc", -1, "label -1 means unlabelled, but this split must be labelled"),
        ("mrpc", "-1", "label '-1' means unlabelled"),
        ("mrpc", None, "no label, but"),
        ("mrpc", "", "no label, but"),
        ("stsb", "5.001", "label '5.001' is not in [0, 5]"),
        ("stsb", -1.0, "label -1.0 means unlabelled"),
        ("stsb", "NaN", "label 'NaN' is not a finite number"),
        ("stsb", float("inf"), "label inf (float) is not a finite number"),
        ("stsb", "high", "label 'high' is not a finite number"),
        ("stsb", None, "no label, but"),
    ],
)
def test_wrong_labels(task, value, problem):
    table = table_of(sentence1=["a"] * 2, sentence2=["b"] * 2, label=["1", value])
    with pytest.raises(DataError) as caught:
        make_split(TASKS[task], "train", table, True)
    assert str(caught.value).startswith(f"FILE:3: {problem}")


def test_scores_as_they_are_written():
    table = table_of(sentence1=["a"] * 4, sentence2=["b"] * 4, label=["5.000", "0", "0.00", 3])
    assert make_split(TASKS["stsb"], "train", table, True).labels == [5.0, 0.0, 0.0, 3.0]


@pytest.mark.parametrize("values", [[-1, -1], [None, ""], ["1", "0"], [1, -1], ["?", [3]]])
def test_labels_of_what_is_only_predicted_are_not_looked_at(values):
    table = table_of(sentence1=["a"] * 2, sentence2=["b"] * 2, label=values)
    assert make_split(TASKS["mrpc"], "test", table, False).labels is None


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "column 'sentence1' has no text (missing or null)"),
        (["a"], "column 'sentence1' is ['a'] (list), not text"),
        (7, "column 'sentence1' is 7 (int), not text"),
        ("\ud800", "column 'sentence1' has half a surrogate pair"),
    ],
)
def test_wrong_texts(value, problem):
    with pytest.raises(DataError) as caught:
        make_split(TASKS["mrpc"], "test", table_of(sentence1=["", value], sentence2=["b", "c"]), False)
    assert str(caught.value).startswith(f"FILE:3: {problem}")


def test_take():
    split = Split("train", (["a", "b"], ["c", "d"]), [0, 1], "x")
    assert len(split) == 2 and split.take(1) == Split("train", (["a"], ["c"]), [0], "x")
    assert len(split.take(9)) == 2 and Split("test", (["a", "b"],), None, "x").take(1).labels is None


# --- one's own files --------------------------------------------------------------------------------


def own(tmp_path, train, validation_file=None, test_file=None, **flags):
    """Loads lines of csv as the training file; other parts by name."""
    parts = {"train_file": train, "validation_file": validation_file, "test_file": test_file}
    paths = {}
    for name, lines in parts.items():
        if lines is not None:
            paths[name] = str(write(tmp_path / f"{name}.csv", *[line.split(",") for line in lines], gap=","))
    needed = {"train_file": "train", "validation_file": "evaluation", "test_file": "test"}
    return load({needed[name] for name in paths}, **paths, **flags)


def test_own_classes_and_columns(tmp_path):
    data = own(
        tmp_path,
        ["id,title,body,label", "1,a b,c,sport", "2,d e,f,arts"],
        validation_file=["label,body,title,id", "arts,x,y,3"],
        test_file=["title,body", "p,q"],
        text_column_names="title,body",
    )
    assert data.task.columns == ("title", "body") and data.task.labels == ("arts", "sport")
    assert data.splits["train"].labels == [1, 0]
    assert data.splits["validation"].texts == (["y"], ["x"])
    assert data.splits["test"].labels is None
    assert not data.task.is_official and "texts: title, body; 2 classes" in data.source


def test_own_columns_prefer_sentence1_and_sentence2(tmp_path):
    data = own(tmp_path, ["note,sentence2,sentence1,label", "n,two,one,0", "n,two,one,1"])
    assert data.splits["train"].texts == (["one"] * 2, ["two"] * 2)
    assert own(tmp_path, ["idx,text,label", "0,x,0", "1,y,1"]).task.columns == ("text",)


def test_own_numbers_as_classes_and_as_scores(tmp_path):
    assert own(tmp_path, ["t,label", "a,10", "b,9", "c,-1"]).task.labels == ("-1", "9", "10")
    scores = own(tmp_path, ["t,label", "a,1.5", "b,9", "c,-1"])
    assert scores.task.is_regression and scores.splits["train"].labels == [1.5, 9.0, -1.0]
    assert scores.task.num_labels == 1 and "regression" in scores.source


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["t,label", "a,1.5", "b,2.5", "c,x"], ".csv:4: label 'x' is not a finite number"),
        (["t,label", "a,1.5", "b,nan", "c,2"], ".csv:3: label 'nan' is not a finite number"),
        (["t,label", "a,x", "b,x"], "all labels are 'x'; training needs at least two"),
        (["t,label", "a,", "b,"], "there are no labels"),
        (["t,label", "a,x", "b,y", "c,"], ".csv:4: no label"),
        (["t,lable", "a,x"], ".csv:1: no column 'label'; columns: t, lable"),
        (["id,label", "1,x", "2,y"], "no column looks like text; columns: id, label"),
    ],
)
def test_own_training_files_that_do_not_work(tmp_path, lines, problem):
    with pytest.raises(DataError) as caught:
        own(tmp_path, lines)
    assert problem in str(caught.value)


def test_own_labels_only_in_the_validation_file(tmp_path):
    with pytest.raises(DataError) as caught:
        own(tmp_path, ["t,label", "a,x", "b,y"], validation_file=["t,label", "a,x", "b,z"])
    assert "validation_file.csv:3: label 'z' is not a class of the training data" in str(caught.value)
    assert "classes of the training data: 'x', 'y'; labels of the file: 'x', 'z'" in str(caught.value)


def test_own_files_of_every_format_agree(tmp_path):
    rows = [("a", "b", 0), ("c", "d", 1)]
    found = [
        load({"train"}, train_file=str(write_rows(tmp_path / f"train{suffix}", rows))).splits["train"]
        for suffix in (".csv", ".tsv", ".json", ".jsonl", ".parquet")
    ]
    assert all(split.texts == (["a", "c"], ["b", "d"]) and split.labels == [0, 1] for split in found)


@pytest.mark.parametrize(
    ("needed", "flags"),
    [
        ("train", "--do_train needs --train_file"),
        ("evaluation", "--do_eval needs --validation_file"),
        ("test", "--do_predict needs --test_file"),
    ],
)
def test_own_files_that_are_not_given(tmp_path, needed, flags):
    names = {"train": "train_file", "evaluation": "validation_file", "test": "test_file"}
    rows = [("a", "b", 0), ("c", "d", 1)]
    given = {name: str(write_rows(tmp_path / f"{name}.csv", rows)) for key, name in names.items() if key != needed}
    assert refusal(UsageError, needed={needed}, **given) == flags


def test_own_evaluation_without_training_data(tmp_path):
    path = str(write_rows(tmp_path / "a.csv", [("a", "b", "no"), ("c", "d", "yes")]))
    data = load({"evaluation"}, validation_file=path)
    assert data.task.labels == ("no", "yes") and "classes are taken from validation" in data.warnings[0]
    assert "the classes are not known" in refusal(UsageError, needed={"test"}, test_file=path)


def test_own_files_as_a_named_task(tmp_path):
    train = write(tmp_path / "t.csv", ["hypothesis", "premise", "label"], ["h", "p", "neutral"], gap=",")
    data = load({"train", "evaluation"}, task_name="mnli", train_file=str(train), validation_file=str(train))
    assert data.splits["train"] == Split("train", (["p"], ["h"]), [1], str(train))
    assert [split for split, _, _ in data.task.evaluation] == ["validation_matched"] == list(data.splits)[1:]
    assert data.task.published == () and data.task.labels == TASKS["mnli"].labels
    wrong = write(tmp_path / "w.csv", ["a", "b", "label"], ["h", "p", "neutral"], gap=",")
    assert "no column 'premise'" in refusal(needed={"train"}, task_name="mnli", train_file=str(wrong))


def test_sorted_labels():
    assert sorted_labels({"10", "9", "-1"}) == ("-1", "9", "10")
    assert sorted_labels({"b", "a", "10"}) == ("10", "a", "b")


# --- the real files ---------------------------------------------------------------------------------

REAL_ROWS = {
    "cola": (8551, 1043, 1063),
    "mrpc": (3668, 408, 1725),
    "stsb": (5749, 1500, 1379),
    "wnli": (635, 71, 146),
    "qnli": (10293, 5463, 5463),
    "mnli": (10471, 9815, 9832, 9796, 9847, 1104),
    "qqp": (9309, 1000),
}


@pytest.mark.real_data
@pytest.mark.skipif(not REAL.is_dir(), reason="no GLUE files (GLUE_DATA_DIR)")
@pytest.mark.parametrize("name", REAL_ROWS)
def test_real_glue_files(name):
    needed = ALL if name != "qqp" else {"train", "evaluation"}
    data = load(needed, task_name=name, data_path=str(REAL))
    assert tuple(map(len, data.splits.values())) == REAL_ROWS[name]
    assert data.warnings == () and data.source.startswith("GLUE TSV folder")
    for split in data.splits.values():
        assert (split.labels is None) == ("test" in split.name)
        assert all(len(column) == len(split) and "" not in column for column in split.texts)
    classes = set(data.splits["train"].labels)
    # STS-B has scores from one end of its range to the other
    assert classes == set(range(data.task.num_labels)) or {0.0, 5.0} <= classes
