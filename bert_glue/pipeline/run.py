"""The pipeline of a run: arguments, data, model, training, evaluation, prediction, results.

Each step is one function; `run` calls them in order and measures their times.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from bert_glue import result_keys as keys
from bert_glue.config.arguments import Arguments
from bert_glue.config.expectations import missed, read_expectations
from bert_glue.config.metric_checks import metric_names
from bert_glue.config.repeat import check_outcome, read_run
from bert_glue.config.resolve import for_ranks
from bert_glue.data.batching import TokenSplit
from bert_glue.devices.distributed import DistributedContext
from bert_glue.errors import ExpectationError, Failures, FollowUpError
from bert_glue.evaluation.calibration import calibration_lines
from bert_glue.evaluation.evaluator import EvaluationStopped, Evaluator
from bert_glue.hub import upload
from bert_glue.launch.requirements import stack_warnings
from bert_glue.model import adapters
from bert_glue.model.classifier import LoadedModel
from bert_glue.model.description import add_calibration, describe
from bert_glue.pipeline import outputs
from bert_glue.pipeline.inputs import at_trained_length, read_inputs, with_sample_model
from bert_glue.pipeline.rank_agreement import compare_settings
from bert_glue.pipeline.score import Scored, facts, score_splits, train_results
from bert_glue.precision.plan import PrecisionPlan, plan_precision
from bert_glue.results.earlier import remove_scores_of_other_weights
from bert_glue.results.provenance import with_outcome
from bert_glue.storage import checkpoint, files
from bert_glue.storage.files import make_own_folder
from bert_glue.storage.lock import FolderLock
from bert_glue.tasks import GlueTask
from bert_glue.training.console import ConsoleLog, StopSignals, Trackers
from bert_glue.training.cuda_graphs import settle_recording
from bert_glue.training.embedding_rows import NarrowedEmbedding, narrow
from bert_glue.training.resume import save_checkpoint, say_if_gone, whole_weights
from bert_glue.training.setup import build_collator, fine_tune, make_precision
from bert_glue.training.state import TrainProgress, TrainState
from bert_glue.training.throughput import Phases, seconds_since_process_start

if TYPE_CHECKING:
    from bert_glue.training.compile import Compiled


_LESS_MEMORY = (
    "lower --per_device_train_batch_size (with --global_batch_size the result stays the same), or give "
    "--gradient_checkpointing"
)


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
            with ranks.device.plain_memory_errors(_LESS_MEMORY):
                results = _steps(args, ranks, log, trackers, signals, failures=failures)
        if args.log_level == "debug":
            for line in outputs.figures(results):
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
    args = at_trained_length(with_sample_model(_settle_flags(args, ranks, log), ranks), log)
    inputs = read_inputs(args, given, ranks, log, phase)
    data, model, splits, record = inputs.data, inputs.model, inputs.splits, inputs.record
    if args.do_train and ranks.is_first:
        model.description = describe(args, data, model.tokenizer, model.row_limit(args.max_seq_length), record)
    plan = plan_precision(args, ranks.device)
    _log_choices(args, model, plan, ranks, log)
    args = settle_recording(args, model, plan, ranks.device, log.line)
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
                              trackers=trackers, signals=signals, phases=phase,
                              class_weights=inputs.class_weights)  # fmt: skip
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
        if args.calibrate:
            _save_calibration(args, results, ranks, log, failures)
    with phase("save"):
        if state is not None:
            _save_unfinished(state)
    if compiled:
        results |= compiled.summary(evaluator.collate.shapes, log)
    results["peak_memory_bytes"] = max(ranks.all_gather_object(ranks.device.peak_memory()))
    results |= {"seconds": phase.seconds, "e2e_runtime": seconds_since_process_start()}
    results |= {keys.STOPPED_BY_SIGNAL: True} if is_stopped else _judged(args, data.task, results)
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
    """The flags, with the values that follow from the number of ranks; logs the device and the notices."""
    log.line(f"device: {ranks.device.torch_device} ({ranks.device.model_name}), {ranks.world_size} rank(s)")
    args, derived = for_ranks(args, ranks.world_size)
    for notice in args.notices:
        log.line(f"note: {notice}")
    for line in derived:
        log.line(line)
    return args


def _on_device(
    args: Arguments,
    model: LoadedModel,
    splits: dict[str, TokenSplit],
    plan: PrecisionPlan,
    ranks: DistributedContext,
    signals: StopSignals,
) -> tuple[Evaluator, NarrowedEmbedding | None]:
    """The model on its device in the plan's precision, ready to evaluate and to train."""
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


def _agree_to_leave(ranks: DistributedContext, signals: StopSignals) -> int:
    """The exit code of all ranks: 0, or 128 + signal if any of them has received one.

    No rank exits before all results are written, because a launcher ends the others when one has exited.
    """
    numbers = [number for number in ranks.all_gather_object(signals.number) if number is not None]
    signals.ignore()
    return 128 + max(numbers) if numbers else 0


def _is_stopped(ranks: DistributedContext, signals: StopSignals) -> bool:
    """True on every rank if a signal has asked any of them to stop; all exit with the code of that signal."""
    found = next(filter(None, ranks.all_gather_object(signals.number)), None)
    if found is not None:  # never set to None: a signal may come at any moment
        signals.number = found
    return found is not None


def _save_model(state: TrainState) -> None:
    """Save the model after training and before scoring, so that no failure in scoring can lose the weights."""
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


def _save_calibration(
    args: Arguments, results: dict, ranks: DistributedContext, log: ConsoleLog, failures: Failures
) -> None:
    """Saves the choice of `--calibrate` beside the weights for which it was made."""
    chosen = results.get(keys.CALIBRATION)
    if chosen is None or not ranks.is_first:
        return
    with failures.step("writing the calibration"), files.plain_errors(Path(args.output_dir)):
        add_calibration(Path(args.output_dir), chosen)
    for line in calibration_lines(results):
        log.line(line)


def _save_unfinished(state: TrainState) -> None:
    """After a signal, save the checkpoint from which the run can continue."""
    if _is_stopped(state.ranks, state.signals) and state.checkpoints.saved_step != state.progress.step:
        with state.checkpoints.saver:
            save_checkpoint(state)


def _log_choices(
    args: Arguments, model: LoadedModel, plan: PrecisionPlan, ranks: DistributedContext, log: ConsoleLog
) -> None:
    path = "packed: real tokens only" if model.is_packed else f"padded, {model.why_padded}"
    products = f", {ranks.device.fp32_products} products" if ranks.device.fp32_products else ""
    log.line(f"precision: {plan.name}{products}; batches: {path}")
    if plan.level not in ("O0", args.fp16_opt_level):
        log.line(
            f"note: --bf16 alone means {plan.level} on this device, with fp32 master weights; "
            f"--fp16_opt_level {args.fp16_opt_level} gives autocast"
        )
    if model.frozen:
        log.line(f"trained: {model.trained}")
    for line in (*model.notes, plan.note):
        if line:
            log.line(f"note: {line}")
