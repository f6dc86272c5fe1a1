"""Converts the logits of a classifier to probabilities, classes or scores, and to the loss of each row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bert_glue.tasks import Decision, GlueTask

_MOST_SHOWN = 20


def probabilities(task: GlueTask, logits: np.ndarray) -> np.ndarray:
    """Probabilities of `[rows, labels]` logits, float64. They sum to 1 per row, unless the task is multi-label.

    The scores of a regression are returned unchanged.
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
    """The independent probability of each class, `[rows, labels]` float64."""
    below = np.exp(-np.abs(logits.astype(np.float64)))  # in (0, 1], so it cannot overflow
    return np.where(logits >= 0, 1.0, below) / (1.0 + below)


def predictions_of(task: GlueTask, logits: np.ndarray) -> np.ndarray:
    """Predictions: class ids `[rows]` int64, scores `[rows]` float32, or `[rows, labels]` bool if multi-label."""
    if task.is_regression:
        return logits[:, 0]
    return decided(task, probabilities(task, logits))


def decided(task: GlueTask, shares: np.ndarray) -> np.ndarray:
    """Predictions for `[rows, labels]` probabilities, as in `predictions_of`."""
    threshold = task.decision.threshold
    if task.is_multi_label:
        return shares > threshold
    if task.num_labels == 2 and threshold != Decision().threshold:
        return (shares[:, 1] > threshold).astype(np.int64)
    return shares.argmax(1)


def label_array(task: GlueTask, labels: Sequence) -> np.ndarray:
    """The labels of a split as an array: `[rows]` int64 or float32, or `[rows, labels]` bool if multi-label."""
    if not task.is_multi_label:
        return np.asarray(labels, np.float32 if task.is_regression else np.int64)
    found = np.zeros((len(labels), task.num_labels), bool)
    for row, ids in zip(found, labels, strict=True):
        row[list(ids)] = True
    return found


def row_losses(task: GlueTask, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The loss of each row, `[rows]` float64: cross-entropy (multi-label: mean over the classes) or squared error."""
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
    """Binary cross-entropy of each class of each row, `[rows, labels]` float64, by torch's formula."""
    x = logits.astype(np.float64)
    return np.maximum(x, 0.0) - x * labels + np.log1p(np.exp(-np.abs(x)))


def answer_text(task: GlueTask, answer: np.ndarray | float) -> str:
    """The label or prediction of a row as text: a name, at most twenty names, or a score with two decimals."""
    if task.is_regression:
        return f"{answer:.2f}"
    if not task.is_multi_label:
        return task.labels[int(answer)]
    given = np.flatnonzero(answer)
    more = f" and {len(given) - _MOST_SHOWN} more" if len(given) > _MOST_SHOWN else ""
    return (", ".join(task.labels[at] for at in given[:_MOST_SHOWN]) or "(none)") + more


def label_lists(task: GlueTask, predictions: np.ndarray) -> list[list[str]]:
    """The predicted class names of each row of `[rows, labels]` bool."""
    return [[task.labels[at] for at in np.flatnonzero(row)] for row in predictions]
