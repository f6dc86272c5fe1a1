"""Every row once, in its place, at every size; keys and reasons of the results."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from echo_model import echo_evaluator, split_of
from safetensors.numpy import save_file
from tiny_run import arguments, bert_tensors, make_model, results_of

from bert_glue.data.batching import evaluation_batches
from bert_glue.errors import DivergedError
from bert_glue.evaluation.answers import predictions_of, row_losses
from bert_glue.evaluation.evaluator import evaluate
from bert_glue.pipeline import run as pipeline
from bert_glue.tasks import get_task


def test_each_row_is_in_its_place_at_every_size():
    for size in range(1, 68):
        split = split_of(size)
        logits = echo_evaluator().logits(split)
        assert logits.dtype == np.float32
        assert logits[:, 0].tolist() == list(range(size)), size
        assert logits[:, 1].tolist() == split.table.lengths.tolist(), size


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_share_all_rows_without_overlap(world):
    for size in (1, 2, 7, 8, 9, 63, 64, 65):
        lengths = split_of(size).table.lengths
        seen = [r for k in range(world) for rows in evaluation_batches(lengths, 4, k, world) for r in rows.tolist()]
        assert sorted(seen) == list(range(size))


def test_evaluation_leaves_dropout_and_gradients_alone():
    evaluator = echo_evaluator()
    evaluator.module.train()
    evaluator.logits(split_of(9))
    assert not evaluator.module.training and not evaluator.module.weight.grad.any()


def test_loss_is_torchs():
    draw = np.random.default_rng(0)
    logits, labels = (draw.standard_normal((50, 3)) * 30).astype(np.float32), draw.integers(0, 3, 50)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels)).item()
    assert row_losses(get_task("mnli"), logits, labels).mean() == pytest.approx(expected, rel=1e-12)
    scores = draw.standard_normal(50).astype(np.float32)
    assert row_losses(get_task("stsb"), logits, scores).mean() == pytest.approx(
        np.mean((logits[:, 0] - scores) ** 2), rel=1e-5
    )


def test_predictions_are_classes_or_scores():
    logits = np.array([[0.1, 0.9, 0.0], [3.0, 1.0, 2.0]], np.float32)
    assert predictions_of(get_task("mnli"), logits).tolist() == [1, 0]
    assert predictions_of(get_task("stsb"), logits[:, :1]).tolist() == pytest.approx([0.1, 3.0])


def test_results_hold_the_metrics_of_the_rows():
    split = split_of(20)
    results = evaluate(echo_evaluator(), get_task("sst2"), {"validation": split})
    guesses = np.arange(20) < split.table.lengths
    assert results["eval_accuracy"] == np.mean(guesses == split.labels)
    assert results["eval_samples"] == 20
    assert results["eval_real_tokens_per_second"] * results["eval_runtime"] == pytest.approx(split.table.offsets[-1])
    assert results["eval_samples_per_second"] * results["eval_runtime"] == pytest.approx(20)


def test_mnli_has_two_sets_of_keys():
    splits = {"validation_matched": split_of(12), "validation_mismatched": split_of(31)}
    results = evaluate(echo_evaluator(), get_task("mnli"), splits)
    for name, suffix in (("validation_matched", ""), ("validation_mismatched", "_mm")):
        alone = evaluate(echo_evaluator(), get_task("mnli"), {name: splits[name]})
        assert results[f"eval_accuracy{suffix}"] == alone[f"eval_accuracy{suffix}"]
        assert results[f"eval_samples{suffix}"] == len(splits[name])
        assert math.isfinite(results[f"eval_loss{suffix}"])
        assert len(alone) == len(results) / 2


def test_weights_that_diverged_are_no_result():
    evaluator = echo_evaluator()
    evaluator.module.weight.data.fill_(float("nan"))
    with pytest.raises(DivergedError, match="validation"):
        evaluate(evaluator, get_task("sst2"), {"validation": split_of(3)})


def test_constant_scores_are_null_with_the_reason(tmp_path):
    """A head of zeros predicts one score for every pair."""
    model = make_model(tmp_path / "flat")
    head = {"classifier.weight": np.zeros((1, 16), np.float32), "classifier.bias": np.full(1, 2.5, np.float32)}
    save_file({**bert_tensors(), **head}, model / "model.safetensors", {"format": "pt"})
    args = arguments(
        tmp_path, model_name_or_path=str(model), sample=True, task_name="stsb", do_train=False, do_eval=True,
        max_eval_samples=20,
    )  # fmt: skip
    assert pipeline.run(args) == 0
    results = results_of(args, "eval_results.json")
    for metric in ("pearson", "spearmanr"):
        assert results[f"eval_{metric}"] is None
        assert "constant" in results[f"eval_{metric}_reason"]
    assert results["eval_loss"] > 0
    assert "NaN" not in json.dumps(results_of(args))
