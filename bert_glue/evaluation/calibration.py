"""`--calibrate`: a temperature, and for yes-or-no answers a threshold, chosen on labelled rows.

The temperature divides the logits so that probabilities come true (Guo et al. 2017, arXiv 1706.04599). The threshold
is the probability above which a class is given: of the second class where there are two, of every class where a row
may have several. Figures on the rows that chose them are cross-fitted: each row's decision is chosen by the others.
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
# Where every row is right the best temperature is 0: probabilities of 0 and 1, which no row has earned.
LOWEST, HIGHEST = 0.05, 20.0


def check_calibratable(args: Arguments, task: GlueTask, splits: dict[str, TokenSplit]) -> None:
    """Hold `--calibrate` against the data, before training.

    Raises:
        UsageError: the task is a regression.
        DataError: the split that it is chosen on has too few rows.
    """
    if not args.calibrate:
        return
    if task.is_regression:
        raise UsageError("--calibrate: the labels of this data are scores, which have no probabilities; leave it out")
    first = next(name for name, *_ in task.evaluation if name in splits)
    if len(splits[first]) < FEWEST_ROWS:
        raise DataError(
            f"--calibrate: {len(splits[first])} rows of {first} choose nothing that holds; give {FEWEST_ROWS} or more, "
            "or leave the flag out"
        )


def without_calibration(task: GlueTask, threshold: float | None = None) -> GlueTask:
    """The same task without what `--calibrate` chose.

    Args:
        threshold: of `--label_threshold`.
    """
    if not task.decision.is_calibrated:
        return task
    return replace(task, decision=Decision() if threshold is None else Decision(threshold))


def choose_decision(task: GlueTask, logits: np.ndarray, labels: np.ndarray) -> Decision:
    """The decision that fits these rows best.

    Args:
        logits: `[rows, labels]`.
        labels: `[rows]` class ids, or `[rows, labels]` bool of a multi-label task.
    """
    decision = Decision(temperature=fit_temperature(task, logits, labels), is_calibrated=True)
    if task.num_labels != 2 and not task.is_multi_label:
        return decision
    shares = probabilities(replace(task, decision=decision), logits)
    return replace(decision, threshold=fit_threshold(task, shares, labels))


def fit_temperature(task: GlueTask, logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of the lowest mean loss, from `LOWEST` to `HIGHEST`."""
    from scipy.optimize import minimize_scalar

    def loss(logarithm: float) -> float:
        decision = Decision(temperature=math.exp(logarithm))
        return float(row_losses(replace(task, decision=decision), logits, labels).mean())

    # Convex in 1 / temperature, so that there is one minimum in any monotonic scale of it.
    bounds = math.log(LOWEST), math.log(HIGHEST)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-7}).x)


def threshold_metric(task: GlueTask) -> str:
    """What the threshold maximises: the task's F1 or Matthews correlation, else the mean F1 of both classes.

    The F1 of one class alone would need to know which of the two is meant to be found.
    """
    if task.is_multi_label or "f1" in task.metrics:
        return "f1"
    return task.headline if task.headline in METRICS_OF_COUNTS else "f1_macro"


def fit_threshold(task: GlueTask, shares: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the highest `threshold_metric`; of equal ones the nearest to 0.5.

    Args:
        shares: `[rows, labels]` probabilities.
    """
    given, is_true = (shares, labels) if task.is_multi_label else (shares[:, 1], labels == 1)
    order = np.argsort(given, axis=None)
    given, is_true = given.ravel()[order], is_true.ravel()[order].astype(np.int64)
    # A cut behind each value that is less than the next: what lies above is given.
    cuts = np.flatnonzero((given[1:] > given[:-1]) & (given[1:] > 0) & (given[:-1] < 1))
    if not len(cuts) or is_true.all() or not is_true.any():
        return Decision().threshold
    missed = is_true.cumsum()[cuts]
    hits, refused = is_true.sum() - missed, cuts + 1 - missed
    counts = np.stack([refused, len(given) - (cuts + 1) - hits, missed, hits], axis=1).reshape(-1, 2, 2)
    values = METRICS_OF_COUNTS[threshold_metric(task)](counts)
    below, above = given[cuts], given[cuts + 1]
    between = np.where((below + above) / 2 < above, (below + above) / 2, below)
    best = np.flatnonzero(values >= values.max() - 1e-12)
    found = between[best[np.abs(between[best] - 0.5).argmin()]]
    return float(np.clip(found, np.finfo(float).tiny, 1 - 2**-53))


def cross_fitted(task: GlueTask, logits: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `[rows, labels]` and predictions of rows by decisions that other rows chose, five parts in turn."""
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
    right = shares if task.is_multi_label else shares[np.arange(len(labels)), labels]
    right = np.where(labels, right, 1 - right).ravel() if task.is_multi_label else right
    figures = {
        keys.LOSS: float(-np.log(np.maximum(right, np.finfo(float).tiny)).mean()),
        keys.CALIBRATION_ERROR: calibration(shares, labels)["ece"],
        **compute_metrics(task, predictions, labels),
    }
    return {keys.calibrated_key(name, suffix): value for name, value in figures.items()}


def calibration_lines(results: dict[str, Any]) -> list[str]:
    """What was chosen, on what, and what it changes, for the log."""
    chosen = results[keys.CALIBRATION]
    text = f"calibration: temperature {chosen['temperature']:.4g}"
    if "threshold" in chosen:
        text += f", threshold {chosen['threshold']:.4g} of {chosen['threshold_of']}"
    if not 1.001 * LOWEST < chosen["temperature"] < 0.999 * HIGHEST:
        text += f" (the end of the range {LOWEST:g} to {HIGHEST:g}: the logits tell nothing, or every row is right)"
    before, after = results[keys.evaluation_key(keys.CALIBRATION_ERROR)], results[keys.calibrated_key("ece")]
    lines = [
        f"{text}; expected calibration error {before:.4f}, cross-fitted {after:.4f}",
        f"note: --calibrate chose by the {chosen['rows']} rows of {chosen['chosen_on']}: their scores are no longer "
        "those of unseen rows. eval_* count answers without it, eval_calibrated_* answers with it",
    ]
    if after >= before:
        lines.append("warning: on rows that did not choose it the calibration error is no lower: more rows may help")
    return lines


def facts_of(task: GlueTask, decision: Decision) -> dict[str, Any]:
    """A calibration as results hold it."""
    has_threshold = task.is_multi_label or task.num_labels == 2
    of_class = "every class" if task.is_multi_label else task.labels[-1]
    return {
        "temperature": decision.temperature,
        **({"threshold": decision.threshold, "threshold_of": of_class} if has_threshold else {}),
    }
