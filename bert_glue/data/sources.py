"""The sources of the rows. The user names one source; it is used or refused, and never replaced by another.

| flags | source |
|---|---|
| --sample | sentences made by `sample.py`; marked in every output |
| --data_path FOLDER | saved data sets, data files or GLUE's TSV files: `folder.py` |
| --train_file, --validation_file, --test_file | one's own files: `OwnData` of `splits.py` |
| --dataset_name | another data set of the hub, or a folder written ./NAME |
| none of these | GLUE itself from the hub: `hub_datasets.py` |

A task name is never looked up as a local folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_glue.config.arguments import DATA_FILE_FLAGS
from bert_glue.config.values import is_path
from bert_glue.data import folder as data_folder
from bert_glue.data import splits as data_splits
from bert_glue.data.own.columns import unescaped
from bert_glue.data.readers import read_table
from bert_glue.data.splits import Split, make_split
from bert_glue.data.tables import Table
from bert_glue.errors import DataError, UsageError
from bert_glue.tasks import OWN, GlueTask, also_predicted, get_task

if TYPE_CHECKING:
    from bert_glue.config.arguments import Arguments

__all__ = ["Split", "TaskData", "load_task_data"]

# part of the data -> (what needs it, flag that gives it)
_NEEDED_BY = {
    "train": ("--do_train", "--train_file"),
    "validation": ("--do_eval", "--validation_file"),
    "test": ("--do_predict", "--test_file"),
}


@dataclass(frozen=True)
class TaskData:
    """The data of one run.

    Args:
        task: the row of the table, or a row made for the user's own data; use this one from here on.
        splits: the task's split names, and "<other task>:test" (such as "ax:test") -> rows.
        source: one line for logs and results.
        is_sample: generated sentences, not GLUE.
        warnings: lines for the user, such as a missing test set.
    """

    task: GlueTask
    splits: dict[str, Split]
    source: str
    is_sample: bool = False
    warnings: tuple[str, ...] = ()


def load_task_data(args: Arguments, needed: frozenset[str], finished: GlueTask | None = None) -> TaskData:
    """Reads the splits a run needs from the one source its flags name.

    Args:
        needed: of "train", "evaluation", "test"; nothing else is read.
        finished: what the model that is only evaluated or predicts was trained on: it says what a user's classes are.

    Raises:
        UsageError: several sources, none, or no task name where one is needed.
        DataError: the source cannot be reached, lacks a split, or is broken (file:line).
    """
    task = get_task(args.task_name) if args.task_name else None
    is_copy = task is not None and args.hub == "modelscope"
    has_files = any(getattr(args, name) for name in DATA_FILE_FLAGS)
    chosen = {
        "--sample": (args.sample, _from_sample),
        "--data_path": (args.data_path, _from_folder),
        "--train_file, --validation_file, --test_file": (has_files, _from_files),
        # On ModelScope copies of GLUE have several names: with --task_name it says which.
        "--dataset_name": (args.dataset_name and not is_copy, _from_dataset),
    }
    named = {flag: load for flag, (is_given, load) in chosen.items() if is_given}
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)}: several sources of data; give one")
    load = next(iter(named.values()), _from_hub)
    if task is None and load in (_from_sample, _from_folder, _from_hub):
        raise UsageError("--task_name is needed, or one's own data by --train_file or --dataset_name")
    if load in (_from_files, _from_dataset):
        return load(args, task, needed, finished)
    return load(args, task, needed)


def _wanted(task: GlueTask, needed: frozenset[str]) -> tuple[str, ...]:
    """Split names of the task that are in `needed`."""
    groups = {
        "train": ("train",),
        "evaluation": tuple(split for split, _, _ in task.evaluation),
        "test": tuple(split for split, _ in task.test),
    }
    return tuple(split for group, names in groups.items() if group in needed for split in names)


def _also_predicted(task: GlueTask, needed: frozenset[str]) -> tuple[tuple[GlueTask, str, str], ...]:
    """(task, its split, key of the result) of everything else this task's model predicts."""
    if "test" not in needed:
        return ()
    return tuple((other, split, f"{other.name}:{split}") for other in also_predicted(task) for split, _ in other.test)


def _from_sample(args: Arguments, task: GlueTask, needed: frozenset[str]) -> TaskData:
    from bert_glue.data.sample import SAMPLE_LABEL, sample_rows

    rows = [(task, split, split) for split in _wanted(task, needed)]
    splits = {}
    for other, split, key in (*rows, *_also_predicted(task, needed)):
        texts, labels = sample_rows(other, split)
        if labels is not None and all(label == -1 for label in labels):
            labels = None
        splits[key] = Split(key, texts, labels, SAMPLE_LABEL)
    return TaskData(task, splits, SAMPLE_LABEL, is_sample=True)


