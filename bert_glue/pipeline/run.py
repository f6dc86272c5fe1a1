"""The recipe: arguments -> data -> model -> train -> evaluate -> predict -> results.

Each step is one function below; `run` is their order and keeps the times.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bert_glue.config.arguments import Arguments
from bert_glue.config.checks import check_metric_of_data, metric_names
from bert_glue.config.expectations import missed, read_expectations
from bert_glue.config.repeat import check_inputs, check_outcome, read_run
from bert_glue.config.resolve import for_ranks
from bert_glue.data.batching import TokenSplit
from bert_glue.data.sources import Split, TaskData, load_task_data
from bert_glue.data.tokenization import tokenize
from bert_glue.devices.distributed import DistributedContext
from bert_glue.devices.rng import seed_generators
from bert_glue.errors import DataError, ExpectationError, Failures, FollowUpError
from bert_glue.evaluation.evaluator import EvaluationStopped, Evaluator
from bert_glue.hub import upload
from bert_glue.launch.requirements import stack_warnings
from bert_glue.model import adapters
from bert_glue.model.classifier import LoadedModel
from bert_glue.model.description import describe, read_description
from bert_glue.model.loading import finished_task, load_model, model_folder
from bert_glue.pipeline import outputs
from bert_glue.pipeline.rank_agreement import compare_inputs, compare_settings
from bert_glue.pipeline.score import Scored, check_predictable, facts, score_splits, train_results
from bert_glue.precision.plan import PrecisionPlan, plan_precision
from bert_glue.results.earlier import check_output_folder, remove_scores_of_other_weights
from bert_glue.results.provenance import provenance, with_outcome
from bert_glue.storage import checkpoint, files
from bert_glue.storage.files import make_own_folder
from bert_glue.storage.lock import FolderLock
from bert_glue.tasks import GlueTask
from bert_glue.training.class_weights import class_weights, named
from bert_glue.training.console import ConsoleLog, StopSignals, Trackers
from bert_glue.training.embedding_rows import NarrowedEmbedding, narrow
from bert_glue.training.resume import save_checkpoint, say_if_gone, whole_weights
from bert_glue.training.setup import build_collator, fine_tune, make_precision
from bert_glue.training.state import TrainProgress, TrainState
from bert_glue.training.throughput import Phases, seconds_since_process_start

if TYPE_CHECKING:
    from bert_glue.training.compile import Compiled


def run(args: Arguments) -> int:
    """All steps of one process of a run.

    Returns:
        The exit code: 0, or 128 + signal if one ended training (a checkpoint was saved).

    Raises:
        ExpectationError: the results, which are written, miss a bound of `--expect`.
        UserError: a mistake that the user can mend, with its exit code.
    """
    ranks = DistributedContext(args)
    compare_settings(ranks, args)
    trackers = Trackers(args, ranks.is_first)
    shows = ranks.is_first and args.log_level in ("debug", "info")
    log = ConsoleLog(shows, not args.disable_tqdm)
    signals = StopSignals()
    try:
        place = upload.claim(args) if args.push_to_hub and ranks.is_first else None
        with FolderLock(Path(args.output_dir), is_holder=ranks.is_first) as lock:
            if ranks.is_first:
                with files.plain_errors(lock.folder):
                    checkpoint.finish_interrupted(lock.folder)
            for note in filter(None, (lock.note, *trackers.notes, *stack_warnings())):
                log.line(f"note: {note}")
            failures = Failures(is_alone=ranks.world_size == 1, passes=(EvaluationStopped,))
            results = _steps(args, ranks, log, trackers, signals, failures=failures)
        for line in outputs.figures(results) if args.log_level == "debug" else []:
            log.line(line)
        for line in outputs.summary(results, Path(args.output_dir)):
            log.line(line)
        # The first rank's count: it writes, and speeds differ a little between ranks.
        outcome = missed(results.get("expectations", [])), failures.lines, failures.exit_code
        lines, failed, failed_code = ranks.all_gather_object(outcome)[0]
        code = _agree_to_leave(ranks, signals)
        if failed:
            raise FollowUpError("\n".join(failed), failed_code)
        if lines:
            raise ExpectationError("\n".join(lines))
    finally:
        log.close()
        for line in trackers.close():
            log.line(f"note: {line}")
    ranks.close()  # not after an error: the others may never answer
    if place and code == 0:
        log.line(f"sent to {upload.push(args, place)}")
    return code


def _steps(
    args: Arguments, ranks: DistributedContext, log: ConsoleLog, trackers: Trackers, signals: StopSignals, *,
    failures: Failures,
) -> dict:  # fmt: skip
    phase = Phases()
    given = args
    args = _at_trained_length(_with_sample_model(_settle_flags(args, ranks, log), ranks), log)
    data, model, record, splits, weights = _read_inputs(args, given, ranks, log, phase)
    if args.do_train and ranks.is_first:
        model.description = describe(args, data, model.tokenizer, _length(args, model), record)
    plan = plan_precision(args, ranks.device)
    _log_choices(args, model, plan, log)
    if log.is_shown and "train" in splits:
        outputs.show_example(data, splits["train"], model, log)
    evaluator, narrowed = _on_device(args, model, splits, plan, ranks, signals)
    state: TrainState | None = None
    results: dict = facts(args, data, model, plan, ranks)
    with phase("compile") if args.torch_compile else nullcontext():
        compiled = _compile(args, model, evaluator, splits, log)
    with phase("train"):
        if args.do_train:
            state = fine_tune(args, data.task, splits, model=model, evaluator=evaluator, narrowed=narrowed, log=log,
                              trackers=trackers, signals=signals, phases=phase, class_weights=weights)  # fmt: skip
            results |= train_results(state, plan)
    is_stopped = _is_stopped(ranks, signals)
    scored = Scored()
    failures.is_saved = state is not None and not is_stopped
    with phase("save"):
        if failures.is_saved:
            _save_model(state)
    if not is_stopped:
        with state.learner.averaged() if state else nullcontext():
            scored = score_splits(args, data, model, splits, evaluator, failures=failures, phase=phase)
        results |= scored.results
        is_stopped = scored.is_stopped
    with phase("save"):
        if state is not None:
            _save_unfinished(state)
    if compiled:
        results |= compiled.summary(evaluator.collate.shapes, log)
    results["peak_memory_bytes"] = max(ranks.all_gather_object(ranks.device.peak_memory()))
    results |= {"seconds": phase.seconds, "e2e_runtime": seconds_since_process_start()}
    results |= {"stopped_by_signal": True} if is_stopped else _judged(args, data.task, results)
    if ranks.is_first:
        progress = state.progress if state else TrainProgress()
        trackers.log_results(results, progress.step)
        with files.plain_errors(Path(args.output_dir)):
            record = with_outcome(record, Path(args.output_dir), results, failures.is_saved, progress.changes)
            outputs.write_results(args, data, results, progress.history, record=record, analysis=scored.analysis,
                                  failures=failures)  # fmt: skip
        if args.repeat and not is_stopped:
            log.line(check_outcome(read_run(args.repeat), record))
    return results


def _settle_flags(args: Arguments, ranks: DistributedContext, log: ConsoleLog) -> Arguments:
    """The flags with what follows from the number of ranks; says on what and how the run goes."""
    log.line(f"device: {ranks.device.torch_device} ({ranks.device.name}), {ranks.world_size} rank(s)")
    args, derived = for_ranks(args, ranks.world_size)
    for line in (*(f"note: {notice}" for notice in args.notices), *derived):
        log.line(line)
    return args


def _read_inputs(
    args: Arguments, given: Arguments, ranks: DistributedContext, log: ConsoleLog, phase: Phases
) -> tuple[TaskData, LoadedModel, dict, dict[str, TokenSplit], np.ndarray | None]:
    """Data, model, the beginning of run.json, the tokenized splits and the weights of the classes.

    Args:
        given: the flags as the user gave them.
    """
    with phase("data"):
        data = _read_data(args, log)
        weights = _class_weights(args, data)
        by_name = named(data.task, weights)
    with phase("model"):
        seed_generators(args.seed)
        model = load_model(args, data.task)
    with phase("provenance"):
        record = _provenance(given, data, model, ranks, log, by_name)
    with phase("tokenize"):
        splits = _tokenize(args, data, model, log)
        compare_inputs(ranks, data.task, splits, model, by_name)
    return data, model, record, splits, weights


def _on_device(
    args: Arguments,
    model: LoadedModel,
    splits: dict[str, TokenSplit],
    plan: PrecisionPlan,
    ranks: DistributedContext,
    signals: StopSignals,
) -> tuple[Evaluator, NarrowedEmbedding | None]:
    """The model on its device in the plan's precision, ready to evaluate and to train."""
    if args.cuda_graph:
        from bert_glue.training.cuda_graphs import check_recordable

        check_recordable(model, plan, ranks.device)
    narrowed = narrow(args, model, splits)
    model.module.to(ranks.device.torch_device)
    precision = make_precision(args, plan, model.module, ranks)
    collate = build_collator(args, model, ranks, narrowed)
    batch_size = args.per_device_eval_batch_size
    return Evaluator(model.module, collate, batch_size, ranks, precision, signals.is_requested), narrowed


