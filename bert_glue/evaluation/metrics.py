"""GLUE metrics on scikit-learn and scipy, named as in the `glue` metric of Hugging Face, and those of label sets.

A value that does not exist is None, never NaN, and `Scores.reasons` says why. scikit-learn and scipy are imported with
the first score, which takes 2 s; training and `--help` do not need them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from bert_glue.errors import DataError, DivergedError
from bert_glue.tasks import COMBINED_SCORE, GlueTask

F1_MACRO = "f1_macro"


class Scores(dict[str, float | None]):
    """Metric name -> value (0..1, correlations -1..1), or None without a value.

    Attributes:
        reasons: metric name -> why its value is None, or why a value should not be trusted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}

    def put(self, metric: str, value: float | None, reason: str = "") -> None:
        """Adds one value, and its `reason` if there is one."""
        self[metric] = value
        if reason:
            self.reasons[metric] = reason


def _accuracy(predictions: np.ndarray, references: np.ndarray) -> tuple[float | None, str]:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(references, predictions)), ""


def _f1(predictions: np.ndarray, references: np.ndarray) -> tuple[float | None, str]:
    from sklearn.metrics import f1_score

    # Class 1 is the positive one in MRPC and QQP; scikit-learn gives 0.0 where F1 is undefined.
    value = float(f1_score(references, predictions, pos_label=1, zero_division=0.0))
    return value, "" if (predictions == 1).any() else "no row was predicted positive: F1 counts as 0"


def _matthews(predictions: np.ndarray, references: np.ndarray) -> tuple[float | None, str]:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        # A single class in both is said in our reason, not in a warning about confusion matrices.
        warnings.filterwarnings("ignore", message="A single label was found", category=UserWarning)
        value = float(matthews_corrcoef(references, predictions))
    for name, column in (("predictions", predictions), ("references", references)):
        if _is_constant(column):
            return value, f"all {name} are class {column[0]}: Matthews counts as 0"
    return value, ""


def _pearson(predictions: np.ndarray, references: np.ndarray) -> tuple[float | None, str]:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, references)


def _spearman(predictions: np.ndarray, references: np.ndarray) -> tuple[float | None, str]:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, references)


def _correlation(function: Callable, predictions: np.ndarray, references: np.ndarray) -> tuple[float | None, str]:
    """A scipy correlation, with its degenerate cases named instead of NaN and warnings."""
    if len(predictions) < 2:
        return None, "one row has no correlation"
    for name, column in (("predictions", predictions), ("references", references)):
        if _is_constant(column):
            return None, f"all {name} are {column[0]:g}: a constant has no correlation"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = float(function(predictions, references).statistic)
    if not np.isfinite(value):
        return None, "values too large or too close to each other for a correlation"
    # scipy returns a number for nearly constant input, with a warning that it is a rounding error.
    return value, str(caught[0].message) if caught else ""


def _is_constant(column: np.ndarray) -> bool:
    return bool((column == column[0]).all())


def _f1_over(axis: int | None) -> Callable[[np.ndarray, np.ndarray], tuple[float | None, str]]:
    """F1 of several labels a row: of all decisions together (None), or the mean over classes (0) or rows (1).

    scikit-learn's averages micro, macro and samples; it takes no single class here, which a model may have.
    """

    def f1(predictions: np.ndarray, references: np.ndarray) -> tuple[float | None, str]:
        hits = np.asarray((predictions & references).sum(axis))
        given = np.asarray(predictions.sum(axis) + references.sum(axis))
        value = float(np.divide(2 * hits, given, out=np.zeros(given.shape), where=given > 0).mean())
        if not predictions.any():
            return value, "no row was given a label: F1 counts as 0"
        neither = int((given == 0).sum()) if axis == 1 else 0
        return value, f"{neither} rows rightly without labels count as 0, as in scikit-learn" if neither else ""

    return f1


def _subset_accuracy(predictions: np.ndarray, references: np.ndarray) -> tuple[float | None, str]:
    return float((predictions == references).all(1).mean()), ""


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[float | None, str]]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearmanr": _spearman,
    "f1_micro": _f1_over(None),
    F1_MACRO: _f1_over(0),
    "f1_samples": _f1_over(1),
    "subset_accuracy": _subset_accuracy,
}


def _f1_of_counts(counts: np.ndarray) -> np.ndarray:
    wrong = counts[:, 0, 1] + counts[:, 1, 0]
    return 2 * counts[:, 1, 1] / np.maximum(1, 2 * counts[:, 1, 1] + wrong)


def _f1_macro_of_counts(counts: np.ndarray) -> np.ndarray:
    right, rows = np.diagonal(counts, axis1=1, axis2=2), counts.sum(2) + counts.sum(1)
    return (2 * right / np.maximum(1, rows)).mean(1)


def _matthews_of_counts(counts: np.ndarray) -> np.ndarray:
    """After Gorodkin 2004; 0 where it is not defined."""
    counts = counts.astype(np.float64)
    rows, true, predicted = counts.sum((1, 2)), counts.sum(2), counts.sum(1)
    above = np.trace(counts, axis1=1, axis2=2) * rows - (true * predicted).sum(1)
    below = np.sqrt((rows**2 - (predicted**2).sum(1)) * (rows**2 - (true**2).sum(1)))
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


