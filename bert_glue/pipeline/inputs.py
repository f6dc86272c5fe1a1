"""Reads the inputs of a run: data, model, tokenized splits, class weights and the beginning of run.json."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bert_glue.config.arguments import Arguments
from bert_glue.config.metric_checks import headline_notes, with_metric
from bert_glue.config.repeat import check_inputs, read_run
from bert_glue.data.batching import TokenSplit
from bert_glue.data.chunked_encoding import Windows, cut_note
from bert_glue.data.sources import Split, TaskData, load_task_data
from bert_glue.data.tokenization import TokenTable, tokenize
from bert_glue.devices.distributed import DistributedContext
from bert_glue.devices.rng import seed_generators
from bert_glue.errors import DataError
from bert_glue.evaluation.answers import label_array
from bert_glue.evaluation.calibration import check_calibratable
from bert_glue.model.classifier import LoadedModel
from bert_glue.model.description import read_description, with_decision
from bert_glue.model.folder import finished_task, model_folder
from bert_glue.model.loading import load_model
from bert_glue.pipeline.rank_agreement import compare_inputs
from bert_glue.pipeline.score import check_predictable
from bert_glue.results.earlier import check_output_folder
from bert_glue.results.provenance import provenance
from bert_glue.storage import files
from bert_glue.tasks import GlueTask
from bert_glue.training.class_weights import class_weights, named
from bert_glue.training.console import ConsoleLog
from bert_glue.training.setup import settle_threads
from bert_glue.training.throughput import Phases

# Flags on the length of rows, whose values are saved with the weights.
_TRAINED_WITH = ("max_seq_length", "doc_stride", "max_windows")


@dataclass(frozen=True)
class RunInputs:
    """The inputs of a run.

    Args:
        data: the task and the rows of its splits.
        model: on the host, in fp32.
        splits: split name -> its token ids and labels.
        class_weights: the weights of `--class_weights`, `[labels]` float64. None without the flag.
        record: the beginning of run.json. {} on ranks that do not write it.
    """

    data: TaskData
    model: LoadedModel
    splits: dict[str, TokenSplit]
    class_weights: np.ndarray | None
    record: dict


def with_sample_model(args: Arguments, ranks: DistributedContext) -> Arguments:
    """With `--sample` and no `--model_name_or_path`, makes the tiny BERT and names it."""
    if not args.sample or args.model_name_or_path:
        return args
    from bert_glue.data.sample import make_tiny_bert

    folder = Path(args.output_dir) / "sample_bert"
    if ranks.is_first:
        with files.plain_errors(folder):
            make_tiny_bert(folder)
    ranks.barrier()
    return replace(args, model_name_or_path=str(folder))


def at_trained_length(args: Arguments, log: ConsoleLog) -> Arguments:
    """Without training, takes the flags on the length of rows from the training of the model, unless they are given."""
    if args.do_train:
        return args
    stored = read_description(model_folder(args.model_name_or_path, args))
    for name in _TRAINED_WITH:
        value, default = stored.get(name), getattr(args, name)
        if args.is_default(name) and value not in (None, default):
            told = "" if default is None else f" (the default is {default})"
            log.line(f"note: --{name} {value}, as the model was trained{told}")
            args = replace(args, **{name: value})
    return args


def read_inputs(
    args: Arguments, given: Arguments, ranks: DistributedContext, log: ConsoleLog, phase: Phases
) -> RunInputs:
    """Reads everything that a run works on.

    Args:
        given: the flags as the user gave them, before values were derived.

    Raises:
        UserError: data, model or flags do not fit, each with its exit code.
    """
    with phase("data"):
        data = _read_data(args, log)
        weights = weights_of_classes(args, data)
        by_name = named(data.task, weights)
    with phase("model"):
        seed_generators(args.seed)
        model = load_model(args, data.task)
        if args.do_train:  # a problem is reported before the training, not when the model is saved
            model.tokenizer.check_files()
        for line in settle_threads(args, ranks.device, [model]):  # run.json, which follows, holds their number
            log.line(line)
    data = replace(data, task=with_decision(data.task, model.description, args))
    with phase("provenance"):
        record = _provenance(given, data, model, ranks, log, by_name)
    with phase("tokenize"):
        splits = tokenize_splits(args, data, model, log)
        check_calibratable(args, data.task, splits)
        compare_inputs(ranks, data.task, splits, model, by_name)
    return RunInputs(data, model, splits, weights, record)


def _read_data(args: Arguments, log: ConsoleLog) -> TaskData:
    data = load_task_data(args, needed_data(args), _finished(args))
    for line in (f"data: {data.source}", *data.warnings):
        log.line(line)
    data = replace(data, task=with_metric(args, data.task))
    for note in headline_notes(args, data.task):
        log.line(f"note: {note}")
    if args.do_predict:
        check_predictable(data.task)
    return data


def needed_data(args: Arguments) -> frozenset[str]:
    """The groups of splits that the flags need, out of "train", "evaluation" and "test"."""
    wanted = {
        "train": args.do_train,
        "evaluation": args.do_eval or (args.do_train and args.eval_strategy != "no"),
        "test": args.do_predict,
    }
    return frozenset(name for name, is_wanted in wanted.items() if is_wanted)


def _finished(args: Arguments) -> GlueTask | None:
    """The task of a fine-tuned model that defines the classes of own data: without training and without a task name."""
    has_own_data = args.dataset_name or args.train_file or args.validation_file or args.test_file
    return finished_task(args) if has_own_data and not args.task_name and not args.do_train else None


def weights_of_classes(args: Arguments, data: TaskData) -> np.ndarray | None:
    """The weights of `--class_weights`, from the rows that are trained on. None without the flag."""
    if not args.do_train or args.class_weights is None:
        return None
    labels = label_array(data.task, _chosen_rows(args, data, "train").labels)
    return class_weights(args.class_weights, data.task, labels)


def _provenance(
    args: Arguments,
    data: TaskData,
    model: LoadedModel,
    ranks: DistributedContext,
    log: ConsoleLog,
    weights: dict[str, float] | None,
) -> dict:
    """The beginning of run.json, compared with that of `--repeat`. {} on ranks that do not write it."""
    if not ranks.is_first:
        return {}
    record = provenance(args, data, model, ranks, weights)
    if not args.do_train:
        check_output_folder(Path(args.output_dir), record)
    if args.repeat:
        for line in check_inputs(read_run(args.repeat), record):
            log.line(f"note: {line}")
    return record


def tokenize_splits(args: Arguments, data: TaskData, model: LoadedModel, log: ConsoleLog) -> dict[str, TokenSplit]:
    """Token ids and labels of every split, limited to `--max_*_samples`.

    Raises:
        DataError: a split has no rows, or a row has no space for windows beside its other text.
        UsageError: with `--doc_stride` no row has space for windows.
    """
    limit, windows = model.row_limit(args.max_seq_length), Windows.of(args)
    if limit < args.max_seq_length:
        log.line(f"note: --max_seq_length {args.max_seq_length} exceeds the {limit} positions of the model")
    splits = {}
    for name in data.splits:
        split = _chosen_rows(args, data, name)
        table, how = tokenize(
            model.tokenizer, split, limit, windows=windows, refresh=args.overwrite_cache,
            threads=args.preprocessing_num_workers,
        )  # fmt: skip
        labels = None if split.labels is None else label_array(data.task, split.labels)
        splits[name] = TokenSplit(name, table, labels)
        mean = float(table.offsets[-1]) / len(table)
        log.line(f"{name}: {len(table)} rows, {mean:.1f} tokens per row, {how}")
        for line in _length_notes(table, limit, windows):
            log.line(f"note: {name}: {line}")
    return splits


def _length_notes(table: TokenTable, limit: int, windows: Windows | None) -> list[str]:
    """Log lines about rows longer than `limit` tokens, with the flags that change how they are read."""
    found, of_all = [], f"of {len(table)} rows are"
    if table.windowed_rows:
        found.append(f"{table.windowed_rows} {of_all} longer than {limit} tokens and become {table.windows} windows")
    if table.cut_rows:
        found.append(cut_note(f"{table.cut_rows} {of_all}", limit, windows))
    return found


def _chosen_rows(args: Arguments, data: TaskData, name: str) -> Split:
    """The rows of a split that `--max_*_samples` and `--shuffle_train_dataset` select.

    Raises:
        DataError: no rows are left.
    """
    split, rows = data.splits[name], args.max_predict_samples
    if name == "train":
        rows = args.max_train_samples
    elif name in {evaluated for evaluated, _, _ in data.task.evaluation}:
        rows = args.max_eval_samples
    if name == "train" and args.shuffle_train_dataset and rows is not None:
        split = split.rows(np.random.default_rng(args.shuffle_seed).permutation(len(split))[:rows].tolist())
    split = split if rows is None else split.take(rows)
    if not len(split):
        raise DataError(f"{split.origin}: {name} has no rows")
    return split
