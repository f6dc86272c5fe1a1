"""`--tasks own`: the flags of a sweep over own data, and a check of the data before the first run starts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bert_glue.config.arguments import FLAGS
from bert_glue.config.metric_checks import headline_notes, with_metric
from bert_glue.config.parser import parse
from bert_glue.errors import UsageError
from bert_glue.tasks import OWN, GlueTask

if TYPE_CHECKING:
    from bert_glue.config.arguments import Arguments
    from bert_glue.data.sources import TaskData

# Flags of run_glue.py that the sweep also takes.
DATA_FLAGS = (
    "train_file", "validation_file", "dataset_name", "dataset_config_name", "train_split_name",
    "validation_split_name", "text_column_names", "label_column_name", "text_column_delimiter", "remove_columns",
    "do_regression", "problem_type", "label_delimiter", "label_threshold", "label_map",
    "drop_rows", "drop_broken_rows", "validation_split_percentage",
)  # fmt: skip
_SOURCES = ("train_file", "dataset_name")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of own data, named as in run_glue.py."""
    group = parser.add_argument_group(f"own data (--tasks {OWN})")
    for name in DATA_FLAGS:
        flag = FLAGS[name]
        values: dict[str, str] = {}
        if flag.many:
            values = {"nargs": "+"}
        elif flag.kind == "bool":
            values = {"nargs": "?", "const": "true"}
        group.add_argument(f"--{name}", metavar="VALUE", help=flag.text.replace("%", "%%"), **values)


def data_flags(options: argparse.Namespace) -> list[str]:
    """The flags of own data that were given, in the form of a run_glue.py command line."""
    given = {name: value for name in DATA_FLAGS if (value := getattr(options, name)) is not None}
    return [f"--{name}={','.join(value) if isinstance(value, list) else value}" for name, value in given.items()]


def check_flags(options: argparse.Namespace, extra: tuple[str, ...]) -> None:
    """Checks the flags of own data against `--tasks`.

    Args:
        extra: the flags after `--`, which may also name the data.

    Raises:
        UsageError: own data without `--tasks own`, `--tasks own` without data, or no model.
    """
    given = [name for name in DATA_FLAGS if getattr(options, name) is not None]
    is_own = options.tasks == OWN
    if given and not is_own:
        raise UsageError(f"--{given[0]} is for own data: it needs --tasks {OWN}, not --tasks {options.tasks}")
    if not is_own:
        return
    others = [f"--{name}" for name in ("sample", "data_path") if getattr(options, name)]
    if others:
        raise UsageError(f"--tasks {OWN} and {others[0]} exclude each other; give one source of data")
    behind = {word[2:].partition("=")[0] for word in extra if word.startswith("--")}
    if not {*given, *behind} & set(_SOURCES):
        raise UsageError(f"--tasks {OWN} needs --train_file or --dataset_name")
    if not options.model:
        raise UsageError(f"--tasks {OWN} needs --model NAME, a folder or a hub name")


@dataclass(frozen=True)
class OwnData:
    """The data of a sweep, as read once before its runs.

    Args:
        task: the task of the data, named `own`.
        lines: log lines on the chosen columns and labels, the score of a constant prediction, and the splits.
        sha256: the hash of the texts and labels of each split.
    """

    task: GlueTask
    lines: list[str]
    sha256: dict[str, str]


def read_own_data(flags: tuple[str, ...]) -> OwnData:
    """Reads the data once, so that a broken file stops the sweep before any run starts.

    Args:
        flags: the command line of one run.

    Raises:
        UsageError, DataError: as in run_glue.py.
    """
    from bert_glue.data.sources import load_task_data
    from bert_glue.results.provenance import data_hashes

    args = parse(list(flags))
    data = load_task_data(args, frozenset({"train", "evaluation"}))
    data = replace(data, task=with_metric(args, data.task))
    task = data.task
    lines = [f"data: {data.source}", *data.warnings, *_baseline(data), *_split_note(args)]
    lines += [f"note: {note}" for note in headline_notes(args, task)]
    if args.validation_split_percentage is not None:  # hash the whole file: which rows are held out depends on the seed
        data = load_task_data(replace(args, validation_split_percentage=None), frozenset({"train"}))
    return OwnData(replace(task, name=OWN), lines, data_hashes(data))


def _baseline(data: TaskData) -> list[str]:
    """Log lines with the score of a constant prediction on each evaluated split."""
    from bert_glue.evaluation.answers import label_array
    from bert_glue.evaluation.metrics import majority_baseline

    found = []
    constant = "always the best set of labels" if data.task.is_multi_label else "always the most frequent class"
    for split in data.task.evaluation:
        rows = data.splits[split.name]
        value = None if rows.labels is None else majority_baseline(data.task, label_array(data.task, rows.labels))
        if value is not None:
            score = f"{data.task.headline} {100 * value:.2f}"
            found.append(f"{split.name}: {len(rows)} rows; {constant}: {score}")
    return found


def _split_note(args: Arguments) -> list[str]:
    if args.validation_split_percentage is None or args.data_seed is not None:
        return []
    return [
        "note: each seed holds out different rows for validation (--validation_split_percentage); --data_seed N after "
        "-- holds out the same rows for all seeds, but also fixes the order of the training rows"
    ]
