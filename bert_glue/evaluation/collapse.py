"""Detects runs that learn nothing: they predict a single class, or their loss stays at that of a constant.

Fine-tuning a large encoder on a small task fails in this way for some seeds (Devlin et al. 2019, Mosbach et al. 2021).
A mean over seeds says little unless these seeds are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bert_glue.result_keys import COLLAPSED, TRAIN_COLLAPSED, evaluation_key
from bert_glue.tasks import GlueTask

if TYPE_CHECKING:
    import numpy as np


# Scores whose deviation is below this share of the labels' deviation do not rank the rows.
_CONSTANT_SHARE = 0.05
# Above this share of a constant's loss nothing was learned. The mean over 20 batches of 32 is exact to 2 %.
_FLAT_SHARE = 0.97
_FEWEST_STEPS = 20


def collapsed_predictions(task: GlueTask, predictions: np.ndarray, references: np.ndarray) -> str | None:
    """The reason why predictions do not depend on their input; None if they do.

    Args:
        predictions: class ids or scores, `[rows]`, or `[rows, labels]` of a multi-label task.
        references: the labels, in the same form. If they are constant, the result is None.
    """
    if len(references) < 2 or (references == references[0]).all():
        return None
    if task.is_regression:
        spread, wanted = float(predictions.std()), float(references.std())
        if spread < _CONSTANT_SHARE * wanted:
            return f"scores barely differ: standard deviation {spread:.3g}, of the labels {wanted:.3g}"
    elif (predictions == predictions[0]).all():
        from bert_glue.evaluation.answers import answer_text  # here: see `constant_loss`

        return f"all {len(predictions)} predictions are {answer_text(task, predictions[0])}"
    return None


def constant_loss(
    task: GlueTask, labels: np.ndarray, smoothing: float = 0.0, weights: np.ndarray | None = None
) -> float:
    """Training loss of the best constant prediction: the entropy of the classes, or the variance of scores.

    Args:
        labels: of the training rows, `[rows]`, or `[rows, labels]` of a multi-label task.
        smoothing: `--label_smoothing_factor`.
        weights: of the classes, `[labels]`, where `--class_weights` gives some.
    """
    if task.is_regression:
        return float(labels.var())
    import numpy as np  # here: `check` and `sweep` read verdicts and import no numpy

    weights = np.ones(task.num_labels) if weights is None else weights
    if task.is_multi_label:
        given = (1 - smoothing) * labels.mean(0, dtype=np.float64) + 0.5 * smoothing
        outcomes = np.stack([weights * given, 1 - given])
        shares = outcomes / np.maximum(outcomes.sum(0), np.finfo(float).tiny)
        return float(-(outcomes * np.log(np.where(outcomes > 0, shares, 1.0))).sum() / task.num_labels)
    rows = np.bincount(labels, minlength=task.num_labels)
    # torch smooths towards the weights, not towards 1 / classes: the shares need not sum to 1.
    shares = ((1 - smoothing) * rows + smoothing * len(labels) / task.num_labels) * weights / (rows @ weights)
    found = shares[shares > 0]
    return float(-(found * np.log(found / found.sum())).sum())


def flat_loss(history: list[dict], constant: float) -> str | None:
    """The reason why the training loss shows no learning so far; None if it does.

    Args:
        history: log entries; the later half of their steps counts, and at least 20 steps.
        constant: result of `constant_loss`.
    """
    entries = [entry for entry in history if "loss" in entry]
    if not entries:
        return None
    ends = [entry["step"] for entry in entries]
    spans = list(zip((entry["loss"] for entry in entries), [0, *ends[:-1]], ends, strict=True))
    later = [(loss, end - begin) for loss, begin, end in spans if begin >= ends[-1] // 2]
    later = later or [(loss, end - begin) for loss, begin, end in spans[-1:]]  # one line for nearly all steps
    steps = sum(count for _, count in later)
    if steps < _FEWEST_STEPS or constant <= 0.0:
        return None
    mean = sum(loss * count for loss, count in later) / steps
    if mean < _FLAT_SHARE * constant:
        return None
    return f"the loss of the last {steps} steps is {mean:.4f}, that of a constant prediction {constant:.4f}"


def collapse_reason(results: Mapping[str, Any]) -> str | None:
    """The reason in the results why a finished run learned nothing; None if it did learn.

    A run has collapsed if the predictions on any evaluated split carry nothing, or if its training loss stayed flat.
    """
    return next(iter([*_collapsed_splits(results).values(), *filter(None, [results.get(TRAIN_COLLAPSED)])]), None)


def _collapsed_splits(results: Mapping[str, Any]) -> dict[str, str]:
    """`eval_collapsed...` keys of the splits whose predictions carry nothing, with the reasons."""
    first = evaluation_key(COLLAPSED)
    return {key: reason for key, reason in results.items() if key.startswith(first) and reason}


@dataclass
class CollapseWatch:
    """Warns while a run trains, once for its loss and at each evaluation for its predictions.

    Args:
        constant: result of `constant_loss`.
        total_steps: steps of the run; the loss is judged only in their second half, as it falls late on small tasks.
    """

    constant: float
    total_steps: int
    _has_warned: bool = field(default=False, init=False)

    def warnings(self, history: list[dict]) -> list[str]:
        """The warnings for the last log entry of a run."""
        entry = history[-1]
        found = [f"{key}: {reason}" for key, reason in _collapsed_splits(entry).items()]
        if "loss" in entry and not self._has_warned and 2 * entry["step"] >= self.total_steps:
            flat = flat_loss(history, self.constant)
            self._has_warned = flat is not None
            if flat is not None:
                found.append(flat)
        return [f"warning: nothing learned so far: {text}" for text in found]
