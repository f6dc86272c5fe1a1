"""The steps after training: scores the labelled splits, predicts the test splits, and describes the run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bert_glue import result_keys as keys
from bert_glue.config.arguments import Arguments
from bert_glue.config.resolve import samples_per_step
from bert_glue.data.batching import TokenSplit
from bert_glue.data.chunked_encoding import Windows
from bert_glue.data.sources import TaskData
from bert_glue.devices.distributed import DistributedContext
from bert_glue.errors import DataError, Failures
from bert_glue.evaluation.analysis import (
    LABELLED_AX,
    analyse_splits,
    calibration,
    class_results,
    diagnostic,
    standard_errors,
)
from bert_glue.evaluation.answers import predictions_of, probabilities
from bert_glue.evaluation.calibration import (
    calibrated_results,
    choose_decision,
    cross_fitted,
    facts_of,
    without_calibration,
)
from bert_glue.evaluation.collapse import constant_loss, flat_loss
from bert_glue.evaluation.evaluator import EvaluationStopped, Evaluator, evaluate
from bert_glue.model.attention import PATHS_TAKEN
from bert_glue.model.classifier import LoadedModel
from bert_glue.pipeline import outputs
from bert_glue.storage import files
from bert_glue.tasks import GlueTask, also_predicted
from bert_glue.training.class_weights import named
from bert_glue.training.state import TrainState
from bert_glue.training.throughput import Phases


@dataclass
class Scored:
    """The outcome of evaluation and prediction.

    Args:
        results: the `eval_*` and `predict_*` figures.
        analysis: the content of analysis.json, on the first rank only.
        is_stopped: True if a signal interrupted it.
    """

    results: dict[str, Any] = field(default_factory=dict)
    analysis: dict[str, Any] = field(default_factory=dict)
    is_stopped: bool = False


def score_splits(
    args: Arguments,
    data: TaskData,
    model: LoadedModel,
    splits: dict[str, TokenSplit],
    evaluator: Evaluator,
    *,
    failures: Failures,
    phase: Phases,
) -> Scored:
    """Evaluates and predicts as the flags demand. A failure of one does not stop the other."""
    scored = Scored()
    try:
        with phase("evaluate"), failures.step("evaluation", is_collective=True):
            if args.do_eval:
                data = _evaluate_splits(args, data, model, splits, evaluator, failures=failures, scored=scored)
        with phase("predict"), failures.step("prediction", is_collective=True):
            if args.do_predict:
                scored.results |= predict_splits(args, data, splits, evaluator, scored.analysis)
    except EvaluationStopped:
        scored.is_stopped = True
    return scored


def _evaluate_splits(
    args: Arguments,
    data: TaskData,
    model: LoadedModel,
    splits: dict[str, TokenSplit],
    evaluator: Evaluator,
    *,
    failures: Failures,
    scored: Scored,
) -> TaskData:
    """Adds the `eval_*` results of every labelled split, and on the first rank their analysis, to `scored`.

    The `eval_*` scores never include a calibration, so they are comparable with and without one.

    Returns:
        The data with the decision (temperature and threshold) for predictions.
    """
    kept: dict[str, np.ndarray] = {}
    raw = replace(data, task=without_calibration(data.task, args.label_threshold))
    scored.results |= evaluate(evaluator, raw.task, splits, kept)
    if evaluator.ranks.is_first:
        with failures.step("the analysis"):
            found = analyse_splits(raw, model, splits, evaluator, kept, args.explain)
            scored.analysis["splits"] = found
            # The exact metrics replace the rounded shares of classes.
            scored.results |= {**standard_errors(data.task, found), **class_results(found), **scored.results}
    if args.calibrate or data.task.decision.is_calibrated:
        with failures.step("the calibration"):
            data = _calibrate(args, data, model, splits, kept, scored=scored)
    return data


def _calibrate(
    args: Arguments,
    data: TaskData,
    model: LoadedModel,
    splits: dict[str, TokenSplit],
    kept: dict[str, np.ndarray],
    *,
    scored: Scored,
) -> TaskData:
    """With `--calibrate`, chooses a decision on the first evaluated split. Scores every split by it, on every rank.

    Args:
        kept: the logits of the evaluated splits.
    """
    task, first = data.task, next(iter(kept))
    if args.calibrate:
        task = replace(task, decision=choose_decision(task, kept[first], splits[first].labels))
    for name, suffix, _ in task.evaluation:
        if name not in kept:
            continue
        labels, logits = splits[name].labels, kept[name]
        if args.calibrate and name == first:  # the decision was chosen on these rows, so score them by folds
            shares, predictions = cross_fitted(data.task, logits, labels, args.seed)
        else:
            shares, predictions = probabilities(task, logits), predictions_of(task, logits)
        before = calibration(probabilities(without_calibration(task), logits), labels)["ece"]
        scored.results[keys.evaluation_key(keys.CALIBRATION_ERROR, suffix)] = before
        scored.results |= calibrated_results(task, shares, predictions, labels, suffix)
    chosen = {**facts_of(task, task.decision), "chosen_on": first, "rows": len(splits[first].labels)}
    scored.results[keys.CALIBRATION] = chosen if args.calibrate else model.description["calibration"]
    return replace(data, task=task)


def predict_splits(
    args: Arguments, data: TaskData, splits: dict[str, TokenSplit], evaluator: Evaluator, analysis: dict
) -> dict:
    """Writes `predict_results_<task>.txt` for every test split, and adds the diagnostic's scores to `analysis`."""
    results = {}
    for task, name, suffix in _prediction_splits(data.task, splits):
        begin = time.perf_counter()
        predictions = predictions_of(task, evaluator.logits(splits[name]))
        results[keys.predicted_samples_key(task.name, suffix)] = len(splits[name])
        rate = len(predictions) / (time.perf_counter() - begin)
        results[keys.predicted_samples_per_second_key(task.name, suffix)] = rate
        counts = splits[name].table.row_counts
        results |= {keys.predicted_key(figure, task.name, suffix): count for figure, count in counts.items()}
        if evaluator.ranks.is_first:
            with files.plain_errors(Path(args.output_dir)):
                outputs.write_predictions(Path(args.output_dir), task, suffix, predictions)
            if task.predicted_with:
                results |= _diagnose(args, task, predictions, analysis)
    return results


