"""Checks of flags that name the data, its task and its labels against each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

from bert_glue.config.arguments import DATA_FILE_FLAGS, DATA_SUFFIXES, Arguments
from bert_glue.config.values import shown
from bert_glue.errors import Problem, UsageError
from bert_glue.tasks import MULTI_LABEL, REGRESSION, GlueTask, get_task

WORK = ("do_train", "do_eval", "do_predict")
_OWN_DATA = (
    "text_column_names", "label_column_name", "text_column_delimiter", "do_regression", "label_map", "drop_rows",
    "remove_columns", "problem_type", "label_delimiter",
)  # fmt: skip


def data_problems(args: Arguments) -> Iterator[Problem]:
    """Where the data comes from, and what is said of its columns and labels."""
    files = [name for name in DATA_FILE_FLAGS if getattr(args, name)]
    origins = [name for name in ("data_path", "sample", "dataset_name") if getattr(args, name)] + files[:1]
    everything = ("task_name", "data_path", "sample", "dataset_name", *DATA_FILE_FLAGS)
    if len(origins) > 1:
        given = " and ".join(f"--{name}" for name in origins)
        yield Problem(tuple(origins), f"{given} are {len(origins)} sources of data; give only one")
    elif not origins and not args.task_name:
        yield Problem(
            everything,
            "no data: give --task_name (alone for the hub, or with --data_path or --sample),"
            " or --dataset_name, or --train_file, --validation_file and --test_file",
        )
    for name in ("data_path", "sample"):
        if getattr(args, name) and not args.task_name:
            yield Problem((name, "task_name"), f"--{name} needs --task_name, the task to train")
    if args.dataset_name and args.task_name and args.hub == "huggingface":
        yield Problem(("dataset_name", "task_name"), "--dataset_name and --task_name are two data sets; give only one")
    if args.dataset_config_name and not args.dataset_name:
        yield Problem(("dataset_config_name", "dataset_name"), "--dataset_config_name needs --dataset_name")
    yield from _files(args, files)
    yield from _own(args, files)


def _own(args: Arguments, files: list[str]) -> Iterator[Problem]:
    """Flags that only apply to own data, in a run without own data."""
    for name in (*_OWN_DATA, "validation_split_percentage"):
        if getattr(args, name) is not None and not files and not args.dataset_name:
            yield Problem(
                (name,),
                f"--{name} {shown(str(getattr(args, name)))}: "
                "only for own data; add --train_file or --dataset_name, or leave it out",
            )
    yield from _kind_of_labels(args)
    if args.validation_split_percentage is not None and args.validation_file:
        yield Problem(
            ("validation_split_percentage", "validation_file"),
            "--validation_split_percentage and --validation_file are two evaluation sets; give only one",
        )


def _kind_of_labels(args: Arguments) -> Iterator[Problem]:
    """Flags that say what kind of labels own data has, and contradict each other or the task."""
    kind, task = args.problem_type, named_task(args)
    if kind is not None and args.do_regression not in (None, kind == REGRESSION):
        said = f"--problem_type {kind} contradicts --do_regression {str(args.do_regression).lower()}: give one"
        yield Problem(("problem_type", "do_regression"), said)
    for name in ("label_delimiter", "label_threshold"):
        value = getattr(args, name)
        if value is None:
            continue
        said = f"--{name} {shown(str(value))} is for several labels a row"
        if kind not in (None, MULTI_LABEL):
            yield Problem((name, "problem_type"), f"{said}, --problem_type {kind} for one: give one")
        if args.do_regression:
            yield Problem((name, "do_regression"), f"{said}, --do_regression for a score: give one")
        if task is not None:
            yield Problem((name, "task_name"), f"{said}; {task.name} has one")
    if task is not None and kind not in (None, task.problem_type):
        yield Problem(("problem_type", "task_name"), f"--problem_type {kind}: {task.name} is {task.problem_type}")
    if args.label_delimiter in ("", "\\"):
        yield Problem(("label_delimiter",), "--label_delimiter: one character or more, and no backslash, which escapes")


def _files(args: Arguments, files: list[str]) -> Iterator[Problem]:
    for name in files:
        if PurePath(getattr(args, name)).suffix.lower() not in DATA_SUFFIXES:
            known = ", ".join(DATA_SUFFIXES)
            yield Problem((name,), f"--{name} {shown(getattr(args, name))}: unknown extension. Choices: {known}")
    for work, name in zip(WORK, DATA_FILE_FLAGS, strict=True):
        is_parted = name == "validation_file" and args.validation_split_percentage and "train_file" in files
        if files and getattr(args, work) and name not in files and not is_parted:
            yield Problem((work, name), f"--{work} needs --{name}, because the data comes from files")


def named_task(args: Arguments) -> GlueTask | None:
    """The row of `--task_name`; None for own data and for an unknown task."""
    try:
        return get_task(args.task_name) if args.task_name else None
    except UsageError:
        return None


def task_problems(args: Arguments) -> Iterator[Problem]:
    """What the task of `--task_name` has no data for."""
    if args.task_name is None:
        return
    try:
        task = get_task(args.task_name)
    except UsageError as error:
        yield Problem(("task_name",), str(error))
        return
    other = f"; use a model of {task.predicted_with}" if task.predicted_with else ""
    if args.do_train and "train" not in task.splits:
        yield Problem(("do_train", "task_name"), f"--do_train: {task.name} has no training data{other}")
    if args.do_eval and not task.evaluation:
        yield Problem(("do_eval", "task_name"), f"--do_eval: {task.name} has no labelled data{other}")
