"""`--class_weights`: the weight of each class in the training loss, balanced by row counts or read from a file.

With one label per row it is `weight` of torch's cross_entropy. With several labels per row it is `pos_weight`, the
weight of a row with the class relative to a row without it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from bert_glue.config.values import shown
from bert_glue.errors import DataError, UsageError, did_you_mean
from bert_glue.storage.files import read_plain_text
from bert_glue.tasks import GlueTask

BALANCED = "balanced"
_SHOWN_NAMES = 5


def class_weights(choice: str | None, task: GlueTask, labels: np.ndarray) -> np.ndarray | None:
    """The weight of each class, `[labels]` float64 in [0, inf). None without the flag.

    Args:
        choice: the value of the flag: `balanced`, or the path of a json file of {class: weight}. Balanced weights are
            rows / (classes * rows of the class), as in scikit-learn, or with several labels per row, rows without the
            class / rows with it.
        labels: the labels of the training rows, `[rows]` class ids or `[rows, labels]` bool.

    Raises:
        UsageError: the task is a regression.
        DataError: the file lacks the weight of a class, a class has no rows to balance, or all weights are 0.
    """
    if choice is None:
        return None
    if task.is_regression:
        raise UsageError(
            f"--class_weights {shown(choice)}: the labels of this data are scores, which have no classes; drop the flag"
        )
    rows = labels.sum(0) if task.is_multi_label else np.bincount(labels, minlength=task.num_labels)
    weights = _balanced(task, rows, len(labels)) if choice == BALANCED else _from_file(Path(choice), task)
    if not (weights * rows).any():
        raise DataError(f"--class_weights {choice}: every class with training rows has weight 0; give positive weights")
    return weights


def named(task: GlueTask, weights: np.ndarray | None) -> dict[str, float] | None:
    """The weights by class name, as in run.json and the results. None without weights."""
    return None if weights is None else dict(zip(task.labels, weights.tolist(), strict=True))


def step_weight(weights: np.ndarray, labels: np.ndarray) -> float:
    """The divisor of the loss of a step: the sum of the weights of its rows on all ranks.

    Args:
        labels: the class ids of these rows, `[rows]`.
    """
    # If every row has weight 0, there is no mean (torch returns nan), and loss and gradient are 0.
    return float(weights[labels].sum()) or 1.0


def _balanced(task: GlueTask, rows: np.ndarray, total: int) -> np.ndarray:
    absent = [task.labels[at] for at in np.flatnonzero(rows == 0)]
    if absent:
        raise DataError(
            f"--class_weights {BALANCED}: no training row has class {_listed(absent)}, so its weight cannot be "
            "computed; give a json file of weights instead"
        )
    if not task.is_multi_label:
        return total / (task.num_labels * rows)
    if everywhere := [task.labels[at] for at in np.flatnonzero(rows == total)]:
        raise DataError(
            f"--class_weights {BALANCED}: every training row has class {_listed(everywhere)}, so its weight cannot be "
            "computed; give a json file of weights instead"
        )
    return (total - rows) / rows


def _from_file(path: Path, task: GlueTask) -> np.ndarray:
    place = f"--class_weights {path}"
    pairs = _read(path)
    given = dict(pairs)
    names = [name for name, _ in pairs]
    for name in names:
        if name not in task.labels:
            raise DataError(f"{place}: {did_you_mean('class', name, list(task.labels))}")
        if names.count(name) > 1:
            raise DataError(f"{place}: class {name!r} is listed twice")
    if absent := [name for name in task.labels if name not in given]:
        raise DataError(f"{place}: no weight for class {_listed(absent)}; every class of the data needs one")
    for name, value in given.items():
        if not _is_weight(value):
            raise DataError(f"{place}: class {name!r} has weight {str(value)[:40]}, not a finite number of at least 0")
    return np.array([float(given[name]) for name in task.labels])


def _is_weight(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value < 1e30 and math.isfinite(value)


def _read(path: Path) -> list[tuple[str, Any]]:
    """The pairs of the JSON object in file order. A dict would lose the first value of a repeated name."""
    try:
        content = json.loads(read_plain_text(path), object_pairs_hook=tuple)
    except FileNotFoundError:
        raise DataError(
            f"--class_weights {path}: no such file; give {BALANCED}, or a json file of {{class: weight}}"
        ) from None
    except OSError as error:
        raise DataError(f"--class_weights {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"--class_weights {path}: it is not JSON ({error})") from None
    if not isinstance(content, tuple):
        raise DataError(f"--class_weights {path}: it is not a JSON object of {{class: weight}}")
    return list(content)


def _listed(names: list[str]) -> str:
    shown_names = ", ".join(map(repr, names[:_SHOWN_NAMES]))
    return shown_names + (f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else "")