def _from_hub(args: Arguments, task: GlueTask, needed: frozenset[str]) -> TaskData:
    open_task, place = _glue_of(args)

    def read(other: GlueTask, names: dict[str, str], is_labelled: bool) -> None:
        data = open_task(other.name)
        for split, key in names.items():
            table = _hub_table(data, split, f"{place} {other.name}")
            labelled = is_labelled and split not in {test for test, _ in other.test}
            splits[key] = make_split(other, key, table, labelled)

    splits: dict[str, Split] = {}
    warnings = []
    read(task, {split: split for split in _wanted(task, needed)}, True)
    for other, split, key in _also_predicted(task, needed):
        try:
            read(other, {split: key}, False)
        except DataError as error:
            warnings.append(f"{other.name} is not predicted: {str(error).splitlines()[0]}")
    return TaskData(task, splits, f"hub {place} {task.name}", warnings=tuple(warnings))


def _glue_of(args: Arguments) -> tuple[Callable[[str], Any], str]:
    """A function that opens a task's data on the hub of `--hub`, and the name of the whole."""
    from bert_glue.data.hub_datasets import GLUE_NAME, GLUE_REVISION, open_hub

    if args.hub == "huggingface":
        return lambda config: open_hub(GLUE_NAME, config, GLUE_REVISION, args), f"{GLUE_NAME}@{GLUE_REVISION}"
    from bert_glue.data import hub_datasets

    name = args.dataset_name or GLUE_NAME
    return lambda config: hub_datasets.open_data(name, config, args), f"modelscope:{name}"


def _hub_table(data: Any, split: str, origin: str) -> Table:
    from bert_glue.data.hub_datasets import to_table

    if split not in data:
        raise DataError(f"{origin}: no split {split!r}; splits: {', '.join(data)}")
    return to_table(data[split], f"{origin} {split}")


def _from_folder(args: Arguments, task: GlueTask, needed: frozenset[str]) -> TaskData:
    folder = Path(args.data_path)
    roots = [folder, *data_folder.roots_of(task, folder)]
    found = data_folder.detect(task, roots)
    if found is None:
        raise DataError(
            f"--data_path {folder}: no data of {task.name} in {' or '.join(map(str, roots))}; "
            f"looked for {data_folder.expected()}"
        )
    layout, root = found
    splits, warnings = data_folder.read_folder(task, layout, root, _wanted(task, needed), args.drop_broken_rows)
    for other, split, key in _also_predicted(task, needed):
        beside = data_folder.detect(other, _roots_of_also_predicted(task, other, folder))
        if beside is None:
            warnings.append(f"{other.name} is not predicted: {folder} has no folder {other.folder}")
        else:
            splits[key] = data_folder.read_folder(other, *beside, (split,))[0][split]
    return TaskData(task, splits, f"{layout.name} {root}", warnings=tuple(warnings))


def _roots_of_also_predicted(task: GlueTask, other: GlueTask, folder: Path) -> list[Path]:
    roots = data_folder.roots_of(other, folder)
    if data_folder.is_folder_of(task, folder.resolve()):
        # --data_path GLUE/MNLI: the diagnostic lies beside it
        roots += data_folder.roots_of(other, folder.resolve().parent)
    return roots


def _from_files(args: Arguments, task: GlueTask | None, needed: frozenset[str], finished: GlueTask | None) -> TaskData:
    paths = {name.removesuffix("_file"): getattr(args, name) for name in DATA_FILE_FLAGS if getattr(args, name)}

    @cache  # the training file may be read twice: for its rows and for the list of labels
    def read(part: str) -> Table:
        if part not in paths:
            needs, flag = _NEEDED_BY[part]
            raise UsageError(f"{needs} needs {flag}")
        # Predictions are known by the number of their row, so that none of a test file is left out.
        return read_table(Path(paths[part]), args.drop_broken_rows and part != "test")

    return _own(args, task, needed, finished, _Parts(OWN, set(paths), read, " ".join(map(str, paths.values()))))


def _from_dataset(
    args: Arguments, task: GlueTask | None, needed: frozenset[str], finished: GlueTask | None
) -> TaskData:
    from bert_glue.data.hub_datasets import open_folder, revision_of

    name, config = args.dataset_name, args.dataset_config_name
    if is_path(name):
        data, origin = open_folder(str(Path(name).expanduser()), config, args), name
    else:
        data = _open(name, config, args)
        origin = "@".join(filter(None, (name, revision_of(next(iter(data.values()))))))
    origin = " ".join(filter(None, (origin, config)))
    called = {part: getattr(args, f"{part}_split_name") or part for part in _NEEDED_BY}
    available = (set(data) - set(called.values())) | {part for part, split in called.items() if split in data}

    @cache
    def read(part: str) -> Table:
        return _hub_table(data, called.get(part, part), origin)

    return _own(args, task, needed, finished, _Parts(name.rstrip("/").rsplit("/", 1)[-1], available, read, origin))


