"""The analysis of an evaluation against slow and known definitions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_run import arguments, make_data, make_model, results_of

from bert_glue.data.batching import TokenSplit
from bert_glue.data.sources import Split
from bert_glue.errors import DataError
from bert_glue.evaluation.analysis import analyse, calibration, class_results, confusion, diagnostic, standard_error
from bert_glue.evaluation.answers import softmax
from bert_glue.evaluation.metrics import compute_metrics
from bert_glue.pipeline import run as pipeline
from bert_glue.tasks import get_task, own_task


def test_confusion_is_scikit_learns():
    from sklearn.metrics import confusion_matrix

    draw = np.random.default_rng(0)
    labels, predictions = draw.integers(0, 3, 200), draw.integers(0, 3, 200)
    assert (confusion(labels, predictions, 3) == confusion_matrix(labels, predictions)).all()
    assert confusion(np.array([0, 0]), np.array([0, 0]), 2).tolist() == [[2, 0], [0, 0]]


def test_calibration_by_its_definition():
    draw = np.random.default_rng(1)
    shares = softmax(draw.standard_normal((500, 3)) * 3)
    labels = draw.integers(0, 3, 500)
    found = calibration(shares, labels)
    error = 0.0
    for low in np.arange(10) / 10:
        rows = [i for i in range(500) if low <= shares[i].max() < low + 0.1 or (low == 0.9 and shares[i].max() == 1)]
        if rows:
            right = np.mean([shares[i].argmax() == labels[i] for i in rows])
            error += len(rows) / 500 * abs(right - np.mean([shares[i].max() for i in rows]))
    assert found["ece"] == pytest.approx(error, abs=1e-9)
    assert sum(rows for _, _, rows, _, _ in found["bins"]) == 500


def test_a_perfect_and_an_overconfident_model():
    assert calibration(np.array([[1.0, 0.0]] * 4), np.zeros(4, int))["ece"] == 0.0
    assert calibration(np.array([[1.0, 0.0]] * 4), np.array([0, 0, 1, 1]))["ece"] == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["wnli", "mrpc", "cola", "stsb"])
def test_standard_error_is_the_spread_over_samples(name):
    """Compared with drawing new evaluation sets from one population."""
    task, draw = get_task(name), np.random.default_rng(3)

    def sample(rows: int) -> tuple[np.ndarray, np.ndarray]:
        if task.is_regression:
            labels = draw.standard_normal(rows)
            return 0.8 * labels + 0.6 * draw.standard_normal(rows), labels
        labels = (draw.random(rows) < 0.65).astype(np.int64)
        return np.where(draw.random(rows) < 0.85, labels, 1 - labels), labels

    values = [compute_metrics(task, *sample(300))[task.headline] for _ in range(400)]
    errors = []
    for _ in range(20):
        predictions, labels = sample(300)
        errors.append(
            standard_error(task, predictions, labels, compute_metrics(task, predictions, labels)[task.headline])
        )
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_three_classes_have_matthews_too():
    draw, task = np.random.default_rng(0), get_task("ax")
    labels = draw.integers(0, 3, 300)
    predictions = np.where(draw.random(300) < 0.6, labels, draw.integers(0, 3, 300))
    value = compute_metrics(task, predictions, labels)[task.headline]
    assert 0.02 < standard_error(task, predictions, labels, value) < 0.06


def test_what_has_no_value_has_no_error():
    task = get_task("stsb")
    assert standard_error(task, np.zeros(9), np.arange(9.0), None) is None
    assert standard_error(get_task("rte"), np.zeros(3, int), np.zeros(3, int), 1.0) is None


def split_of(labels: np.ndarray) -> TokenSplit:
    class Rows:
        def __len__(self):
            return len(labels)

    return TokenSplit("validation", Rows(), labels)


def test_hardest_errors_are_wrong_and_sorted_by_loss():
    task = get_task("rte")
    logits = np.array([[3.0, 0.0], [0.0, 2.0], [0.0, 5.0], [1.0, 0.0]], np.float32)
    labels = np.array([0, 0, 0, 1])
    texts = Split("validation", (list("abcd"), list("ABCD")), labels.tolist(), "here")
    found = analyse(task, texts, split_of(labels), logits)["hardest"]
    assert [error["row"] for error in found] == [2, 1, 3]
    assert found[0]["texts"] == ["c", "C"] and found[0]["label"] == "entailment"
    assert found[0]["prediction"] == "not_entailment"
    assert found[0]["loss"] == pytest.approx(-np.log(softmax(logits)[2, 0]), abs=1e-4)


def write_diagnostic(folder: Path, labels: list[str]) -> None:
    (folder / "diagnostic").mkdir(parents=True)
    rows = [
        f"{'Quantifiers' if n % 2 else ''}\t\t{'Negation' if n < 3 else ''}\t\t{label}"
        for n, label in enumerate(labels)
    ]
    header = "Lexical Semantics\tPredicate-Argument Structure\tLogic\tKnowledge\tLabel"
    (folder / "diagnostic" / "diagnostic-full.tsv").write_text("\n".join([header, *rows]) + "\n")


def test_diagnostic_categories(tmp_path):
    task = get_task("ax")
    write_diagnostic(tmp_path, ["entailment", "neutral", "contradiction", "entailment"])
    found = diagnostic(task, str(tmp_path), np.array([0, 1, 2, 1]))
    assert set(found) == {"all", "Lexical Semantics", "Logic"}
    assert found["all"][1] == 4 and found["Logic"] == [1.0, 3] and found["Lexical Semantics"][1] == 2
    assert diagnostic(task, None, np.array([0])) is None
    assert diagnostic(task, str(tmp_path / "diagnostic"), np.array([0])) is None
    with pytest.raises(DataError, match="4 rows, but there are 9 predictions"):
        diagnostic(task, str(tmp_path), np.zeros(9, int))


def test_an_unknown_diagnostic_label_is_named(tmp_path):
    write_diagnostic(tmp_path, ["entailment", "maybe"])
    with pytest.raises(DataError, match=r"diagnostic-full\.tsv:3: the label is not one of entailment"):
        diagnostic(get_task("ax"), str(tmp_path), np.zeros(2, int))


@pytest.mark.parametrize("padding", ["packed", "longest"])
def test_a_run_leaves_its_analysis_and_explains_rows(tmp_path, padding):
    model = make_model(tmp_path / "model")
    args = arguments(
        tmp_path, model_name_or_path=str(model), do_eval=True, explain=2, max_steps=4, padding=padding,
        **make_data(tmp_path / "data"),
    )  # fmt: skip
    assert pipeline.run(args) == 0
    part = results_of(args, "analysis.json")["splits"]["validation"]
    results = results_of(args)
    assert part["rows"] == 13 and np.sum(part["confusion"]) == 13
    assert np.trace(part["confusion"]) / 13 == pytest.approx(results["eval_accuracy"])
    assert results["eval_accuracy_standard_error"] == part["standard_error"]
    assert part["majority"] == results["eval_majority_baseline"]
    assert len(part["explained"]) == 2
    for example in part["explained"]:
        assert example["tokens"][0] == "[CLS]" and example["tokens"].count("[SEP]") == 2
        assert len(example["scores"]) == len(example["tokens"]) and any(example["scores"])
    page = (Path(args.output_dir) / "report.html").read_text()
    assert "gradient x input" in page and "[CLS]" in page


def test_attribution_is_the_slope_along_each_embedding(tmp_path):
    """Gradient x input of a token is d logit / d scale of its embedding, here by finite differences."""
    import torch

    from bert_glue.data.sources import load_task_data
    from bert_glue.devices.distributed import DistributedContext
    from bert_glue.evaluation.analysis import token_scores
    from bert_glue.evaluation.evaluator import Evaluator
    from bert_glue.model.loading import load_model
    from bert_glue.pipeline.inputs import tokenize_splits
    from bert_glue.precision.native import InferencePrecision
    from bert_glue.precision.plan import plan_precision
    from bert_glue.training.console import ConsoleLog
    from bert_glue.training.setup import build_collator

    args = arguments(tmp_path, model_name_or_path=str(make_model(tmp_path / "model")))
    ranks, data = DistributedContext(args), load_task_data(args, frozenset({"train"}))
    model = load_model(args, data.task)
    model.module.double()
    split = tokenize_splits(args, data, model, ConsoleLog(False, False))["train"]
    precision = InferencePrecision(plan_precision(args, ranks.device), model.module)
    evaluator = Evaluator(model.module.eval(), build_collator(args, model, ranks, None), 8, ranks, precision)
    with torch.no_grad():
        model.module.head_output.weight.normal_()
    scores = token_scores(model, evaluator, split, 0, 1)
    inputs = evaluator.collate(split, np.array([0])).inputs
    for at in (0, 3, len(scores) - 1):

        def logit(scale: float, at: int = at) -> float:
            def stretch(module, given, embedded):
                factor = torch.ones(len(embedded), 1, dtype=embedded.dtype)
                factor[at] = scale
                return embedded * factor

            handle = model.module.words.register_forward_hook(stretch)
            with torch.no_grad():
                value = evaluator.module(**inputs)[0, 1].item()
            handle.remove()
            return value

        slope = (logit(1 + 1e-5) - logit(1 - 1e-5)) / 2e-5
        assert scores[at].item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_analysis_is_strict_json(tmp_path):
    data = tmp_path / "train.csv"
    data.write_text("sentence1,sentence2,label\n" + "".join(f"a dog,a cat {n},{n / 7}\n" for n in range(20)))
    args = arguments(tmp_path, train_file=str(data), validation_file=str(data), do_eval=True, max_steps=2)
    assert pipeline.run(args) == 0
    part = results_of(args, "analysis.json")["splits"]["validation"]
    assert "confusion" not in part and len(part["points"]) == 20 and part["hardest"][0]["probability"] is None
    assert json.loads((Path(args.output_dir) / "all_results.json").read_text())["eval_samples"] == 20


def test_a_broken_diagnostic_does_not_cost_the_run(tmp_path):
    from bert_glue.pipeline.score import _diagnose

    write_diagnostic(tmp_path, ["entailment", "maybe"])
    analysis: dict = {}
    args = arguments(tmp_path, data_path=str(tmp_path), model_name_or_path="x")
    reason = _diagnose(args, get_task("ax"), np.zeros(2, int), analysis)["diagnostic_ax_reason"]
    assert "diagnostic-full.tsv:3" in reason and analysis == {}
    args = arguments(tmp_path, data_path=str(tmp_path / "diagnostic"), model_name_or_path="x")
    assert (
        "need diagnostic-full.tsv of GLUE" in _diagnose(args, get_task("ax"), np.zeros(2, int), analysis).popitem()[1]
    )


@pytest.mark.parametrize(("classes", "rows"), [(60, 500), (1200, 1200), (5000, 300)])
def test_many_classes_take_memory_of_rows_times_classes(classes, rows):
    import tracemalloc

    draw = np.random.default_rng(5)
    task = own_task("own", ("text",), tuple(f"c{n:04d}" for n in range(classes)))
    labels = draw.integers(0, classes, rows)
    logits = draw.standard_normal((rows, classes)).astype(np.float32)
    logits[: rows // 2, 7] += 50
    texts = Split("validation", (["x" * 100_000] * rows,), labels.tolist(), "")
    compute_metrics(task, logits.argmax(1), labels)  # scikit-learn's import is not counted
    tracemalloc.start()
    found = analyse(task, texts, TokenSplit("validation", range(rows), labels), logits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * rows * classes + 5_000_000
    assert "confusion" not in found and len(found["confused"]) <= 50
    counts = [pair["rows"] for pair in found["confused"]]
    assert counts == sorted(counts, reverse=True)
    assert len(json.dumps(found)) < 300_000 + 200 * classes


@pytest.mark.parametrize("classes", [2, 3, 40])
def test_results_of_classes_are_scikit_learns(classes):
    """The last class has no row, and the first is never predicted."""
    from sklearn.metrics import classification_report

    draw = np.random.default_rng(classes)
    task = own_task("own", ("text",), tuple(f"c{n}" for n in range(classes)))
    labels = draw.integers(0, max(1, classes - 1), 200)
    predictions = draw.integers(min(1, classes - 1), classes, 200)
    logits = np.eye(classes, dtype=np.float32)[predictions]
    part = analyse(task, Split("validation", (["a"] * 200,), None, ""), TokenSplit("v", range(200), labels), logits)
    found = class_results({"validation": {"suffix": "_mm", **part}})
    report = classification_report(
        labels, predictions, labels=range(classes), target_names=task.labels, output_dict=True, zero_division=0
    )
    for label, row in found["eval_classes_mm"].items():
        assert row["rows"] == report[label]["support"]
        for name, key in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert (row[name] or 0.0) == pytest.approx(report[label][key], abs=1e-6)
    for name, key in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
        assert found[f"eval_{name}_macro_mm"] == pytest.approx(report["macro avg"][key], abs=1e-6)


def test_scores_have_no_classes():
    assert class_results({"validation": {"suffix": "", "rows": 3}}) == {}
