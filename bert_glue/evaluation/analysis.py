"""Analyses an evaluation beyond its score: confusions, calibration, worst errors, deciding tokens, standard errors.

The result is `analysis.json` of a run, which `report/` draws. It quotes rows of the user's data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bert_glue.data.batching import TokenSplit
from bert_glue.data.folder import roots_of
from bert_glue.data.readers import read_tsv
from bert_glue.data.sources import Split, TaskData
from bert_glue.data.tables import Table
from bert_glue.errors import DataError
from bert_glue.evaluation.answers import answer_text, class_losses, predictions_of, probabilities, row_losses
from bert_glue.evaluation.evaluator import Evaluator
from bert_glue.evaluation.metrics import METRICS_OF_COUNTS, compute_metrics, majority_baseline
from bert_glue.model.classifier import LoadedModel
from bert_glue.result_keys import CLASSES, evaluation_key, standard_error_key
from bert_glue.tasks import GlueTask

HARDEST = 100
_MATRIX_CLASSES = 50  # 1,200 classes would make a table of 1.4 million cells
_CONFUSED_PAIRS = 20
_SHOWN_CHARACTERS = 2000
_BINS = 10
_DRAWS = 2000
_POINTS = 300
# The labelled file of the diagnostic set, which GLUE publishes beside the unlabelled one, and its categories.
LABELLED_AX = "diagnostic-full.tsv"
_AX_CATEGORIES = ("Lexical Semantics", "Predicate-Argument Structure", "Logic", "Knowledge")


def analyse_splits(
    data: TaskData,
    model: LoadedModel,
    splits: dict[str, TokenSplit],
    evaluator: Evaluator,
    kept: dict[str, np.ndarray],
    explained: int,
) -> dict[str, dict]:
    """Split name -> its analysis.

    Args:
        kept: the logits of the evaluated splits.
        explained: the number of rows whose tokens are attributed (`--explain`).
    """
    found = {}
    for name, suffix, _ in data.task.evaluation:
        if name in kept:
            part = analyse(data.task, data.splits[name], splits[name], kept[name])
            if explained:
                part["explained"] = explain(data.task, model, evaluator, splits[name], kept[name], explained)
            found[name] = {"suffix": suffix, **part}
    return found


def analyse(task: GlueTask, texts: Split, split: TokenSplit, logits: np.ndarray) -> dict[str, Any]:
    """The analysis of one labelled split.

    Args:
        texts: the rows of the split. `split` may hold only the first of them.
        logits: `[rows, labels]`.

    Returns:
        Plain values for JSON. Shares, errors and metrics are in 0..1, losses in nats or squared points.
    """
    labels, predictions = split.labels, predictions_of(task, logits)
    value = compute_metrics(task, predictions, labels)[task.headline]
    shares = None if task.is_regression else probabilities(task, logits)
    found: dict[str, Any] = {
        "rows": len(split),
        "value": value,
        "majority": majority_baseline(task, labels),
        "standard_error": standard_error(task, predictions, labels, value),
        "hardest": _hardest(task, texts, split, logits, shares),
    }
    if shares is None:
        every = max(1, len(split) // _POINTS)
        points = zip(labels[::every].tolist(), predictions[::every].tolist(), strict=True)
        return {**found, "points": [[round(x, 3), round(y, 3)] for x, y in points]}
    if task.is_multi_label:  # several labels per row have no confused pairs and no matrix
        found["classes"] = _class_shares(task, labels, predictions)
    else:
        found |= _classes(task, labels, predictions)
    return {**found, "calibration": calibration(shares, labels)}


def _classes(task: GlueTask, labels: np.ndarray, predictions: np.ndarray) -> dict[str, Any]:
    """Precision, recall and F1 of each class, the most confused pairs, and the confusion matrix of up to 50 classes.

    Returns:
        `classes`: the label of each class, its shares in 0..1 (null if no row decides one) and its labelled rows.
        `confused`: label, prediction and rows, the most frequent first. `labels` and `confusion`: the matrix.
    """
    count = task.num_labels
    wrong = labels != predictions
    cells, rows = np.unique(labels[wrong] * count + predictions[wrong], return_counts=True)
    most = np.argsort(-rows, kind="stable")[:_CONFUSED_PAIRS]
    pairs = [(int(cells[at]) // count, int(cells[at]) % count, int(rows[at])) for at in most]
    found: dict[str, Any] = {
        "classes": _class_shares(task, labels, predictions),
        "confused": [{"label": task.labels[a], "prediction": task.labels[b], "rows": n} for a, b, n in pairs],
    }
    if count <= _MATRIX_CLASSES:
        found |= {"labels": list(task.labels), "confusion": confusion(labels, predictions, count).tolist()}
    return found


def _class_shares(task: GlueTask, labels: np.ndarray, predictions: np.ndarray) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each class, as in scikit-learn. Multi-label tasks also get the predicted rows."""
    if task.is_multi_label:
        hits, given, rows = (predictions & labels).sum(0), predictions.sum(0), labels.sum(0)
    else:
        count = task.num_labels
        hits = np.bincount(labels[labels == predictions], minlength=count)
        given, rows = np.bincount(predictions, minlength=count), np.bincount(labels, minlength=count)
    precision, recall, f1 = _ratios(hits, given), _ratios(hits, rows), _ratios(2 * hits, given + rows)
    extra = [{"predicted": int(n)} for n in given] if task.is_multi_label else [{}] * task.num_labels
    return [
        {"label": label, "precision": p, "recall": r, "f1": f, "rows": int(n), **more}
        for label, p, r, f, n, more in zip(task.labels, precision, recall, f1, rows, extra, strict=True)
    ]


