"""Scores against scikit-learn and scipy themselves and against their definitions, degenerate cases too."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from bert_glue.errors import DataError, DivergedError
from bert_glue.evaluation.metrics import METRICS_OF_COUNTS, Scores, compute_metrics, majority_baseline
from bert_glue.tasks import TASKS

REPOSITORY = Path(__file__).parents[2]

# 10,000 cases; scikit-learn takes 1-4 ms a call for F1 and Matthews, scipy and accuracy below 1 ms.
CASES = {
    "cola": 600, "ax": 400, "mrpc": 600, "qqp": 200, "stsb": 4200,
    "sst2": 800, "mnli": 800, "qnli": 800, "rte": 800, "wnli": 800,
}  # fmt: skip


def random_case(task, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and references of 1-60 rows; about a fifth of the cases is degenerate."""
    rows = int(rng.integers(1, 61))
    if task.is_regression:
        references = np.round(rng.uniform(0, 5, rows), 1)
        predictions = references * rng.normal() + rng.normal(size=rows) * rng.choice([0, 0.1, 1, 10])
    else:
        weights = rng.dirichlet(np.ones(task.num_labels))
        references = rng.choice(task.num_labels, rows, p=weights)
        other = rng.integers(0, task.num_labels, rows)
        predictions = np.where(rng.random(rows) < rng.random(), references, other)
    for column in (predictions, references):
        if rng.random() < 0.1:
            column[:] = column[0]
    return predictions, references


