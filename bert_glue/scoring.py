"""The recipe's steps after training: score every labelled split, predict every test split."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from bert_glue import checkpoint, reporting
from bert_glue import result_keys as keys
from bert_glue.analysis import LABELLED_AX, analyse_splits, diagnostic, standard_errors
from bert_glue.arguments import Arguments
from bert_glue.batching import TokenSplit
from bert_glue.errors import DataError
from bert_glue.evaluation import Evaluator, evaluate, predictions_of
from bert_glue.model import LoadedModel
from bert_glue.sources import TaskData
from bert_glue.tasks import GlueTask, companions


def evaluate_splits(
    args: Arguments,
    data: TaskData,
    model: LoadedModel,
    splits: dict[str, TokenSplit],
    evaluator: Evaluator,
    analysis: dict,
) -> dict:
    """`eval_*` results of every labelled split; fills `analysis` on the first rank."""
    kept: dict[str, np.ndarray] = {}
    results = evaluate(evaluator, data.task, splits, kept)
    if evaluator.ranks.is_first:
        analysis["splits"] = analyse_splits(data, model, splits, evaluator, kept, args.explain)
        results |= standard_errors(data.task, analysis["splits"])
    return results


def predict_splits(
    args: Arguments, data: TaskData, splits: dict[str, TokenSplit], evaluator: Evaluator, analysis: dict
) -> dict:
    """Write `predict_results_<task>.txt` of every test split, companions included; diagnostics go into `analysis`."""
    results = {}
    for task, name, suffix in _prediction_splits(data.task, splits):
        begin = time.perf_counter()
        predictions = predictions_of(task, evaluator.logits(splits[name]))
        results[keys.predicted_samples_key(task.name, suffix)] = len(splits[name])
        rate = len(predictions) / (time.perf_counter() - begin)
        results[keys.predicted_samples_per_second_key(task.name, suffix)] = rate
        if evaluator.ranks.is_first:
            with checkpoint.plain_errors(Path(args.output_dir)):
                reporting.write_predictions(Path(args.output_dir), task, suffix, predictions)
            if task.predicted_with:
                results |= _diagnose(args, task, predictions, analysis)
    return results


def check_predictable(task: GlueTask) -> None:
    """Before training: raises DataError where a class name cannot stand in `predict_results_<task>.txt`."""
    for name in task.labels:
        if any(sign in name for sign in "\t\n\r"):
            raise DataError(
                f"--do_predict: class {name!r} has a tab or line break, which predict_results_{task.name}.txt cannot "
                "hold; rename the class, or run python -m bert_glue.predict instead, which writes csv"
            )


def _diagnose(args: Arguments, task: GlueTask, predictions: np.ndarray, analysis: dict) -> dict:
    """Adds a companion's scores by category to `analysis`, or says why not; a broken file must not cost the run."""
    try:
        found = diagnostic(task, args.data_path, predictions)
    except DataError as error:
        return {keys.diagnostic_reason_key(task.name): str(error)}
    if found is None:
        return {keys.diagnostic_reason_key(task.name): f"scores by category need GLUE's {LABELLED_AX} in --data_path"}
    analysis["diagnostic"] = found
    return {}


def _prediction_splits(task: GlueTask, splits: dict[str, TokenSplit]) -> list[tuple[GlueTask, str, str]]:
    own = [(task, name, suffix) for name, suffix in task.test if name in splits]
    others = [
        (o, f"{o.name}:{name}", s) for o in companions(task) for name, s in o.test if f"{o.name}:{name}" in splits
    ]
    return own + others