# The same metrics of thousands of confusion matrices at once, `[draws, labels, labels]` -> `[draws]`: scikit-learn
# takes one matrix a call, about a millisecond each.
METRICS_OF_COUNTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "f1": _f1_of_counts,
    F1_MACRO: _f1_macro_of_counts,
    "matthews_correlation": _matthews_of_counts,
}


def compute_metrics(task: GlueTask, predictions: np.ndarray, references: np.ndarray) -> Scores:
    """All metrics of the task, and their mean as `combined_score` where there are several.

    Args:
        predictions: class ids `[rows]`, or scores `[rows]` (`[rows, 1]` too) for regression, or `[rows, labels]`
            zeros and ones of a multi-label task.
        references: the labels, same rows and kind.

    Returns:
        Values in 0..1 (correlations -1..1), equal to scikit-learn's and scipy's; None with a reason
        for no rows, constant scores or a single row. F1 without a positive prediction and Matthews
        with one class are 0.0 as in scikit-learn, with a reason.

    Raises:
        DivergedError: a prediction is NaN or infinite.
        DataError: references are unlabelled (-1), not finite, or no class of the task.
        ValueError: shapes differ, or class ids are fractions or out of range.
    """
    predictions, references = _checked(task, predictions, references)
    scores = Scores()
    for metric in task.metrics:
        if len(references) and metric == F1_MACRO and not task.is_multi_label:  # one label a row: sets of one class
            sets = np.eye(task.num_labels, dtype=bool)
            scores.put(metric, *_METRICS[metric](sets[predictions], sets[references]))
        elif len(references):
            scores.put(metric, *_METRICS[metric](predictions, references))
        else:
            scores.put(metric, None, "no rows to score")
    if task.has_combined_score:
        _combine(scores)
    return scores


def _combine(scores: Scores) -> None:
    """Adds the mean of all values; a mean of fewer values than usual would mislead."""
    missing = [metric for metric, value in scores.items() if value is None]
    if missing:
        scores.put(COMBINED_SCORE, None, f"no value for {', '.join(missing)}")
    else:
        scores.put(COMBINED_SCORE, float(np.mean(list(scores.values()))))


def _checked(task: GlueTask, predictions: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as `[rows]`, int64 or (regression) float64; float32 sums would differ from scipy's."""
    predictions, references = np.asarray(predictions), np.asarray(references)
    if task.is_multi_label:
        return _checked_sets(task, predictions), _checked_sets(task, references)
    if task.is_regression:
        predictions = predictions.reshape(-1) if predictions.shape[1:] == (1,) else predictions
    if predictions.ndim != 1 or predictions.shape != references.shape:
        raise ValueError(f"predictions {predictions.shape} and references {references.shape}: want [rows] each")
    predictions, references = predictions.astype(np.float64), references.astype(np.float64)
    bad = int((~np.isfinite(predictions)).sum())
    if bad:
        raise DivergedError(f"{bad} of {len(predictions)} predictions are NaN or infinite")
    if not np.isfinite(references).all():
        raise DataError(f"{task.name}: labels are NaN or infinite")
    if task.is_regression:
        return predictions, references
    return _checked_ids(task, predictions, ValueError, "predictions"), _checked_ids(
        task, references, DataError, "labels (-1: unlabelled)"
    )


def _checked_sets(task: GlueTask, rows: np.ndarray) -> np.ndarray:
    if rows.ndim != 2 or rows.shape[1] != task.num_labels or not ((rows == 0) | (rows == 1)).all():
        raise ValueError(f"{task.name}: want [rows, {task.num_labels}] zeros and ones, not {rows.shape}")
    return rows.astype(bool)


def _checked_ids(task: GlueTask, column: np.ndarray, error: type[Exception], what: str) -> np.ndarray:
    ids = column.astype(np.int64)
    wrong = np.flatnonzero((ids != column) | (ids < 0) | (ids >= task.num_labels))
    if len(wrong):
        raise error(
            f"{task.name}: {len(wrong)} {what} are not a class id in 0..{task.num_labels - 1}, "
            f"the first in row {wrong[0]}: {column[wrong[0]]:g}"
        )
    return ids


def majority_baseline(task: GlueTask, references: np.ndarray) -> float | None:
    """The headline metric of the best constant answer: the most frequent class (a tie takes the lower id), or the set.

    Returns:
        0..1, or None for regression (no correlation with a constant) and for no rows.
    """
    references = np.asarray(references)
    if task.is_regression or not len(references):
        return None
    if task.is_multi_label:
        constant = np.broadcast_to(_best_constant_set(references), references.shape)
    else:
        constant = np.full(len(references), np.bincount(references.astype(np.int64)).argmax())
    return compute_metrics(task, constant, references)[task.headline]


def _best_constant_set(references: np.ndarray) -> np.ndarray:
    """The set of classes that has the highest micro-F1 when every row is given it, `[labels]` bool.

    Of all sets of k classes the k most frequent have the most hits, so one k after the other is enough.
    """
    counts = references.sum(0, dtype=np.int64)
    order = np.argsort(-counts, kind="stable")
    hits, given = counts[order].cumsum(), len(references) * np.arange(1, len(order) + 1)
    best = int((2 * hits / (given + counts.sum())).argmax())
    constant = np.zeros(len(order), bool)
    constant[order[: best + 1]] = True
    return constant