def from_libraries(task, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The same metrics by direct calls; NaN where scipy has no value."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    calls = {
        "accuracy": lambda: accuracy_score(references, predictions),
        "f1": lambda: f1_score(y_true=references, y_pred=predictions),
        "matthews_correlation": lambda: matthews_corrcoef(references, predictions),
        "pearson": lambda: pearsonr(predictions, references)[0] if len(references) > 1 else math.nan,
        "spearmanr": lambda: spearmanr(predictions, references)[0],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {metric: float(calls[metric]()) for metric in task.metrics}


def ranks(column: np.ndarray) -> np.ndarray:
    """Ranks from 1; ties get their mean."""
    smaller = np.greater.outer(column, column).sum(axis=1)
    return smaller + (np.equal.outer(column, column).sum(axis=1) + 1) / 2


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r by its definition; NaN for a constant or a single row."""
    if constant(x, y):
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))


def constant(*columns: np.ndarray) -> bool:
    return any(len(set(column.tolist())) < 2 for column in columns)


def from_definition(task, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The same metrics from counts and sums, without a library."""
    hits = int((predictions == references).sum())
    positives = int((predictions == 1).sum() + (references == 1).sum())
    true_positives = int(((predictions == 1) & (references == 1)).sum())
    # Gorodkin's R_K is the correlation of the one-hot matrices, each class centred.
    one_hot = [np.equal.outer(column, np.arange(3)) for column in (predictions, references)]
    centred = [matrix - matrix.mean(axis=0) for matrix in one_hot]
    cross, left, right = ((a * b).sum() for a, b in ((centred[0], centred[1]), (centred[0],) * 2, (centred[1],) * 2))
    values = {
        "accuracy": lambda: hits / len(references),
        "f1": lambda: 2 * true_positives / positives if positives else 0.0,
        "matthews_correlation": lambda: cross / math.sqrt(left * right) if left * right > 1e-12 else 0.0,
        "pearson": lambda: correlation(predictions, references),
        "spearmanr": lambda: correlation(ranks(predictions), ranks(references)),
    }
    return {metric: values[metric]() for metric in task.metrics}


def check_case(task, predictions: np.ndarray, references: np.ndarray) -> Scores:
    scores = compute_metrics(task, predictions, references)
    direct = from_libraries(task, predictions, references)
    defined = from_definition(task, predictions, references)
    for metric in task.metrics:
        value = scores[metric]
        if math.isnan(direct[metric]):
            assert value is None and scores.reasons[metric]
            assert math.isnan(defined[metric])
        else:
            assert value == direct[metric], (task.name, metric, predictions, references)
            assert value == pytest.approx(defined[metric], abs=1e-9), (task.name, metric)
    return scores


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_the_libraries_and_the_definitions(name):
    rng = np.random.default_rng(sorted(TASKS).index(name))
    results = [check_case(TASKS[name], *random_case(TASKS[name], rng)) for _ in range(CASES[name])]
    reasons = sum(bool(scores.reasons) for scores in results)
    # Degenerate cases must really have been drawn, and must not be all of them.
    accuracy_only = TASKS[name].metrics == ("accuracy",)
    assert reasons == 0 if accuracy_only else len(results) * 0.05 < reasons < len(results) * 0.7


def test_there_are_ten_thousand_cases_and_every_task_has_some():
    assert sum(CASES.values()) == 10_000
    assert set(CASES) == set(TASKS)


def test_names_and_combined_score_are_those_of_the_hugging_face_script():
    scores = compute_metrics(TASKS["mrpc"], np.array([1, 1, 0, 1]), np.array([1, 0, 0, 1]))
    assert scores == {"accuracy": 0.75, "f1": 0.8, "combined_score": pytest.approx(0.775)}
    assert list(compute_metrics(TASKS["mnli"], np.array([2]), np.array([2]))) == ["accuracy"]
    stsb = compute_metrics(TASKS["stsb"], np.array([[1.0], [2.0], [4.0]]), np.array([0.0, 2.0, 3.0]))
    assert stsb["combined_score"] == (stsb["pearson"] + stsb["spearmanr"]) / 2
    assert json.loads(json.dumps(stsb)) == stsb


def test_constant_predictions_have_no_correlation_and_the_reason_names_them():
    scores = compute_metrics(TASKS["stsb"], np.full(5, 2.5), np.arange(5.0))
    assert scores == {"pearson": None, "spearmanr": None, "combined_score": None}
    assert scores.reasons["pearson"] == "all predictions are 2.5: a constant has no correlation"
    assert scores.reasons["combined_score"] == "no value for pearson, spearmanr"
    flipped = compute_metrics(TASKS["stsb"], np.arange(5.0), np.full(5, 2.5))
    assert "all references" in flipped.reasons["spearmanr"]


def test_nearly_constant_predictions_keep_scipys_value_and_its_doubt():
    from scipy.stats import NearConstantInputWarning, pearsonr

    predictions, references = 1e9 + np.arange(5) * 1e-6, np.arange(5.0)
    scores = compute_metrics(TASKS["stsb"], predictions, references)
    with pytest.warns(NearConstantInputWarning, match="nearly constant"):
        assert scores["pearson"] == pearsonr(predictions, references)[0]
    assert "nearly constant" in scores.reasons["pearson"] and "spearmanr" not in scores.reasons


def test_one_class_predicted_is_zero_with_a_reason_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cola = compute_metrics(TASKS["cola"], np.ones(4, int), np.array([0, 1, 1, 0]))
        single = compute_metrics(TASKS["cola"], np.ones(4, int), np.ones(4, int))
        mrpc = compute_metrics(TASKS["mrpc"], np.zeros(4, int), np.zeros(4, int))
    assert cola == single == {"matthews_correlation": 0.0}
    assert cola.reasons["matthews_correlation"].startswith("all predictions are class 1")
    assert mrpc == {"accuracy": 1.0, "f1": 0.0, "combined_score": 0.5}
    assert "no row was predicted positive" in mrpc.reasons["f1"]


@pytest.mark.parametrize("name", TASKS)
def test_no_rows_and_one_row(name):
    task = TASKS[name]
    empty = compute_metrics(task, np.array([]), np.array([]))
    assert set(empty.values()) == {None} and set(empty.reasons) == set(empty)
    one = compute_metrics(task, np.array([1]), np.array([1]))
    assert all(value is None for value in one.values()) if task.is_regression else None not in one.values()


def test_predictions_that_are_no_numbers_are_never_scored():
    with pytest.raises(DivergedError, match="1 of 3"):
        compute_metrics(TASKS["stsb"], np.array([1.0, np.nan, 2.0]), np.arange(3.0))
    with pytest.raises(DivergedError, match="2 of 2"):
        compute_metrics(TASKS["cola"], np.array([np.inf, np.nan]), np.array([0, 1]))


def test_unlabelled_or_foreign_labels_are_never_scored():
    with pytest.raises(DataError, match="row 1: -1"):
        compute_metrics(TASKS["mrpc"], np.array([0, 1]), np.array([0, -1]))
    with pytest.raises(DataError, match="NaN"):
        compute_metrics(TASKS["stsb"], np.array([0.0, 1]), np.array([0, np.nan]))
    with pytest.raises(ValueError, match=r"0\.\.1"):
        compute_metrics(TASKS["rte"], np.array([0, 2]), np.array([0, 1]))
    with pytest.raises(ValueError, match="fraction|class id"):
        compute_metrics(TASKS["rte"], np.array([0, 0.5]), np.array([0, 1]))


@pytest.mark.parametrize("shape", [(3,), (2, 2), ()])
def test_shapes_that_differ_are_refused(shape):
    with pytest.raises(ValueError, match="references"):
        compute_metrics(TASKS["rte"], np.zeros(shape, int), np.zeros(2, int))


def test_majority_baseline_is_the_published_one():
    # Row counts of MRPC dev (279 of 408 equivalent) and WNLI dev (40 of 71 not entailed).
    assert majority_baseline(TASKS["mrpc"], np.repeat([1, 0], [279, 129])) == pytest.approx(0.8122, abs=1e-4)
    assert majority_baseline(TASKS["wnli"], np.repeat([0, 1], [40, 31])) == pytest.approx(40 / 71)
    assert majority_baseline(TASKS["qqp"], np.array([0, 0, 1])) == 0.0
    assert majority_baseline(TASKS["cola"], np.array([1, 1, 0])) == 0.0
    assert majority_baseline(TASKS["stsb"], np.array([1.0, 2.0])) is None
    assert majority_baseline(TASKS["rte"], np.array([], int)) is None


EVALUATE_SCRIPT = """
import json, sys
import evaluate
metric = lambda name: evaluate.load("bert_glue/glue_metric.py", name)
print(json.dumps({name: metric(name).compute(**case) for name, case in json.loads(sys.argv[1]).items()}))
"""


def test_evaluate_loads_the_same_metrics_offline(tmp_path):
    rng = np.random.default_rng(0)
    cases = {name: random_case(task, rng) for name, task in TASKS.items()}
    cases["stsb"] = (np.full(3, 0.1), np.array([1.0, 2.0, 4.0]))
    columns = {n: {"predictions": p.tolist(), "references": r.tolist()} for n, (p, r) in cases.items()}
    # HF_ENDPOINT on the discard port: a request to the hub would fail, not pass unnoticed.
    environment = {
        **os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE_SCRIPT, json.dumps(columns)],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    for name, (predictions, references) in cases.items():
        expected = compute_metrics(TASKS[name], predictions, references)
        assert loaded[name].pop("reasons", {}) == expected.reasons
        assert loaded[name] == dict(expected)
    assert loaded["stsb"]["pearson"] is None


def test_metrics_of_confusion_counts_are_scikit_learns():
    from sklearn.metrics import f1_score, matthews_corrcoef

    draw = np.random.default_rng(5)
    for labels, name in ((2, "f1"), (2, "matthews_correlation"), (5, "matthews_correlation")):
        counts = draw.integers(0, 7, (20, labels, labels))
        counts[0], counts[1, :, 1:] = np.eye(labels, dtype=int), 0  # all right; one class predicted
        found = METRICS_OF_COUNTS[name](counts)
        for matrix, value in zip(counts, found, strict=True):
            true, predicted = (np.repeat(axis.ravel(), matrix.ravel()) for axis in np.indices(matrix.shape))
            theirs = {"f1": f1_score, "matthews_correlation": matthews_corrcoef}[name](true, predicted)
            assert value == pytest.approx(theirs, abs=1e-12)