def _compile(
    args: Arguments, model: LoadedModel, evaluator: Evaluator, splits: dict[str, TokenSplit], log: ConsoleLog
) -> Compiled | None:
    """What `--torch_compile` compiled, None without it."""
    if not args.torch_compile:
        return None
    from bert_glue.training.compile import compile_model

    return compile_model(args, model, evaluator, splits, log)


def _judged(args: Arguments, task: GlueTask, results: dict) -> dict:
    """`expectations` of a finished run, where `--expect` gave some."""
    if args.expect is None:
        return {}
    bounds = read_expectations(args.expect, args.task_name, metric_names(task))
    return {"expectations": [bound.judge(results) for bound in bounds]}


def _class_weights(args: Arguments, data: TaskData) -> np.ndarray | None:
    """What `--class_weights` gives each class, from the rows that are trained on."""
    if not args.do_train or args.class_weights is None:
        return None
    return class_weights(args.class_weights, data.task, _chosen_rows(args, data, "train").labels)


def _provenance(
    args: Arguments,
    data: TaskData,
    model: LoadedModel,
    ranks: DistributedContext,
    log: ConsoleLog,
    weights: dict[str, float] | None,
) -> dict:
    """The beginning of run.json, held against that of the run to be repeated; {} on ranks that do not write it."""
    if not ranks.is_first:
        return {}
    record = provenance(args, data, model, ranks, weights)
    if not args.do_train:
        check_output_folder(Path(args.output_dir), record)
    if args.repeat:
        for line in check_inputs(read_run(args.repeat), record):
            log.line(f"note: {line}")
    return record