def check_predictable(task: GlueTask) -> None:
    """Raises DataError before training if `predict_results_<task>.txt` cannot hold a class name."""
    for name in task.labels:
        if any(sign in name for sign in "\t\n\r"):
            raise DataError(
                f"--do_predict: class {name!r} has a tab or line break, which predict_results_{task.name}.txt cannot "
                "hold; rename the class, or run python -m bert_glue.predict instead, which writes csv"
            )


def _diagnose(args: Arguments, task: GlueTask, predictions: np.ndarray, analysis: dict) -> dict:
    """Adds the diagnostic's scores by category to `analysis`. Without them it returns the reason, as a result."""
    try:
        found = diagnostic(task, args.data_path, predictions)
    except DataError as error:
        return {keys.diagnostic_reason_key(task.name): str(error)}
    if found is None:
        return {keys.diagnostic_reason_key(task.name): f"scores by category need {LABELLED_AX} of GLUE in --data_path"}
    analysis["diagnostic"] = found
    return {}


def _prediction_splits(task: GlueTask, splits: dict[str, TokenSplit]) -> list[tuple[GlueTask, str, str]]:
    """(task, key in `splits`, suffix of its results) of every test split, those of other tasks last."""
    found = [(task, name, suffix) for name, suffix in task.test]
    for other in also_predicted(task):
        found += [(other, f"{other.name}:{name}", suffix) for name, suffix in other.test]
    return [row for row in found if row[1] in splits]


def facts(args: Arguments, data: TaskData, model: LoadedModel, plan, ranks: DistributedContext) -> dict:
    """The description of the run for every results file."""
    windows = Windows.of(args)
    return {
        "task_name": data.task.name,
        "headline_metric": data.task.headline,
        "problem_type": data.task.problem_type,
        "label_threshold": data.task.decision.threshold if data.task.is_multi_label else None,
        "text_columns": list(data.task.columns),
        "model_name_or_path": args.model_name_or_path,
        "data": data.source,
        "sample_data": data.is_sample,
        "device": str(ranks.device.torch_device),
        "device_name": ranks.device.name,
        "world_size": ranks.world_size,
        "precision": plan.name,
        "fallback": plan.note,
        "trained": model.trained,
        "batches": "packed" if model.is_packed else "padded",
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "global_batch_size": samples_per_step(args, ranks.world_size),
        "learning_rate": args.learning_rate,
        "max_seq_length": args.max_seq_length,
        **({"doc_stride": windows.stride, "max_windows": windows.most} if windows else {}),
        "seed": args.seed,
    }


def train_results(state: TrainState, plan) -> dict:
    """The `train_*` results, summed over all ranks."""
    meter, ranks, progress = state.observers.meter, state.ranks, state.progress
    summed = state.learner.precision.summed
    weights = state.data.class_weights
    constant = constant_loss(state.task, state.data.split.labels, state.args.label_smoothing_factor, weights)
    own = [meter.samples, meter.windows, meter.real_tokens, meter.computed_tokens, meter.flops]
    names = ("samples", "windows", "real_tokens", "computed_tokens", "flops")
    of_ranks = ranks.all_gather_object(own)
    totals = {name: sum(counts) for name, *counts in zip(names, *of_ranks, strict=True)}
    return {
        keys.TRAIN_LOSS: progress.loss_sum / max(1, progress.step),
        keys.TRAIN_RUNTIME: meter.runtime,
        keys.TRAIN_STEPS: progress.step,
        keys.TRAIN_COLLAPSED: flat_loss(progress.history, constant),
        "attention": sorted(PATHS_TAKEN),
        "optimizer": state.learner.optimizer_name,
        keys.TRAIN_SKIPPED_UPDATES: state.learner.precision.skipped_steps,
        keys.TRAIN_SAMPLES_CONSUMED: progress.samples,
        keys.TRAIN_SAMPLES: state.data.sampler.rows,
        **({} if weights is None else {keys.CLASS_WEIGHTS: named(state.task, weights)}),
        **{keys.training_key(figure): count for figure, count in state.data.split.table.row_counts.items()},
        "epoch": state.epoch,
        # Per step and rank. Null with apex, which sums gradients itself.
        keys.TRAIN_GRADIENT_BYTES: summed.bytes if summed.gradients else None,
        keys.SECONDS_TO_FIRST_STEP: meter.to_first_step,
        **meter.rates(totals, plan.dtype),
    }
