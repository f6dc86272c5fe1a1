"""Runs that learn nothing are detected, during the run and in its results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_run import arguments, fit, results_of

from bert_glue.evaluation.collapse import (
    CollapseWatch,
    collapse_reason,
    collapsed_predictions,
    constant_loss,
    flat_loss,
)
from bert_glue.pipeline import run as pipeline
from bert_glue.tasks import TASKS
from bert_glue.training.console import ConsoleLog

MRPC, STSB = TASKS["mrpc"], TASKS["stsb"]


def test_one_class_for_all_rows_is_a_collapse() -> None:
    labels = np.array([0, 1, 1, 0])
    assert collapsed_predictions(MRPC, np.array([1, 1, 1, 1]), labels) == "all 4 predictions are equivalent"
    assert collapsed_predictions(MRPC, np.array([1, 1, 1, 0]), labels) is None
    # Labels of one class: the right answer is a constant.
    assert collapsed_predictions(MRPC, np.ones(4, int), np.ones(4, int)) is None


def test_scores_that_barely_differ_are_a_collapse() -> None:
    labels = np.linspace(0, 5, 50)
    assert "barely differ" in collapsed_predictions(STSB, np.full(50, 2.5) + 1e-3 * labels, labels)
    assert collapsed_predictions(STSB, 0.2 * labels + 2, labels) is None


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_constant_loss_is_the_least_a_constant_can_have(smoothing: float) -> None:
    labels = torch.tensor([0] * 3 + [1] * 7)
    losses = [
        F.cross_entropy(torch.tensor([[0.0, bias]]).expand(10, 2), labels, label_smoothing=smoothing).item()
        for bias in np.linspace(-3, 3, 2001)
    ]
    assert constant_loss(MRPC, labels.numpy(), smoothing) == pytest.approx(min(losses), abs=1e-5)


def test_the_constant_loss_of_scores_is_their_variance() -> None:
    labels = np.array([0.0, 1.0, 5.0], np.float32)
    assert constant_loss(STSB, labels) == pytest.approx(np.var(labels))


def entries(losses: list[float], every: int = 10) -> list[dict]:
    return [{"step": every * (at + 1), "loss": loss} for at, loss in enumerate(losses)]


def test_flat_is_judged_on_the_later_half() -> None:
    assert "of the last 50 steps is 0.6500" in flat_loss(entries([0.69] * 5 + [0.65] * 5), 0.66)
    assert flat_loss(entries([0.69] * 5 + [0.5] * 5), 0.66) is None
    assert flat_loss(entries([0.69]), 0.66) is None  # ten steps tell nothing
    assert flat_loss([], 0.66) is None and flat_loss([{"step": 5, "eval_loss": 1.0}], 0.66) is None
    assert flat_loss(entries([0.69] * 9), 0.0) is None  # a single class in the data
    assert flat_loss(entries([0.69], every=300), 0.66)  # one log line for the whole run


def test_the_watch_warns_once_and_from_half_of_the_run_on() -> None:
    history: list[dict] = []
    watch, said = CollapseWatch(0.66, 100), []
    for entry in entries([0.66] * 10):
        history.append(entry)
        said.append(watch.warnings(history))
    assert [bool(lines) for lines in said] == [False] * 4 + [True] + [False] * 5
    assert said[4][0].startswith("warning: nothing learned so far: the loss of the last")
    entry = {"step": 100, "eval_collapsed": "all 9 predictions are x", "eval_collapsed_mm": None}
    warned = watch.warnings([*history, entry])
    assert warned == ["warning: nothing learned so far: eval_collapsed: all 9 predictions are x"]


class Lines(ConsoleLog):
    """A log that keeps its lines."""

    def __init__(self) -> None:
        super().__init__(True, False)
        self.kept: list[str] = []

    def line(self, text: str) -> None:
        self.kept.append(text)


def test_a_run_that_cannot_learn_is_warned_of_and_marked(tmp_path) -> None:
    """With learning rate 0 the loss stays constant, but predictions may still differ."""
    stuck = arguments(tmp_path, learning_rate=0.0, num_train_epochs=10.0, eval_strategy="epoch", do_eval=True)
    log = Lines()
    fit(stuck, log)
    assert [line for line in log.kept if line.startswith("warning: nothing learned so far: the loss")]
    assert pipeline.run(stuck) == 0
    assert "that of a constant prediction" in results_of(stuck)["train_collapsed"]


def test_a_run_that_learns_is_neither(tmp_path) -> None:
    args = arguments(tmp_path, num_train_epochs=20.0, do_eval=True)
    log = Lines()
    fit(args, log)
    assert not [line for line in log.kept if line.startswith("warning")]
    assert pipeline.run(args) == 0
    results = results_of(args)
    assert results["train_collapsed"] is None and results["eval_collapsed"] is None
    assert results["eval_majority_baseline"] == pytest.approx(7 / 13)
    assert results["eval_accuracy_standard_error"] == pytest.approx(
        (results["eval_accuracy"] * (1 - results["eval_accuracy"]) / 13) ** 0.5, rel=0.1
    )


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        ({}, None),
        ({"eval_collapsed": None, "eval_collapsed_mm": None, "train_collapsed": None}, None),
        ({"eval_collapsed": None, "eval_collapsed_mm": "all 9 predictions are x"}, "all 9 predictions are x"),
        ({"eval_collapsed": None, "train_collapsed": "the loss is flat"}, "the loss is flat"),
        ({"train_collapsed": "the loss is flat", "eval_collapsed": "all are y"}, "all are y"),
        ({"eval_accuracy": None}, None),  # no value is not yet a collapse: one row has no correlation
    ],
)
def test_a_finished_run_has_collapsed_on_any_split_or_in_training(results, reason):
    assert collapse_reason(results) == reason