def _agree_to_leave(ranks: DistributedContext, signals: StopSignals) -> int:
    """The exit code of all ranks: 0, or 128 + signal if any of them got one.

    No rank goes before all results are written: a launcher ends the others when one has left.
    """
    numbers = [number for number in ranks.all_gather_object(signals.number) if number is not None]
    signals.ignore()
    return 128 + max(numbers) if numbers else 0


def _is_stopped(ranks: DistributedContext, signals: StopSignals) -> bool:
    """True on every rank if a signal asked any of them to stop; all end with that signal's exit code."""
    found = next(filter(None, ranks.all_gather_object(signals.number)), None)
    if found is not None:  # never set to None: a signal may come at any moment
        signals.number = found
    return found is not None


def _save_model(state: TrainState) -> None:
    """The model of a finished training, before it is scored: whatever fails there, the weights are safe."""
    if not state.ranks.is_first:
        return
    say_if_gone(state)
    model = state.learner.model
    weights = whole_weights(state)
    checkpoint.replace_files(state.output_dir, lambda folder: model.save(folder, weights))
    remove_scores_of_other_weights(state.output_dir)
    folder = state.output_dir / adapters.FOLDER
    if model.adapter is not None:
        with files.plain_errors(folder):
            make_own_folder(folder)
        checkpoint.replace_files(folder, lambda aside: model.adapter.save(aside, weights))
    elif folder.exists():
        state.observers.log.line(f"note: {folder}: of an earlier run, not of this one")


