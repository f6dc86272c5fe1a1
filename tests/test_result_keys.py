"""Keys of results: what they are, and that no other module spells one out."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from bert_glue import result_keys as keys
from bert_glue.tasks import TASKS

PACKAGE = Path(__file__).parents[1] / "bert_glue"
WHOLE = {value for name, value in vars(keys).items() if name.startswith("TRAIN_") and isinstance(value, str)}


def spelt_out(text: str) -> list[int]:
    """Lines with a key of results that `result_keys` should have built."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and node.value in WHOLE:
            found.append(node.lineno)
        if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant) and len(node.values) > 1:
            found += [node.lineno] * str(node.values[0].value).startswith(("eval_", "predict_"))
    return found


def test_no_other_module_spells_a_key_out() -> None:
    modules = [file for file in PACKAGE.rglob("*.py") if file.name != "result_keys.py"]
    found = {str(file.relative_to(PACKAGE)): spelt_out(file.read_text(encoding="utf-8")) for file in modules}
    assert not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize("text", ['x["train_loss"]', 'x[f"eval_{metric}"]', 'f"predict_results_{task}.txt"'])
def test_a_key_that_is_spelt_out_is_found(text: str) -> None:
    assert spelt_out(text) == [1]


def test_the_keys_that_harnesses_read() -> None:
    assert keys.evaluation_key("accuracy", "_mm") == "eval_accuracy_mm"
    assert keys.reason_key(keys.evaluation_key("f1")) == "eval_f1_reason"
    assert keys.standard_error_key("accuracy", "_mm") == "eval_accuracy_standard_error_mm"
    assert keys.headline_keys(TASKS["mnli"]) == ["eval_accuracy", "eval_accuracy_mm"]
    assert keys.headline_key_of({"headline_metric": "f1"}) == "eval_f1"
    assert keys.predicted_samples_key("mnli", "-mm") == "predict_samples_mnli-mm"
    assert keys.predictions_file("mnli", "-mm") == "predict_results_mnli-mm.txt"
    assert keys.step_milliseconds_key("p90") == "train_step_ms_p90"


def test_what_a_key_is_of() -> None:
    assert keys.is_loss("eval_loss_mm") and not keys.is_loss("eval_f1")
    assert keys.is_of_evaluation("eval_loss") and keys.is_of_training("train_loss")
    assert keys.is_measured("peak_memory_bytes") and not keys.is_measured("task_name")


@pytest.mark.parametrize(
    "value", [{}, {"no": {"precision": None, "recall": 0.0, "rows": 6}}, {"a": {}, "b": {"f1": 1}}]
)
def test_figures_by_class_are_read_as_they_are_written(value) -> None:
    assert not keys.wrong_value({"eval_classes": value, "eval_classes_mm": value})


@pytest.mark.parametrize("value", [[], "no", None, {"no": 0.5}, {"no": {"f1": "high"}}, {"no": {"f1": float("nan")}}])
def test_figures_by_class_of_another_kind_are_named(value) -> None:
    assert "eval_classes" in keys.wrong_value({"eval_classes": value})


@pytest.mark.parametrize("value", [float("inf"), 1, "yes", []])
def test_whether_data_were_samples_is_true_or_false(value):
    assert "sample_data" in keys.wrong_value({"sample_data": value})
    assert keys.wrong_value({"sample_data": True}) == keys.wrong_value({"sample_data": None}) == ""
