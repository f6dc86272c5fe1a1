"""From a classifier's logits to its answer: probabilities, classes or a score, and the loss of each row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bert_glue.tasks import Decision, GlueTask

_MOST_SHOWN = 20


def probabilities(task: GlueTask, logits: np.ndarray) -> np.ndarray:
    """Probabilities of `[rows, labels]` logits, float64: they sum to 1 in a row, unless a row may have several labels.

    Scores of a regression are returned as they are.
    """
    if task.is_regression:
        return logits.astype(np.float64)
    scaled = logits / task.decision.temperature
    return sigmoid(scaled) if task.is_multi_label else softmax(scaled)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of `[rows, labels]` logits, float64."""
    shares = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """The probability of each class by itself, `[rows, labels]` float64."""
    below = np.exp(-np.abs(logits.astype(np.float64)))  # in (0, 1]: no overflow
    return np.where(logits >= 0, 1.0, below) / (1.0 + below)


def predictions_of(task: GlueTask, logits: np.ndarray) -> np.ndarray:
    """Class ids `[rows]` int64, scores `[rows]` float32, or of a multi-label task `[rows, labels]` bool."""
    if task.is_regression:
        return logits[:, 0]
    return decided(task, probabilities(task, logits))


def decided(task: GlueTask, shares: np.ndarray) -> np.ndarray:
    """The same from `[rows, labels]` probabilities of classes."""
    threshold = task.decision.threshold
    if task.is_multi_label:
        return shares > threshold
    if task.num_labels == 2 and threshold != Decision().threshold:
        return (shares[:, 1] > threshold).astype(np.int64)
    return shares.argmax(1)


def label_array(task: GlueTask, labels: Sequence) -> np.ndarray:
    """Labels of a split as an array: `[rows]` int64 or float32, or of a multi-label task `[rows, labels]` bool."""
    if not task.is_multi_label:
        return np.asarray(labels, np.float32 if task.is_regression else np.int64)
    found = np.zeros((len(labels), task.num_labels), bool)
    for row, ids in zip(found, labels, strict=True):
        row[list(ids)] = True
    return found


def row_losses(task: GlueTask, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy (multi-label: its mean over the classes), or squared error, of each row, `[rows]` float64."""
    x = logits.astype(np.float64)
    if task.is_regression:
        return (x[:, 0] - labels) ** 2
    x /= task.decision.temperature
    if task.is_multi_label:
        return class_losses(x, labels).mean(1)
    top = x.max(1, keepdims=True)
    log_sum = np.log(np.exp(x - top).sum(1)) + top[:, 0]
    return log_sum - x[np.arange(len(x)), labels]


def class_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Binary cross-entropy of each class of each row, `[rows, labels]` float64, as torch computes it."""
    x = logits.astype(np.float64)
    return np.maximum(x, 0.0) - x * labels + np.log1p(np.exp(-np.abs(x)))


def answer_text(task: GlueTask, answer: np.ndarray | float) -> str:
    """One row's label or prediction for people: a name, twenty names at most, or a score of two decimals."""
    if task.is_regression:
        return f"{answer:.2f}"
    if not task.is_multi_label:
        return task.labels[int(answer)]
    given = np.flatnonzero(answer)
    more = f" and {len(given) - _MOST_SHOWN} more" if len(given) > _MOST_SHOWN else ""
    return (", ".join(task.labels[at] for at in given[:_MOST_SHOWN]) or "(none)") + more


def label_lists(task: GlueTask, predictions: np.ndarray) -> list[list[str]]:
    """The names in each row of `[rows, labels]` predictions."""
    return [[task.labels[at] for at in np.flatnonzero(row)] for row in predictions]
