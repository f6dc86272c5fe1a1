"""`--calibrate`: the choice compared with torch and scikit-learn, where it is stored, and which commands apply it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from tiny_run import arguments, make_data, results_of

from bert_glue.config.parser import parse
from bert_glue.errors import DataError, MachineError, UsageError
from bert_glue.evaluation.answers import decided, probabilities
from bert_glue.evaluation.calibration import (
    FOLDS,
    calibration_lines,
    choose_decision,
    cross_fitted,
    fit_temperature,
    fit_threshold,
)
from bert_glue.model.description import read_description, uncalibrated
from bert_glue.pipeline.run import run
from bert_glue.predict.__main__ import main as predict
from bert_glue.predict.labeller import ensemble_threshold
from bert_glue.tasks import Decision, get_task, own_task

TWO, THREE = own_task("own", ("text",), ("no", "yes")), own_task("own", ("text",), ("a", "b", "c"))
SETS = own_task("own", ("text",), ("a", "b", "c"), is_multi_label=True)


def rows_of(task, count: int = 400, seed: int = 0, scale: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are too sure by `scale`, with labels drawn from the true probabilities."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(count, task.num_labels)).astype(np.float32) - 0.6
    shares = probabilities(task, logits)
    if task.is_multi_label:
        return scale * logits, draw.random(shares.shape) < shares
    return scale * logits, np.array([draw.choice(task.num_labels, p=row) for row in shares])


@pytest.mark.parametrize(("task", "scale"), [(TWO, 4.0), (THREE, 0.3), (SETS, 2.0)])
def test_the_temperature_is_that_of_the_lowest_loss(task, scale: float) -> None:
    logits, labels = rows_of(task, scale=scale)
    given, wanted = torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)
    logarithm = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logarithm], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        scaled = given / logarithm.exp()
        if task.is_multi_label:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(scaled, wanted.double())
        else:
            loss = torch.nn.functional.cross_entropy(scaled, wanted)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert fit_temperature(task, logits, labels) == pytest.approx(logarithm.exp().item(), rel=1e-4)
    assert fit_temperature(task, logits, labels) == pytest.approx(scale, rel=0.3)


@pytest.mark.parametrize(
    ("task", "score"),
    [
        (get_task("mrpc"), lambda labels, found: f1_score(labels, found)),
        (TWO, lambda labels, found: f1_score(labels, found, average="macro")),
        (SETS, lambda labels, found: f1_score(labels, found, average="micro")),
    ],
)
def test_no_threshold_scores_higher(task, score) -> None:
    logits, labels = rows_of(task, count=90, seed=4)
    shares = probabilities(task, logits)

    def at(threshold: float) -> float:
        return score(labels, decided(replace(task, decision=Decision(threshold)), shares))

    found = fit_threshold(task, shares, labels)
    tries = [0.5, *np.unique(shares[:, 1] if not task.is_multi_label else shares)[:-1]]
    assert at(found) == pytest.approx(max(map(at, tries)), abs=1e-12) and found != 0.5
    assert fit_threshold(task, shares, np.zeros_like(labels)) == 0.5  # nothing to find
    assert fit_threshold(task, np.full_like(shares, 0.3), labels) == 0.5  # nothing to tell apart


def test_three_classes_have_a_temperature_alone() -> None:
    logits, labels = rows_of(THREE)
    decision = choose_decision(THREE, logits, labels)
    assert decision.threshold == 0.5 and decision.is_calibrated
    np.testing.assert_array_equal(
        decided(THREE, probabilities(replace(THREE, decision=decision), logits)), logits.argmax(1)
    )


@pytest.mark.parametrize("task", [TWO, SETS])
def test_a_row_is_scored_by_a_decision_that_other_rows_chose(task) -> None:
    logits, labels = rows_of(task, count=100, seed=7)
    shares, predictions = cross_fitted(task, logits, labels, seed=5)
    part = np.random.default_rng(5).permutation(100) % FOLDS
    inside = part == 2
    chosen = replace(task, decision=choose_decision(task, logits[~inside], labels[~inside]))
    np.testing.assert_array_equal(shares[inside], probabilities(chosen, logits[inside]))
    np.testing.assert_array_equal(predictions[inside], decided(chosen, shares[inside]))
    changed = labels.copy()
    changed[inside] = ~changed[inside] if task.is_multi_label else 1 - changed[inside]
    np.testing.assert_array_equal(cross_fitted(task, logits, changed, seed=5)[0][inside], shares[inside])


def test_it_is_kept_with_the_model_and_applied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = make_data(tmp_path / "data", train=60, validation=50, test=30)
    args = arguments(
        tmp_path, **files, do_eval=True, do_predict=True, calibrate=True, text_column_names="sentence1,sentence2"
    )
    assert run(args) == 0
    out, results = Path(args.output_dir), results_of(args)
    said = capsys.readouterr().out
    assert "calibration: temperature" in said and "so their scores no longer count as scores of unseen rows" in said
    chosen = json.loads((out / "bert_glue.json").read_text())["calibration"]
    assert chosen == results["calibration"] and chosen["rows"] == 50 and chosen["threshold_of"] == "yes"
    assert {"eval_ece", "eval_calibrated_ece", "eval_calibrated_loss", "eval_calibrated_accuracy"} <= set(results)
    card, report = (out / "README.md").read_text(), (out / "report.html").read_text()
    assert "transformers.pipeline, as above, does not" in card and "Calibration" in report

    plain = replace(args, calibrate=False, output_dir=str(tmp_path / "plain"))
    assert run(plain) == 0
    before = results_of(plain)
    figures = {name for name in before if name.startswith("eval_") and "second" not in name and "runtime" not in name}
    assert {name: before[name] for name in figures} == {name: results[name] for name in figures}
    assert not [name for name in before if "calibrat" in name or "ece" in name]
    assert "calibration" not in json.loads((tmp_path / "plain" / "bert_glue.json").read_text())

    later = replace(args, do_train=False, calibrate=False, model_name_or_path=str(out), output_dir=str(tmp_path / "l"))
    assert run(replace(later, train_file=None)) == 0
    again = results_of(later)
    assert again["eval_accuracy"] == results["eval_accuracy"] and again["eval_ece"] == results["eval_ece"]
    assert again["calibration"] == chosen

    with Path(files["test_file"]).open() as file, (tmp_path / "texts.csv").open("w") as texts:
        texts.writelines(line.rsplit(",", 1)[0] + "\n" for line in file)
    for model in (out, tmp_path / "plain"):
        target = str(model / "labelled.csv")
        assert predict(["--model", str(model), "--input", str(tmp_path / "texts.csv"), "--output", target]) == 0
    ours, raw = (list(csv.DictReader((m / "labelled.csv").open())) for m in (out, tmp_path / "plain"))
    odds = np.log([float(r["probability_yes"]) / float(r["probability_no"]) for r in raw]) / chosen["temperature"]
    expected = 1 / (1 + np.exp(-odds))
    np.testing.assert_allclose([float(r["probability_yes"]) for r in ours], expected, atol=1e-4)
    labels = ["yes" if share > chosen["threshold"] else "no" for share in expected]
    assert [row["prediction"] for row in ours] == labels
    written = (out / "predict_results_own.txt").read_text().splitlines()[1:]
    assert [line.split("\t")[1] for line in written] == labels
    assert (tmp_path / "l" / "predict_results_own.txt").read_text().splitlines()[1:] == written


def test_a_checkpoint_has_the_calibration_of_its_own_weights_alone(tmp_path: Path, capsys) -> None:
    files = make_data(tmp_path / "data", train=40, validation=30, test=10)
    args = arguments(tmp_path, **files, do_eval=True, calibrate=True, save_strategy="epoch", num_train_epochs=2.0)
    assert run(args) == 0
    out = Path(args.output_dir)
    first, last = sorted(out.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    chosen = read_description(out)["calibration"]
    assert "calibration" not in read_description(first)
    assert read_description(last)["calibration"] == chosen, "the last weights are the finished ones"
    answers = {}
    for model in (out, last, first):
        capsys.readouterr()
        target = tmp_path / f"{model.name}.csv"
        words = ["--input", files["test_file"], "--output", str(target), "--label_column_name", "label"]
        assert predict(["--model", str(model), *words, "--device", "cpu"]) == 0
        told = capsys.readouterr().out
        assert ("is calibrated: temperature" in told) == (model != first)
        assert (f"{first} has no calibration: --calibrate chose that of {out}" in told) == (model == first)
        answers[model] = target.read_text()
    assert answers[out] == answers[last] != answers[first]


def test_an_ensemble_takes_the_mean_of_the_thresholds_of_one_class() -> None:
    one = replace(TWO, decision=Decision(0.3, 2.0, is_calibrated=True))
    other = replace(own_task("own", (), ("yes", "no")), decision=Decision(0.9, 1.5, is_calibrated=True))
    threshold, said = ensemble_threshold(["x", "y"], [one, other], None)
    assert threshold == pytest.approx((0.3 + 0.1) / 2) and "x is calibrated: temperature 2, threshold 0.3" in said
    assert ensemble_threshold(["x", "y"], [TWO, TWO], None) == (None, [])


@pytest.mark.slow
def test_a_graph_carries_it_in_its_metadata(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from bert_glue.export import export

    args = arguments(tmp_path, **make_data(tmp_path / "data", validation=30), do_eval=True, calibrate=True, max_steps=2)
    assert run(args) == 0
    lines = export(args.output_dir, tmp_path / "model.onnx", 1)
    stored = {entry.key: entry.value for entry in onnx.load(str(tmp_path / "model.onnx")).metadata_props}
    assert json.loads(stored["bert_glue.calibration"]) == read_description(Path(args.output_dir))["calibration"]
    assert any("without the calibration of --calibrate" in line for line in lines)


def test_what_cannot_be_calibrated_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--calibrate: validation has 13 rows, which are too few; give 20"):
        run(arguments(tmp_path, do_eval=True, calibrate=True))
    scores = tmp_path / "scores.csv"
    scores.write_text("text,label\n" + "".join(f"a dog runs {n} times,{n / 4}\n" for n in range(30)))
    with pytest.raises(UsageError, match="--calibrate: the labels of this data are scores"):
        run(arguments(tmp_path, do_eval=True, calibrate=True, train_file=str(scores), validation_file=str(scores),
                      text_column_names="text"))  # fmt: skip
    base = ["--model_name_or_path", "m", "--output_dir", "o", "--calibrate", "--do_train"]
    for words, message in (
        (["--task_name", "sst2"], "--calibrate needs --do_train and --do_eval"),
        (["--task_name", "stsb", "--do_eval"], "scores of a regression have no probabilities"),
    ):
        with pytest.raises(UsageError, match=message):
            parse([*base, *words])


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ({"temperature": 0}, "temperature is '0'"),
        ({"temperature": 1.5, "threshold": 1.5}, "threshold is '1.5'"),
        ({"threshold": 0.5}, "temperature is 'None'"),
        ([1.5], "calibration is"),
    ],
)
def test_a_damaged_calibration_is_refused(tmp_path: Path, calibration: object, words: str) -> None:
    (tmp_path / "bert_glue.json").write_text(json.dumps({"calibration": calibration}))
    with pytest.raises(MachineError, match="bert_glue.json") as error:
        read_description(tmp_path)
    assert words in str(error.value)


def test_other_weights_are_not_calibrated() -> None:
    """Such as the mean of several runs' weights."""
    assert uncalibrated({"max_seq_length": 9, "calibration": {"temperature": 2.0}}) == {"max_seq_length": 9}


@pytest.mark.parametrize(("after", "warns"), [(0.02, False), (0.3, True)])
def test_a_calibration_that_does_not_help_is_said(after: float, warns: bool) -> None:
    chosen = {"temperature": 1.5, "chosen_on": "validation", "rows": 40}
    lines = calibration_lines({"calibration": chosen, "eval_ece": 0.1, "eval_calibrated_ece": after})
    assert ("warning: calibration does not lower" in lines[-1]) == warns