def _open(name: str, config: str | None, args: Arguments) -> Any:
    from bert_glue.data import hub_datasets

    if args.hub == "modelscope":
        return hub_datasets.open_data(name, config, args)
    return hub_datasets.open_hub(name, config, None, args)


@dataclass(frozen=True)
class _Parts:
    """The parts of a user's data.

    Args:
        name: of the task that they make.
        available: "train", "validation", "test" as far as they are there.
        read: part -> its table; raises where there is none.
        source: one line for logs and results.
    """

    name: str
    available: set[str]
    read: Callable[[str], Table]
    source: str


def _own(
    args: Arguments, task: GlueTask | None, needed: frozenset[str], finished: GlueTask | None, parts: _Parts
) -> TaskData:
    """Own data as a GLUE task if one is named, as a finished model has it, or as the training part describes it."""
    flags = data_splits.ColumnFlags.of(args)
    delimiter = args.text_column_delimiter
    own = data_splits.OwnData(parts.read, flags, data_splits.LabelFlags.of(args), delimiter and unescaped(delimiter))
    source, owner = parts.source, "the training data"
    is_parted = args.validation_split_percentage is not None and "validation" not in parts.available
    if task is not None:
        task, part_of = data_splits.fit_splits(task, parts.available)
        task = replace(task, columns=flags.texts or task.columns, label_column=flags.label or task.label_column)
    elif finished is not None:
        first = next(part for group, part in _PART_OF.items() if group in needed)
        is_labelled = first != "test"
        task = own.of_model(finished, "train" if is_parted and is_labelled else first, is_labelled, parts.name)
        owner = "the model"
    else:
        task = _described(own, parts)
    if not task.is_official:
        part_of = {split: split for split in task.splits}
        source += f" (texts: {', '.join(task.columns)}; {_outputs(task)})"
    vocabulary = _vocabulary(task, finished, owner)
    found = {}
    unlabelled = {split.name for split in task.test}
    for name in _wanted(task, needed):
        part, is_labelled = part_of[name], name not in unlabelled
        whole = own.split(task, name, "train" if is_parted and is_labelled else part, is_labelled, vocabulary)
        if is_parted and is_labelled:
            whole = whole.rows(_rows_of(args, whole, own.notes)[part != "train"])
        found[name] = whole
    return TaskData(task, found, source, warnings=tuple(dict.fromkeys(own.notes)))


# What is needed -> the part that says which columns there are.
_PART_OF = {"train": "train", "evaluation": "validation", "test": "test"}


def _described(own: data_splits.OwnData, parts: _Parts) -> GlueTask:
    part = next((part for part in ("train", "validation") if part in parts.available), None)
    if part is None:
        raise UsageError(
            f"{parts.source}: the labels are not known; --model_name_or_path a fine-tuned model, or give --train_file"
        )
    if part != "train":
        own.notes.append(f"no training data: the labels are those of {part}")
    return own.describe(part, parts.name)


def _vocabulary(task: GlueTask, finished: GlueTask | None, owner: str) -> data_splits.ClassVocabulary | None:
    """The vocabulary that defines the classes of `task`; None where labels are scores, or GLUE's own."""
    if task.is_regression or task.is_official:
        return None
    return data_splits.ClassVocabulary(task.labels, owner, has_numbers=finished is not None and finished.is_official)


def _rows_of(args: Arguments, whole: Split, notes: list[str]) -> tuple[list[int], list[int]]:
    """Rows for training and for validation where `--validation_split_percentage` parts the training data."""
    seed = args.seed if args.data_seed is None else args.data_seed
    train, validation = data_splits.parted(whole, args.validation_split_percentage, seed)
    texts = list(zip(*whole.texts, strict=True))
    known = {texts[row] for row in train}
    doubled = sum(texts[row] in known for row in validation)
    notes.append(
        f"{len(validation)} of {len(whole)} training rows are held out for validation (seed {seed})"
        + (f"; warning: {doubled} of them have a text that is in training too" if doubled else "")
    )
    return train, validation


def _outputs(task: GlueTask) -> str:
    several = ", several a row" if task.is_multi_label else ""
    return "regression" if task.is_regression else f"{task.num_labels} classes{several}"