def _ratios(above: np.ndarray, below: np.ndarray) -> list[float | None]:
    """The quotients. None for a denominator of 0."""
    return [round(int(a) / int(b), 6) if b else None for a, b in zip(above, below, strict=True)]


def class_results(splits: dict[str, dict]) -> dict[str, Any]:
    """The results about classes: precision, recall and F1 of each class, and their means over the classes.

    Args:
        splits: split name -> its analysis.

    Returns:
        `eval_classes`: class -> its three shares (0..1, null if no row decides one) and labelled rows.
        `eval_precision_macro`, `eval_recall_macro`, `eval_f1_macro`: the means, where an undefined share counts as 0.
    """
    found: dict[str, Any] = {}
    for part in splits.values():
        rows, suffix = part.get("classes"), part["suffix"]
        if not rows:
            continue
        shares = {row["label"]: {name: value for name, value in row.items() if name != "label"} for row in rows}
        found[evaluation_key(CLASSES, suffix)] = shares
        for name in ("precision", "recall", "f1"):
            mean = sum(row[name] or 0.0 for row in rows) / len(rows)
            found[evaluation_key(f"{name}_macro", suffix)] = mean
    return found


def standard_errors(task: GlueTask, splits: dict[str, dict]) -> dict[str, float | None]:
    """`eval_<headline>_standard_error` of each split, in the unit of the metric."""
    return {standard_error_key(task.headline, part["suffix"]): part["standard_error"] for part in splits.values()}


def confusion(labels: np.ndarray, predictions: np.ndarray, count: int) -> np.ndarray:
    """The number of rows by true class (first axis) and predicted class, `[labels, labels]` int64."""
    return np.bincount(labels * count + predictions, minlength=count * count).reshape(count, count)


