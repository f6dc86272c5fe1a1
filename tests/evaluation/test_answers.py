"""Several labels a row: probabilities, losses and metrics equal transformers', torch's and scikit-learn's."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bert_glue.data.batching import TokenSplit
from bert_glue.data.splits import Split
from bert_glue.evaluation.analysis import analyse, class_results, standard_error
from bert_glue.evaluation.answers import answer_text, label_array, predictions_of, probabilities, row_losses
from bert_glue.evaluation.collapse import collapsed_predictions, constant_loss
from bert_glue.evaluation.metrics import compute_metrics, majority_baseline
from bert_glue.tasks import Decision, own_task
from bert_glue.training.losses import disagreement, sample_losses


def task_of(count: int, threshold: float = 0.5):
    task = own_task("own", ("text",), tuple(f"c{n}" for n in range(count)), is_multi_label=True)
    return replace(task, decision=Decision(threshold))


def draw(rows: int, count: int, seed: int, rate: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[rows, labels]` with a signal, and labels."""
    generator = np.random.default_rng(seed)
    labels = generator.random((rows, count)) < rate
    return (generator.standard_normal((rows, count)) * 2 + 1.5 * labels - 0.5).astype(np.float32), labels


@pytest.mark.parametrize(("rows", "count", "rate"), [(40, 3, 0.3), (7, 12, 0.05), (25, 2, 0.9), (60, 5, 0.0)])
@pytest.mark.parametrize("threshold", [0.5, 0.2, 0.93])
def test_metrics_are_scikit_learns_at_the_threshold(rows, count, rate, threshold):
    from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

    task = task_of(count, threshold)
    logits, labels = draw(rows, count, rows + count, rate)
    given = torch.sigmoid(torch.from_numpy(logits).double()).numpy() > threshold
    assert (predictions_of(task, logits) == given).all()
    found = compute_metrics(task, given, labels)
    for average in ("micro", "macro", "samples"):
        wanted = f1_score(labels, given, average=average, zero_division=0.0)
        assert found[f"f1_{average}"] == pytest.approx(wanted, abs=1e-12)
    assert found["subset_accuracy"] == accuracy_score(labels, given) and "combined_score" not in found
    split = TokenSplit("validation", range(rows), labels)
    part = analyse(task, Split("validation", (["a"] * rows,), None, "FILE"), split, logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = precision_recall_fscore_support(labels, given, average=None, zero_division=np.nan)
    ours = [[row[name] for row in part["classes"]] for name in ("precision", "recall", "f1", "rows")]
    np.testing.assert_allclose(np.array(ours, float), np.array(theirs, float), atol=1e-6)
    assert "confusion" not in part and "confused" not in part
    assert [row["predicted"] for row in part["classes"]] == given.sum(0).tolist()
    assert class_results({"validation": {"suffix": "", **part}})["eval_f1_macro"] == pytest.approx(
        found["f1_macro"], abs=1e-6
    )


def test_one_class_alone_is_scored_too():
    task, (logits, labels) = task_of(1), draw(30, 1, 0)
    from sklearn.metrics import f1_score

    found = compute_metrics(task, logits > 0, labels)
    assert found["f1_micro"] == found["f1_macro"] == pytest.approx(f1_score(labels[:, 0], logits[:, 0] > 0))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_loss_and_its_gradient_are_those_of_transformers(count):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(count)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20,
        num_labels=count, problem_type="multi_label_classification",
    )  # fmt: skip
    model, ids = BertForSequenceClassification(config).eval(), torch.randint(0, 30, (5, 7))
    labels = torch.rand(5, count) < 0.4
    theirs = model(input_ids=ids, labels=labels.float())
    logits = theirs.logits.detach().requires_grad_()
    ours = sample_losses(task_of(count), logits, labels, 0.0) / len(labels)
    assert ours.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    wanted = torch.autograd.grad(F.binary_cross_entropy_with_logits(logits, labels.float()), logits)[0]
    torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], wanted)
    assert row_losses(task_of(count), logits.detach().numpy(), labels.numpy()).mean() == pytest.approx(
        ours.item(), rel=1e-5
    )
    torch.testing.assert_close(
        torch.from_numpy(probabilities(task_of(count), logits.detach().numpy())), logits.detach().double().sigmoid()
    )


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_smoothing_and_r_drop_are_those_of_two_outcomes_a_class(smoothing):
    logits, labels = (torch.from_numpy(array) for array in draw(6, 4, 1))
    pairs = torch.stack([torch.zeros_like(logits), logits], -1).reshape(-1, 2)
    wanted = F.cross_entropy(pairs, labels.long().flatten(), reduction="sum", label_smoothing=smoothing) / 4
    torch.testing.assert_close(sample_losses(task_of(4), logits, labels, smoothing), wanted)
    other = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    two = torch.stack([torch.zeros_like(other), other], -1).reshape(-1, 2)
    single = own_task("own", ("text",), ("a", "b"))
    torch.testing.assert_close(disagreement(task_of(4), logits, other), disagreement(single, pairs, two) / 4)


def test_probabilities_of_huge_logits_are_finite():
    shares = probabilities(task_of(2), np.array([[1e4, -1e4], [0.0, 90.0]], np.float32))
    assert shares.tolist() == [[1.0, 0.0], [0.5, pytest.approx(1.0)]]


@pytest.mark.parametrize("seed", range(4))
def test_the_baseline_is_the_best_of_all_constant_answers(seed):
    task, (_, labels) = task_of(5), draw(23, 5, seed)
    sets = [np.array([number >> at & 1 for at in range(5)], bool) for number in range(1, 32)]
    best = max(compute_metrics(task, np.tile(one, (23, 1)), labels)["f1_micro"] for one in sets)
    assert majority_baseline(task, labels) == pytest.approx(best, abs=1e-12)


def test_collapse_and_the_constant_loss():
    task, (logits, labels) = task_of(3), draw(50, 3, 3)
    assert collapsed_predictions(task, predictions_of(task, logits), labels) is None
    assert collapsed_predictions(task, np.zeros_like(labels), labels) == "all 50 predictions are (none)"
    assert "all 50 predictions are c0, c2" in collapsed_predictions(task, np.tile([True, False, True], (50, 1)), labels)
    shares = np.tile(labels.mean(0), (50, 1))
    constant = np.log(shares / (1 - shares))
    for smoothing in (0.0, 0.2):
        smooth = np.log((shares * (1 - smoothing) + smoothing / 2) / (1 - shares * (1 - smoothing) - smoothing / 2))
        best = sample_losses(
            task, torch.from_numpy(smooth if smoothing else constant), torch.from_numpy(labels), smoothing
        )
        assert constant_loss(task, labels, smoothing) == pytest.approx(best.item() / 50, rel=1e-5)


def test_the_standard_error_is_the_spread_over_samples():
    task = task_of(4)
    values, errors = [], []
    for seed in range(300):
        logits, labels = draw(200, 4, 1000 + seed)
        given = logits > 0
        values.append(compute_metrics(task, given, labels)["f1_micro"])
        errors.append(standard_error(task, given, labels, values[-1]))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_answers_as_text_and_labels_as_an_array():
    task = task_of(3)
    assert label_array(task, [(0, 2), (), (1,)]).tolist() == [[True, False, True], [False] * 3, [False, True, False]]
    assert answer_text(task, np.array([True, False, True])) == "c0, c2"
    assert answer_text(task, np.zeros(3, bool)) == "(none)"
    assert answer_text(task_of(1200), np.ones(1200, bool)).endswith("c19 and 1180 more")
