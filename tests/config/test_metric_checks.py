"""`--metric_name`, `--metric_for_best_model` and `--expect` act, or are refused with the choices of the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef
from tiny_run import arguments, changed, results_of

from bert_glue.config.metric_checks import choices_of, headline_notes, metric_for_best, metric_names, with_metric
from bert_glue.config.parser import parse
from bert_glue.errors import UsageError
from bert_glue.evaluation.analysis import standard_error
from bert_glue.evaluation.metrics import compute_metrics
from bert_glue.pipeline.run import run
from bert_glue.tasks import get_task, own_task

TWO, FOUR = own_task("own", ("text",), ("no", "yes")), own_task("own", ("text",), ("a", "b", "c", "d"))
SCORES, SETS = own_task("own", ("text",), ()), own_task("own", ("text",), ("a", "b"), is_multi_label=True)


def named(folder: Path, **flags):
    return arguments(folder, **flags)


@pytest.mark.parametrize(
    ("task", "name", "headline", "best"),
    [
        (TWO, "f1", "f1", "f1"),
        (TWO, "eval_accuracy", "accuracy", "accuracy"),
        (FOUR, "f1_macro", "f1_macro", "f1_macro"),
        (FOUR, "matthews_correlation", "matthews_correlation", "matthews_correlation"),
        (SCORES, "mse", "spearmanr", "loss"),
        (SCORES, "pearsonr", "pearson", "pearson"),
        (SCORES, "spearmanr", "spearmanr", "spearmanr"),
        (SETS, "f1", "f1_micro", "f1_micro"),
        (SETS, "accuracy", "subset_accuracy", "subset_accuracy"),
        (get_task("mrpc"), "f1", get_task("mrpc").headline, "f1"),
    ],
)
def test_a_metric_that_the_data_has_acts(tmp_path: Path, task, name: str, headline: str, best: str) -> None:
    args = named(tmp_path, metric_name=name)
    found = with_metric(args, task)
    assert found.headline == headline and metric_for_best(args, found) == best
    assert best in metric_names(found)
    assert metric_for_best(changed(args, metric_for_best_model="loss"), found) == "loss"


@pytest.mark.parametrize(
    ("task", "name"),
    [(FOUR, "f1"), (FOUR, "pearson"), (SCORES, "accuracy"), (SETS, "matthews_correlation"), (TWO, "f1_samples")],
)
@pytest.mark.parametrize("flag", ["metric_name", "metric_for_best_model"])
def test_a_metric_that_the_data_lacks_is_refused_with_the_choices(tmp_path: Path, task, name: str, flag: str) -> None:
    with pytest.raises(UsageError, match=f"--{flag} {name}: the labels of this data are") as error:
        with_metric(named(tmp_path, **{flag: name}), task)
    assert "choices: loss, " in str(error.value) and name not in choices_of(task)


def test_an_unknown_metric_is_refused_before_anything_is_read() -> None:
    base = ["--model_name_or_path", "m", "--output_dir", "o", "--do_train", "--train_file", "x.csv"]
    with pytest.raises(UsageError, match="--metric_name: unknown metric 'rouge'"):
        parse([*base, "--metric_name", "rouge"])
    with pytest.raises(UsageError, match="--metric_name: unknown metric 'f1'.*Choices: loss, accuracy"):
        parse(["--model_name_or_path", "m", "--output_dir", "o", "--do_train", "--task_name", "sst2",
               "--metric_name", "f1"])  # fmt: skip


def test_the_metrics_are_scikit_learns() -> None:
    draw = np.random.default_rng(3)
    labels, found = draw.integers(0, 4, 60), draw.integers(0, 3, 60)
    task = own_task("own", (), ("a", "b", "c", "d", "never"))
    scores = compute_metrics(with_names(task, "f1_macro", "matthews_correlation"), found, labels)
    macro = f1_score(labels, found, average="macro", labels=range(5), zero_division=0)
    assert scores["f1_macro"] == pytest.approx(macro, abs=1e-12)
    assert scores["matthews_correlation"] == pytest.approx(matthews_corrcoef(labels, found), abs=1e-12)
    assert set(scores) == {"accuracy", "f1_macro", "matthews_correlation"}


def with_names(task, *names: str):
    from dataclasses import replace

    return replace(task, metrics=(*task.metrics, *names), headline=names[0])


def test_a_thousand_classes_have_no_standard_error_of_a_matrix() -> None:
    many = with_names(own_task("own", (), tuple(f"c{n}" for n in range(1000))), "f1_macro")
    assert standard_error(many, np.arange(1000), np.arange(1000), 1.0) is None


def test_a_run_shows_it_first_and_chooses_by_it(tmp_path: Path) -> None:
    args = arguments(tmp_path, do_eval=True, metric_name="f1", load_best_model_at_end=True, eval_strategy="epoch",
                     save_strategy="epoch", expect="f1>=0")  # fmt: skip
    assert run(args) == 0
    results = results_of(args)
    assert results["headline_metric"] == "f1" and "eval_f1_standard_error" in results
    assert results["eval_f1"] == pytest.approx(results["eval_classes"]["yes"]["f1"] or 0.0, abs=1e-6)
    assert "eval_combined_score" not in results


@pytest.mark.parametrize(
    ("task", "name", "says"),
    [
        (TWO, "f1_macro", ""),
        (TWO, "eval_accuracy", ""),
        (TWO, "loss", "the headline metric is still accuracy"),
        (SCORES, "mse", "--metric_name mse chooses the best checkpoint"),
        (SCORES, "pearsonr", ""),
        (get_task("mrpc"), "accuracy", "the headline metric is still f1"),
    ],
)
def test_a_metric_that_is_not_the_headline_is_told(tmp_path: Path, task, name: str, says: str) -> None:
    args = arguments(tmp_path, metric_name=name)
    notes = headline_notes(args, with_metric(args, task))
    assert len(notes) == bool(says) and says in "".join(notes)
