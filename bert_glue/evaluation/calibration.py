"""`--calibrate`: chooses a temperature, and a threshold for binary and multi-label tasks, on labelled rows.

The logits are divided by the temperature, so that probabilities match frequencies (Guo et al. 2017, arXiv 1706.04599).
A class is predicted if its probability is above the threshold: the second of two classes, or every class of a
multi-label task. Figures on the rows of the choice are cross-fitted: each row is scored by a choice of other rows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from bert_glue import result_keys as keys
from bert_glue.config.arguments import Arguments
from bert_glue.data.batching import TokenSplit
from bert_glue.errors import DataError, UsageError
from bert_glue.evaluation.analysis import calibration
from bert_glue.evaluation.answers import decided, probabilities, row_losses
from bert_glue.evaluation.metrics import METRICS_OF_COUNTS, compute_metrics
from bert_glue.tasks import Decision, GlueTask

FOLDS = 5
FEWEST_ROWS = 20
# If every row is right, the best temperature is 0, which gives overconfident probabilities of 0 and 1.
LOWEST, HIGHEST = 0.05, 20.0


def check_calibratable(args: Arguments, task: GlueTask, splits: dict[str, TokenSplit]) -> None:
    """Checks before training that `--calibrate` fits the data.

    Raises:
        UsageError: the task is a regression.
        DataError: the split for the choice has too few rows.
    """
    if not args.calibrate:
        return
    if task.is_regression:
        raise UsageError("--calibrate: the labels of this data are scores, which have no probabilities; drop the flag")
    first = next(name for name, *_ in task.evaluation if name in splits)
    if len(splits[first]) < FEWEST_ROWS:
        raise DataError(
            f"--calibrate: {first} has {len(splits[first])} rows, which are too few; give {FEWEST_ROWS} or more, "
            "or drop the flag"
        )


def without_calibration(task: GlueTask, threshold: float | None = None) -> GlueTask:
    """The task without the choice of `--calibrate`.

    Args:
        threshold: `--label_threshold`.
    """
    if not task.decision.is_calibrated:
        return task
    return replace(task, decision=Decision() if threshold is None else Decision(threshold))


def choose_decision(task: GlueTask, logits: np.ndarray, labels: np.ndarray) -> Decision:
    """The temperature and threshold that fit these rows best.

    Args:
        logits: `[rows, labels]`.
        labels: `[rows]` class ids, or `[rows, labels]` bool if multi-label.
    """
    decision = Decision(temperature=fit_temperature(task, logits, labels), is_calibrated=True)
    if task.num_labels != 2 and not task.is_multi_label:
        return decision
    shares = probabilities(replace(task, decision=decision), logits)
    return replace(decision, threshold=fit_threshold(task, shares, labels))


def fit_temperature(task: GlueTask, logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the lowest mean loss, in [`LOWEST`, `HIGHEST`]."""
    from scipy.optimize import minimize_scalar

    def loss(logarithm: float) -> float:
        decision = Decision(temperature=math.exp(logarithm))
        return float(row_losses(replace(task, decision=decision), logits, labels).mean())

    # The loss is convex in 1 / temperature, so it has a single minimum on the log scale too.
    bounds = math.log(LOWEST), math.log(HIGHEST)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-7}).x)


def threshold_metric(task: GlueTask) -> str:
    """The metric that the threshold maximises: the task's F1 or Matthews correlation, else the mean F1 of both classes.

    The F1 of a single class would depend on which of the two counts as positive.
    """
    if task.is_multi_label or "f1" in task.metrics:
        return "f1"
    return task.headline if task.headline in METRICS_OF_COUNTS else "f1_macro"


