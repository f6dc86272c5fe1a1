"""A setting acts or is refused: shares of steps, log lines, metrics the data has, a best model not chosen."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from tiny_run import arguments, fit, results_of

from bert_glue.config.parser import parse
from bert_glue.config.resolve import with_step_counts
from bert_glue.errors import UsageError
from bert_glue.pipeline import run
from bert_glue.training.console import ConsoleLog

BASE = ["--model_name_or_path", "m", "--task_name", "mrpc", "--output_dir", "o", "--do_train"]


def logged(args) -> list[int]:
    return [entry["step"] for entry in fit(args).progress.history if "loss" in entry]


@pytest.mark.parametrize("total", [1, 7, 19, 41, 999, 100_000])
@pytest.mark.parametrize("share", ["0.05", "0.3", "0.999"])
def test_shares_are_those_of_transformers(total, share):
    from transformers import TrainingArguments
    from transformers.trainer_callback import TrainerState

    words = ["--eval_strategy", "steps", *(f"--{name}_steps={share}" for name in ("logging", "eval", "save"))]
    ours = with_step_counts(parse([*BASE, *words]), total)
    theirs = TrainerState()
    theirs.compute_steps(
        TrainingArguments(
            "o", eval_strategy="steps", eval_steps=float(share), save_steps=float(share), logging_steps=float(share),
            use_cpu=True, report_to="none",
        ),
        total,
    )  # fmt: skip
    assert (ours.logging_steps, ours.eval_steps, ours.save_steps) == (
        theirs.logging_steps, theirs.eval_steps, theirs.save_steps,
    )  # fmt: skip


@pytest.mark.parametrize("value", ["0", "1.5", "-1", "inf", "0.0"])
@pytest.mark.parametrize("name", ["logging_steps", "eval_steps", "save_steps"])
def test_other_fractions_are_refused(name, value):
    with pytest.raises(UsageError, match=name):
        parse([*BASE, f"--{name}={value}"])


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        ("--eval_steps 10", "--eval_strategy steps"),
        ("--save_steps 0.1 --save_strategy epoch", "--save_strategy steps"),
        ("--metric_for_best_model f1", "--load_best_model_at_end or --early_stopping_patience"),
        ("--greater_is_better False", "--load_best_model_at_end or --early_stopping_patience"),
        ("--early_stopping_threshold 0.1", "--early_stopping_patience"),
    ],
)
def test_a_setting_that_nothing_reads_is_said(words, needed):
    name = words.split()[0]
    assert f"{name} has no effect without {needed}" in parse([*BASE, *words.split()]).notices


def test_an_evaluation_that_never_comes_is_said(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(ConsoleLog, "line", lambda self, text: lines.append(text))
    fit(arguments(tmp_path, eval_strategy="steps", eval_steps=50, max_steps=2))
    told = "evaluates nothing while this run trains: --eval_steps 50 is larger than its 2 steps"
    assert any(told in line for line in lines)


def test_whole_numbers_stay_whole():
    args = parse([*BASE, "--logging_steps", "1e2", "--save_steps", "10", "--eval_strategy", "steps"])
    assert (repr(args.logging_steps), repr(args.save_steps), repr(args.eval_steps)) == ("100", "10", "100")


@pytest.mark.parametrize(("total", "lines"), [(3, 3), (20, 20), (39, 39), (1000, 20), (12_000, 24)])
def test_a_run_logs_its_loss_twenty_times(total, lines):
    every = with_step_counts(parse(BASE), total).logging_steps
    assert lines <= total // every <= max(lines, 40)
    assert with_step_counts(parse([*BASE, "--logging_steps", "500"]), total).logging_steps == 500


def test_shares_act_in_a_run(tmp_path):
    args = arguments(tmp_path, logging_steps=0.25, save_strategy="steps", save_steps=0.5)
    assert logged(args) == [2, 4, 6, 8]
    assert sorted(path.name for path in Path(args.output_dir).glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]


@pytest.mark.parametrize(
    "flag", [{"load_best_model_at_end": True, "save_strategy": "steps"}, {"early_stopping_patience": 2}]
)
def test_an_evaluation_that_never_comes_is_refused(tmp_path, flag):
    with pytest.raises(UsageError, match="--eval_steps 50 is larger than the run's 8 steps"):
        fit(arguments(tmp_path, eval_strategy="steps", eval_steps=50, save_steps=50, **flag))


def scores_file(folder: Path, constant: bool = False) -> dict[str, str]:
    path = folder / "scores.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "label"])
        writer.writerows([f"a dog runs {n}", 1.5 if constant else n / 4] for n in range(24))
    return {"train_file": str(path), "validation_file": str(path)}


@pytest.mark.parametrize("metric", ["accuracy", "eval_f1", "matthews_correlation"])
def test_a_metric_that_scores_do_not_have_is_refused_before_training(tmp_path, metric):
    args = arguments(
        tmp_path, do_eval=True, eval_strategy="epoch", metric_for_best_model=metric, **scores_file(tmp_path)
    )
    with pytest.raises(UsageError, match="--metric_for_best_model.*regression.*pearson"):
        run.run(args)


@pytest.mark.parametrize("metric", ["pearson", "spearmanr", "combined_score"])
def test_a_metric_that_classes_do_not_have_is_refused_before_training(tmp_path, metric):
    args = arguments(tmp_path, do_eval=True, eval_strategy="epoch", metric_for_best_model=metric)
    with pytest.raises(UsageError, match="--metric_for_best_model.*2 classes.*accuracy"):
        run.run(args)


@pytest.mark.parametrize("bound", ["pearson>=0.5", "own_data_is>=1", "spearmanr>0"])
def test_an_expectation_the_data_cannot_meet_is_refused_before_training(tmp_path, bound):
    with pytest.raises(UsageError, match="--expect"):
        run.run(arguments(tmp_path, do_eval=True, expect=bound))
    assert not (tmp_path / "out" / "all_results.json").exists()


def test_a_best_model_that_was_not_chosen_is_told(tmp_path, capsys):
    """All labels are the same, so that no correlation has a value."""
    args = arguments(
        tmp_path, do_eval=True, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        num_train_epochs=4.0, early_stopping_patience=2, **scores_file(tmp_path, constant=True),
    )  # fmt: skip
    assert run.run(args) == 0
    told = capsys.readouterr().out
    assert "chose nothing and the last weights stay: eval_" in told and "constant" in told
    assert "early stopping after step" in told
    assert results_of(args)["epoch"] == 2.0


def test_the_bar_shows_loss_rate_score_and_speed(monkeypatch):
    from io import StringIO

    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "200")
    log = ConsoleLog(True, True)
    log.set_scale(32, "eval_f1")
    log.advance(1, 10, 0.1)
    log.entry({"step": 1, "epoch": 0.1, "loss": 0.6543, "learning_rate": 2e-5, "grad_norm": 1.0, "loss_scale": 1.0})
    log.entry({"step": 1, "eval_loss": 0.5, "eval_accuracy": 0.7, "eval_f1": 0.8125})
    log.advance(2, 10, 0.2)
    log.advance(3, 10, 0.3)
    log.close()
    shown = screen.getvalue()
    assert "loss 0.6543" in shown and "2.00e-05" in shown and "eval_f1 0.8125" in shown
    assert re.search(r"[1-9][\d.]* samples/s", shown)