def calibration(shares: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Expected calibration error (Guo et al. 2017) over ten bins of equal width.

    It counts the predicted class of each row. With several labels per row it counts each class separately.

    Args:
        shares: `[rows, labels]` probabilities.
        labels: `[rows]` class ids, or `[rows, labels]` bool with several labels per row.

    Returns:
        `ece` in 0..1, and for each bin with rows [low, high, rows, mean confidence, accuracy].
    """
    confidence, is_right = shares.ravel(), labels.ravel()
    if labels.ndim == 1:
        confidence, is_right = shares.max(1), shares.argmax(1) == labels
    bins = np.minimum((confidence * _BINS).astype(np.int8), _BINS - 1)
    rows, error = [], 0.0
    for number in range(_BINS):
        inside = bins == number
        if inside.any():
            mean, right = float(confidence[inside].mean()), float(is_right[inside].mean())
            rows.append([number / _BINS, (number + 1) / _BINS, int(inside.sum()), round(mean, 4), round(right, 4)])
            error += inside.mean() * abs(mean - right)
    return {"ece": float(error), "bins": rows}


def standard_error(task: GlueTask, predictions: np.ndarray, labels: np.ndarray, value: float | None) -> float | None:
    """Standard error of the headline metric over other samples with as many rows. None if it has no value.

    Accuracy: binomial. F1 and Matthews: the standard deviation over 2000 parametric bootstrap draws of the confusion
    matrix. Correlations: Bonett and Wright 2000, (1 - r^2) sqrt((1 + r^2 / 2) / (n - 3)). Micro-F1: the delta method
    for a ratio of two sums over rows, because the decisions within a row depend on each other.
    """
    rows = len(labels)
    if value is None or rows < 4:
        return None
    if task.is_regression:
        return float((1 - value**2) * np.sqrt((1 + value**2 / 2) / (rows - 3)))
    if task.is_multi_label and task.headline != "f1_micro":
        return None
    if task.is_multi_label:
        hits, given = 2 * (predictions & labels).sum(1), predictions.sum(1) + labels.sum(1)
        spread = np.sqrt(((hits - value * given) ** 2).sum() * rows / (rows - 1))
        return float(spread / given.sum()) if given.any() else None
    if task.headline == "accuracy":
        # The same as the draws, in closed form: 2000 draws of a matrix of 1,200 classes would take 23 GB.
        return float(np.sqrt(value * (1 - value) / rows))
    if task.num_labels > _MATRIX_CLASSES:
        return None
    counts = confusion(labels, predictions, task.num_labels)
    draws = np.random.default_rng(0).multinomial(rows, counts.ravel() / rows, _DRAWS).reshape(-1, *counts.shape)
    return float(METRICS_OF_COUNTS[task.headline](draws).std())


def _hardest(
    task: GlueTask, texts: Split, split: TokenSplit, logits: np.ndarray, shares: np.ndarray | None
) -> list[dict[str, Any]]:
    """The wrong predictions with the highest loss (for scores: the largest errors), the worst first."""
    losses = row_losses(task, logits, split.labels)
    predictions = predictions_of(task, logits)
    is_wrong = np.ones(len(split), bool) if shares is None else predictions != split.labels
    if task.is_multi_label:
        is_wrong, shares = is_wrong.any(1), None  # a set of classes has no single probability
    order = np.argsort(-losses, kind="stable")
    return [
        {
            "row": int(at),
            "texts": [_shortened(column[at]) for column in texts.texts],
            "label": answer_text(task, split.labels[at]),
            "prediction": answer_text(task, predictions[at]),
            "probability": None if shares is None else round(float(shares[at].max()), 4),
            "loss": round(float(losses[at]), 4),
        }
        for at in order[is_wrong[order]][:HARDEST]
    ]


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} ... ({len(text)} characters)"


def diagnostic(task: GlueTask, data_path: str | None, predictions: np.ndarray) -> dict[str, Any] | None:
    """Matthews correlation (R3) of the diagnostic's predictions by category, if `data_path` has its labelled file.

    Returns:
        {"all": [R3, rows], category: [R3, rows], ...}. None if there is no such file.

    Raises:
        DataError: the file is broken, or has other rows than were predicted.
    """
    folders = roots_of(task, Path(data_path)) if data_path else []
    path = next((folder / LABELLED_AX for folder in folders if (folder / LABELLED_AX).is_file()), None)
    if path is None:
        return None
    table = read_tsv(path)
    if len(table) < len(predictions):
        raise DataError(f"{path} has {len(table)} rows, but there are {len(predictions)} predictions")
    return _by_category(task, table, predictions)


def _by_category(task: GlueTask, table: Table, predictions: np.ndarray) -> dict[str, Any]:
    numbers = {name: at for at, name in enumerate(task.labels)}
    unknown = [row for row, name in enumerate(table.column("Label")) if name not in numbers]
    if unknown:
        raise DataError(f"{table.where(unknown[0])}: the label is not one of {', '.join(task.labels)}")
    labels = np.array([numbers[name] for name in table.column("Label")])[: len(predictions)]
    groups = {"all": np.ones(len(labels), bool)}
    for category in _AX_CATEGORIES:
        tagged = table.columns.get(category, [])[: len(predictions)]
        groups[category] = np.array([bool(text.strip()) for text in tagged], bool)
    return {
        name: [compute_metrics(task, predictions[group], labels[group])[task.headline], int(group.sum())]
        for name, group in groups.items()
        if group.any()
    }


def explain(
    task: GlueTask, model: LoadedModel, evaluator: Evaluator, split: TokenSplit, logits: np.ndarray, count: int
) -> list[dict[str, Any]]:
    """The `count` rows with the highest loss, with a signed score for each token.

    Each row costs a forward and a backward pass. Weights and gradient buffers are not changed.

    Args:
        logits: `[rows, labels]` of the whole split.
    """
    rows = np.argsort(-row_losses(task, logits, split.labels), kind="stable")[:count]
    predictions = predictions_of(task, logits)
    evaluator.module.eval()
    found = []
    for row in rows.tolist():
        ids = split.table.ids_of(row).tolist()
        scores = token_scores(model, evaluator, split, row, _explained_output(task, logits, split.labels, row))
        found.append(
            {
                "row": row,
                "label": answer_text(task, split.labels[row]),
                "prediction": answer_text(task, predictions[row]),
                "tokens": model.tokenizer.words(ids),
                "scores": [round(float(score), 5) for score in scores[: len(ids)]],
            }
        )
    return found


def _explained_output(task: GlueTask, logits: np.ndarray, labels: np.ndarray, row: int) -> int:
    """The logit to attribute: that of the predicted class, or of the class with the highest loss if multi-label."""
    if task.is_multi_label:
        return int(class_losses(logits[row], labels[row]).argmax())
    return 0 if task.is_regression else int(logits[row].argmax())


def token_scores(model: LoadedModel, evaluator: Evaluator, split: TokenSplit, row: int, output: int) -> torch.Tensor:
    """The gradient of one logit times the word embedding of each token, summed over the embedding's width.

    Args:
        output: the index of the logit.

    Returns:
        `[tokens]` float32 on the host.
    """
    words = model.module.words if model.is_packed else model.module.stock.get_input_embeddings()
    leaves: list[torch.Tensor] = []

    def as_leaf(module: torch.nn.Module, inputs: tuple, embedded: torch.Tensor) -> torch.Tensor:
        leaves.append(embedded.detach().requires_grad_())
        return leaves[-1]

    handle = words.register_forward_hook(as_leaf)
    try:
        with evaluator.precision.autocast():
            batch = evaluator.collate(split, np.array([row]))
            logits = batch.row_means(evaluator.module(**batch.inputs))
        gradient = torch.autograd.grad(logits.float()[0, output], leaves[0])[0]
    finally:
        handle.remove()
    scores = (gradient.float() * leaves[0].detach().float()).sum(-1)
    mask = batch.inputs.get("attention_mask")
    return (scores.flatten() if mask is None else scores[mask.bool()]).cpu()