def fit_threshold(task: GlueTask, shares: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the highest `threshold_metric`. Among equal ones, the one nearest to 0.5.

    Args:
        shares: `[rows, labels]` probabilities.
    """
    if task.is_multi_label:
        share, is_true = shares.ravel(), labels.ravel()
    else:
        share, is_true = shares[:, 1], labels == 1
    order = np.argsort(share)
    share, is_true = share[order], is_true[order].astype(np.int64)
    # A cut at `at` predicts the class for all values after `at`. It is only possible where the next value is larger.
    cuts = np.flatnonzero((share[1:] > share[:-1]) & (share[1:] > 0) & (share[:-1] < 1))
    if not len(cuts) or is_true.all() or not is_true.any():
        return Decision().threshold
    refused = cuts + 1
    false_negatives = is_true.cumsum()[cuts]
    true_negatives = refused - false_negatives
    true_positives = is_true.sum() - false_negatives
    false_positives = len(share) - refused - true_positives
    counts = np.stack([true_negatives, false_positives, false_negatives, true_positives], axis=1).reshape(-1, 2, 2)
    values = METRICS_OF_COUNTS[threshold_metric(task)](counts)
    below, above = share[cuts], share[cuts + 1]
    middle = (below + above) / 2
    thresholds = np.where(middle < above, middle, below)  # neighbouring floats have no value between them
    best = thresholds[values >= values.max() - 1e-12]
    nearest = best[np.abs(best - 0.5).argmin()]
    return float(np.clip(nearest, np.finfo(float).tiny, 1 - 2**-53))


def cross_fitted(task: GlueTask, logits: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `[rows, labels]` and predictions in five folds, each calibrated on the rows of the other four."""
    part = np.random.default_rng(seed).permutation(len(labels)) % FOLDS
    shares, predictions = np.empty(logits.shape), np.empty_like(labels)
    for number in range(FOLDS):
        inside = part == number
        chosen = replace(task, decision=choose_decision(task, logits[~inside], labels[~inside]))
        shares[inside] = probabilities(chosen, logits[inside])
        predictions[inside] = decided(chosen, shares[inside])
    return shares, predictions


def calibrated_results(
    task: GlueTask, shares: np.ndarray, predictions: np.ndarray, labels: np.ndarray, suffix: str
) -> dict[str, float | None]:
    """`eval_calibrated_<figure><suffix>` of a split: its loss, expected calibration error and metrics."""
    if task.is_multi_label:
        right = np.where(labels, shares, 1 - shares).ravel()
    else:
        right = shares[np.arange(len(labels)), labels]
    figures = {
        keys.LOSS: float(-np.log(np.maximum(right, np.finfo(float).tiny)).mean()),
        keys.CALIBRATION_ERROR: calibration(shares, labels)["ece"],
        **compute_metrics(task, predictions, labels),
    }
    return {keys.calibrated_key(name, suffix): value for name, value in figures.items()}


def calibration_lines(results: dict[str, Any]) -> list[str]:
    """Log lines on the choice, its rows and its effect."""
    chosen = results[keys.CALIBRATION]
    text = f"calibration: temperature {chosen['temperature']:.4g}"
    if "threshold" in chosen:
        text += f", threshold {chosen['threshold']:.4g} of {chosen['threshold_of']}"
    if not 1.001 * LOWEST < chosen["temperature"] < 0.999 * HIGHEST:
        text += f" (a limit of {LOWEST:g} to {HIGHEST:g}: the logits carry no information, or every row is right)"
    before, after = results[keys.evaluation_key(keys.CALIBRATION_ERROR)], results[keys.calibrated_key("ece")]
    lines = [
        f"{text}; expected calibration error {before:.4f}, cross-fitted {after:.4f}",
        f"note: --calibrate used the {chosen['rows']} rows of {chosen['chosen_on']}, so their scores no longer count "
        "as scores of unseen rows. eval_* are scores without calibration, eval_calibrated_* with it",
    ]
    if after >= before:
        lines.append("warning: calibration does not lower the calibration error on unseen rows; more rows may help")
    return lines


def facts_of(task: GlueTask, decision: Decision) -> dict[str, Any]:
    """The entry of a calibration in the results."""
    has_threshold = task.is_multi_label or task.num_labels == 2
    of_class = "every class" if task.is_multi_label else task.labels[-1]
    return {
        "temperature": decision.temperature,
        **({"threshold": decision.threshold, "threshold_of": of_class} if has_threshold else {}),
    }
