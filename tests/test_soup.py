"""From finished runs to the next: a new task's head, the mean of weights, the mean of answers; and refusals."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import arguments, fit, make_data, make_model, results_of, rows

from bert_glue.__main__ import main
from bert_glue.pipeline.run import run
from bert_glue.predict import __main__ as predict
from bert_glue.training.resume import whole_weights


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two finished runs that differ in their order of samples."""
    folder = tmp_path_factory.mktemp("runs")
    data, model = make_data(folder / "data"), str(make_model(folder / "model"))
    made = []
    for seed in (1, 2):
        out = folder / str(seed)
        args = arguments(folder, **data, model_name_or_path=model, output_dir=str(out), data_seed=seed, do_eval=True)
        assert run(args) == 0
        made.append(out)
    return made


def copy_of(folder: Path, target: Path, **changes) -> Path:
    """A copy of a run whose config.json has other values, or weights if `tensors` is given."""
    shutil.copytree(folder, target)
    tensors = changes.pop("tensors", None)
    if tensors:
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


# Intermediate task


@pytest.mark.parametrize("padding", ["auto", "longest"])
@pytest.mark.parametrize("task", ["rte", "mrpc", "stsb", "mnli"])
def test_an_earlier_task_gives_its_encoder_and_a_new_head(tmp_path: Path, task: str, padding: str) -> None:
    base = str(make_model(tmp_path / "model"))
    first = arguments(
        tmp_path, model_name_or_path=base, task_name="mnli", sample=True, max_train_samples=16, max_steps=1,
        output_dir=str(tmp_path / "mnli"), do_eval=False,
    )  # fmt: skip
    assert run(first) == 0
    second = replace(first, task_name=task, model_name_or_path=first.output_dir, learning_rate=0.0, padding=padding)
    run_of = fit(replace(second, output_dir=str(tmp_path / "second")))
    old, new = load_file(Path(first.output_dir) / "model.safetensors"), whole_weights(run_of)
    if task == "mnli":
        assert all(torch.equal(old[name], new[name]) for name in old) and not run_of.learner.model.notes
        return
    changed = {name for name in old if old[name].shape != new[name].shape or not torch.equal(old[name], new[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    (note,) = run_of.learner.model.notes
    assert (
        note.startswith("initialised at random, because not in the checkpoint: ")
        and "(the checkpoint's head is for mnli)" in note
    )


# Soup


def test_a_soup_is_the_mean_and_can_be_used(runs: list[Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "new/soup"
    assert main(["soup", *map(str, runs), "--output_dir", str(out)]) == 0
    assert "mean of 2 runs, not scored" in capsys.readouterr().out
    one, other, mean = (load_file(folder / "model.safetensors") for folder in (*runs, out))
    assert all(torch.allclose(mean[name], (one[name] + other[name]) / 2, atol=1e-7) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert [part["run"] for part in json.loads((out / "soup.json").read_text())["mean_of"]] == list(map(str, runs))
    made = arguments(
        runs[0].parent, model_name_or_path=str(out), do_train=False, do_eval=True, output_dir=str(tmp_path / "e")
    )
    assert run(made) == 0
    assert results_of(made)["eval_accuracy"] is not None


def test_the_mean_of_low_precision_weights_keeps_their_type(runs: list[Path], tmp_path: Path) -> None:
    low = []
    for number, folder in enumerate(runs):
        tensors = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
        low.append(copy_of(folder, tmp_path / str(number), tensors=tensors))
    assert main(["soup", *map(str, low), "--output_dir", str(tmp_path / "out")]) == 0
    assert {value.dtype for value in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}


def test_runs_that_do_not_match_have_no_mean(runs: list[Path], tmp_path: Path, capsys) -> None:
    def refused(*folders: Path, code: int = 2, out: str = "out") -> str:
        assert main(["soup", *map(str, folders), "--output_dir", str(tmp_path / out)]) == code
        assert not (tmp_path / out / "model.safetensors").exists()
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("error: ")
        return err

    assert "has the same weights as" in refused(runs[0], copy_of(runs[0], tmp_path / "same"))
    labels = copy_of(runs[1], tmp_path / "labels", id2label={"0": "yes", "1": "no"})
    assert "differ in id2label: {'0': 'no', '1': 'yes'} and {'0': 'yes', '1': 'no'}" in refused(runs[0], labels)
    deep = copy_of(runs[1], tmp_path / "deep", num_hidden_layers=3)
    assert "differ in num_hidden_layers: 2 and 3" in refused(runs[0], deep)
    words = copy_of(runs[1], tmp_path / "words")
    vocabulary = json.loads((words / "tokenizer.json").read_text())
    table = vocabulary["model"]["vocab"]
    table["dog"], table["cat"] = table["cat"], table["dog"]
    (words / "tokenizer.json").write_text(json.dumps(vocabulary))
    text = (words / "vocab.txt").read_text().split("\n")
    a, b = text.index("dog"), text.index("cat")
    text[a], text[b] = "cat", "dog"
    (words / "vocab.txt").write_text("\n".join(text))
    assert "differ in tokenizer" in refused(runs[0], words)
    start = copy_of(runs[1], tmp_path / "start")
    record = json.loads((start / "run.json").read_text())
    (start / "run.json").write_text(json.dumps({**record, "model_sha256": {"model.safetensors": "0"}}))
    assert "differ in pre-trained weights (run.json)" in refused(runs[0], start)
    short = dict(list(load_file(runs[1] / "model.safetensors").items())[1:])
    assert "differ in names, shapes or types" in refused(runs[0], copy_of(runs[1], tmp_path / "short", tensors=short))
    assert "no such folder" in refused(runs[0], tmp_path / "absent", code=4)
    bare = make_model(tmp_path / "bare")
    assert "not a fine-tuned classifier" in refused(bare, runs[0], code=4)
    shutil.copy(runs[0] / "config.json", (tmp_path / "taken").mkdir() or tmp_path / "taken")
    assert "already has a model" in refused(*runs, out="taken")


def beside(folder: Path, target: Path, **changes) -> Path:
    """A copy of a run with other facts in `bert_glue.json`."""
    shutil.copytree(folder, target)
    facts = json.loads((target / "bert_glue.json").read_text())
    (target / "bert_glue.json").write_text(json.dumps({**facts, **changes}))
    return target


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"label_threshold": 0.3}, "differ in label_threshold: None and 0.3; the soup has that of the first"),
        ({"max_seq_length": 64}, "differ in max_seq_length: 32 and 64; the soup has that of the first"),
        ({"doc_stride": 4, "max_windows": 8}, "differ in doc_stride: None and 4; the soup has that of the first"),
        ({"text_columns": ["a", "b"]}, "differ in text_columns: ['sentence1', 'sentence2'] and ['a', 'b']"),
    ],
)
def test_what_the_runs_of_a_soup_do_not_share_is_said(runs: list[Path], tmp_path: Path, capsys, changes, says) -> None:
    other = beside(runs[1], tmp_path / "other", **changes)
    assert main(["soup", str(runs[0]), str(other), "--output_dir", str(tmp_path / "soup")]) == 0
    assert f"note: {runs[0]} and {other} {says}" in capsys.readouterr().out
    first, soup = (json.loads((folder / "bert_glue.json").read_text()) for folder in (runs[0], tmp_path / "soup"))
    assert {name: soup.get(name) for name in changes} == {name: first.get(name) for name in changes}


def test_a_soup_has_no_calibration_and_says_so(runs: list[Path], tmp_path: Path, capsys) -> None:
    calibrated = [
        beside(run, tmp_path / run.name, calibration={"temperature": at + 1.5, "threshold": 0.4})
        for at, run in enumerate(runs)
    ]
    assert main(["soup", *map(str, calibrated), "--output_dir", str(tmp_path / "soup")]) == 0
    assert f"the soup has no calibration: that of {calibrated[0]}, {calibrated[1]} is for" in capsys.readouterr().out
    assert "calibration" not in json.loads((tmp_path / "soup/bert_glue.json").read_text())


def test_runs_that_read_their_texts_in_another_order_have_no_mean(runs: list[Path], tmp_path: Path, capsys) -> None:
    other = beside(runs[1], tmp_path / "other", text_columns=["sentence2", "sentence1"])
    assert main(["soup", str(runs[0]), str(other), "--output_dir", str(tmp_path / "soup")]) == 2
    assert "differ in text_columns" in capsys.readouterr().err and not (tmp_path / "soup").exists()


# Ensemble


def label(models: list[str], source: Path, target: Path) -> list[dict[str, str]]:
    words = [word for model in models for word in ("--model", model)]
    assert predict.main([*words, "--input", str(source), "--output", str(target), "--device", "cpu"]) == 0
    with target.open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_ensemble_answers_with_the_mean_of_probabilities(runs: list[Path], tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    with source.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["sentence1", "sentence2"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows(40, seed=9))
    one, other = (label([str(folder)], source, tmp_path / f"{folder.name}.csv") for folder in runs)
    both = label(list(map(str, runs)), source, tmp_path / "both.csv")
    found = [
        np.array([[float(row["probability_no"]), float(row["probability_yes"])] for row in t])
        for t in (one, other, both)
    ]
    np.testing.assert_allclose(found[2], (found[0] + found[1]) / 2, atol=2e-6)
    assert [row["prediction"] for row in both] == [("no", "yes")[at] for at in found[2].argmax(1)]
    assert not np.allclose(found[0], found[1])


def test_models_of_other_answers_are_no_ensemble(runs: list[Path], tmp_path: Path, capsys) -> None:
    other = copy_of(runs[1], tmp_path / "other", id2label={"0": "bad", "1": "good"})
    source = tmp_path / "in.csv"
    source.write_text("sentence1,sentence2\na dog runs,a cat sleeps\n")
    words = ["--input", str(source), "--output", str(tmp_path / "o.csv"), "--device", "cpu"]
    assert predict.main(["--model", str(runs[0]), str(other), *words]) == 2
    err = capsys.readouterr().err
    assert "other predicts bad, good and --model" in err and "predicts no, yes;" in err