def _save_unfinished(state: TrainState) -> None:
    """If a signal came, the checkpoint that the run can be finished from."""
    if _is_stopped(state.ranks, state.signals) and state.checkpoints.saved_step != state.progress.step:
        with state.checkpoints.saver:
            save_checkpoint(state)


def _finished(args: Arguments) -> GlueTask | None:
    """What a model that is not trained here was trained on, where it says what the classes of own data are."""
    has_own_data = args.dataset_name or args.train_file or args.validation_file or args.test_file
    return finished_task(args) if has_own_data and not args.task_name and not args.do_train else None


def _needed(args: Arguments) -> frozenset[str]:
    """Which data the flags ask for."""
    wanted = {
        "train": args.do_train,
        "evaluation": args.do_eval or (args.do_train and args.eval_strategy != "no"),
        "test": args.do_predict,
    }
    return frozenset(name for name, is_wanted in wanted.items() if is_wanted)


def _read_data(args: Arguments, log: ConsoleLog) -> TaskData:
    data = load_task_data(args, _needed(args), _finished(args))
    for line in (f"data: {data.source}", *data.warnings):
        log.line(line)
    check_metric_of_data(args, data.task)
    if args.do_predict:
        check_predictable(data.task)
    return data


def _with_sample_model(args: Arguments, ranks: DistributedContext) -> Arguments:
    """With `--sample` and no model, the tiny BERT made on the spot."""
    if not args.sample or args.model_name_or_path:
        return args
    from bert_glue.data.sample import make_tiny_bert

    folder = Path(args.output_dir) / "sample_bert"
    if ranks.is_first:
        with files.plain_errors(folder):
            make_tiny_bert(folder)
    ranks.barrier()
    return replace(args, model_name_or_path=str(folder))


def _at_trained_length(args: Arguments, log: ConsoleLog) -> Arguments:
    """Without training and without `--max_seq_length`, rows are cut as in the model's training."""
    if args.do_train or not args.is_default("max_seq_length"):
        return args
    length = read_description(model_folder(args.model_name_or_path, args)).get("max_seq_length")
    if length in (None, args.max_seq_length):
        return args
    log.line(f"note: --max_seq_length {length}, as the model was trained (the default is {args.max_seq_length})")
    return replace(args, max_seq_length=length)


def _length(args: Arguments, model: LoadedModel) -> int:
    """Tokens a row is cut to."""
    return min(args.max_seq_length, model.position_limit)


def _tokenize(args: Arguments, data: TaskData, model: LoadedModel, log: ConsoleLog) -> dict[str, TokenSplit]:
    """Token ids and labels of every split, cut to `--max_*_samples`."""
    limit = _length(args, model)
    if limit < args.max_seq_length:
        log.line(f"note: --max_seq_length {args.max_seq_length} is over the model's {limit} positions: {limit} is used")
    dtype = np.float32 if data.task.is_regression else np.int64
    splits = {}
    for name in data.splits:
        split = _chosen_rows(args, data, name)
        table, how = tokenize(model.tokenizer, split, limit, args.overwrite_cache, args.preprocessing_num_workers)
        labels = None if split.labels is None else np.asarray(split.labels, dtype)
        splits[name] = TokenSplit(name, table, labels)
        mean = float(table.offsets[-1]) / len(table)
        log.line(f"{name}: {len(table)} rows, {mean:.1f} tokens a row, {how}")
    return splits


def _chosen_rows(args: Arguments, data: TaskData, name: str) -> Split:
    """The rows of a split that `--max_*_samples` and `--shuffle_train_dataset` leave.

    Raises:
        DataError: there are none.
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
        raise DataError(f"{split.origin}: no rows")
    return split


def _log_choices(args: Arguments, model: LoadedModel, plan, log: ConsoleLog) -> None:
    path = "packed: real tokens only" if model.is_packed else f"padded, {model.why_padded}"
    log.line(f"precision: {plan.name}; batches: {path}")
    if model.frozen:
        log.line(f"trained: {model.trained}")
    for line in (*model.notes, plan.note):
        if line:
            log.line(f"note: {line}")
