"""A local copy of the hub's repository of GLUE, numbered files of a split, and rows that GLUE's own files break."""

import pyarrow
import pyarrow.parquet
import pytest
from glue_folder import make_glue

from bert_glue.config.arguments import Arguments
from bert_glue.data.sources import load_task_data
from bert_glue.errors import DataError
from bert_glue.tasks import get_task

ALL = frozenset({"train", "evaluation", "test"})


def parquet(path, task, rows, first=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {name: [f"{name} {first + row}" for row in range(rows)] for name in task.columns}
    labels = [-1 if "test" in path.name else 2.5 if task.is_regression else 1 for _ in range(rows)]
    pyarrow.parquet.write_table(pyarrow.table({**texts, "label": labels, "idx": list(range(rows))}), path)


def hub_copy(root, name):
    """The files of one task as nyu-mll/glue has them."""
    task = get_task(name)
    for split in task.splits:
        parquet(root / name / f"{split}-00000-of-00001.parquet", task, 4)
    return task


def load(task, root, **flags):
    return load_task_data(Arguments(task_name=task.name, data_path=str(root), **flags), ALL)


@pytest.mark.parametrize("name", ["mrpc", "sst2", "stsb", "mnli", "wnli", "cola"])
def test_a_copy_of_the_hubs_repository_is_read(tmp_path, name):
    (tmp_path / "README.md").write_text("data card")
    task = hub_copy(tmp_path / "glue", name)
    for root in (tmp_path / "glue", tmp_path / "glue" / name):
        data = load(task, root)
        assert {split: len(data.splits[split]) for split in task.splits} == dict.fromkeys(task.splits, 4)
        assert data.splits["train"].texts[0][:2] == [f"{task.columns[0]} 0", f"{task.columns[0]} 1"]
        assert [data.splits[split].labels for split, _ in task.test] == [None] * len(task.test)


def test_the_copy_of_ax_beside_mnli_is_predicted(tmp_path):
    task = hub_copy(tmp_path, "mnli")
    parquet(tmp_path / "ax" / "test-00000-of-00001.parquet", get_task("ax"), 2)
    assert len(load(task, tmp_path).splits["ax:test"]) == 2


@pytest.mark.parametrize("place", ["", "data", "rte/data"])
@pytest.mark.parametrize("end", ["", "-0a1b2c3d4e5f"])
def test_all_numbered_files_of_a_split_are_read_in_order(tmp_path, place, end):
    task = get_task("rte")
    for number in (2, 0, 1):
        parquet(tmp_path / place / f"train-0000{number}-of-00003{end}.parquet", task, 2, first=2 * number)
    parquet(tmp_path / place / f"validation-00000-of-00001{end}.parquet", task, 1)
    data = load_task_data(Arguments(task_name="rte", data_path=str(tmp_path)), frozenset({"train", "evaluation"}))
    assert data.splits["train"].texts[0] == [f"sentence1 {row}" for row in range(6)]


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002"],
        ["train-00001-of-00002"],
        ["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"],
        ["train-00000-of-00001-aa", "train-00000-of-00001-bb"],
    ],
)
def test_numbered_files_that_are_missing_or_doubled_are_refused(tmp_path, names):
    for name in names:
        parquet(tmp_path / f"{name}.parquet", get_task("rte"), 2)
    with pytest.raises(DataError, match="the files of train are not one each of"):
        load_task_data(Arguments(task_name="rte", data_path=str(tmp_path)), frozenset({"train"}))


def test_a_clone_without_lfs_is_told_so(tmp_path):
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte" / "train-00000-of-00001.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="Git-LFS pointer, not the data; run git lfs pull"):
        load_task_data(Arguments(task_name="rte", data_path=str(tmp_path)), frozenset({"train"}))


BROKEN = '97\tis this one broken?\t"\n\tyes it is\t0\n'


@pytest.mark.parametrize(("name", "split"), [("qqp", "train"), ("qqp", "validation"), ("qnli", "train")])
def test_rows_that_glue_breaks_are_named_with_the_flag_that_drops_them(tmp_path, name, split):
    task = get_task(name)
    make_glue(tmp_path, task)
    path = tmp_path / task.folder / task.tsv[split].file
    path.write_text(path.read_text() + BROKEN)
    with pytest.raises(DataError) as caught:
        load(task, tmp_path)
    assert len(str(caught.value).splitlines()) == 3
    assert "QQP-clean" in str(caught.value) and "--drop_broken_rows" in str(caught.value)
    data = load(task, tmp_path, drop_broken_rows=True)
    assert len(data.splits[split]) == 3
    assert data.warnings[0].startswith(f"{path}: 2 broken rows are left out; the first is {path}:5: ")


def test_no_row_of_test_data_is_left_out(tmp_path):
    task = get_task("qqp")
    make_glue(tmp_path, task)
    path = tmp_path / task.folder / task.tsv["test"].file
    path.write_text(path.read_text() + BROKEN)
    with pytest.raises(DataError, match="but for test data"):
        load(task, tmp_path, drop_broken_rows=True)
