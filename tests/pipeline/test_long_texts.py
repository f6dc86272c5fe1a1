"""`--doc_stride` from training to prediction: what is trained is what is scored, on any path, and rows stay rows."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_ranks import on_ranks
from resume_checks import assert_close, check_resume, weights
from tiny_run import FILLERS, SUBJECTS, VERBS, arguments, changed, fit, losses, results_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bert_glue.config.parser import parse
from bert_glue.data.readers import read_table
from bert_glue.errors import MachineError, UsageError
from bert_glue.evaluation.calibration import choose_decision
from bert_glue.model.description import read_description
from bert_glue.pipeline import run as pipeline
from bert_glue.predict import __main__ as predict
from bert_glue.tasks import own_task

WINDOWED = {"max_seq_length": 16, "doc_stride": 1}


def _write(path: Path, count: int, longest: int, seed: int) -> str:
    """Single texts of up to `longest` words; the label is by the subject."""
    draw = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for at in range(count):
            who = SUBJECTS[at % 2]
            words = ["a", who, draw.choice(VERBS), *draw.choices(FILLERS, k=draw.randrange(longest))]
            writer.writerow([" ".join(words), who])
    return str(path)


def _own(folder: Path, longest: int, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        f"{part}_file": _write(folder / f"{part}.csv", count, longest, count)
        for part, count in (("train", 30), ("validation", 14), ("test", 9))
    }
    return arguments(
        folder, text_column_names="text", do_eval=True, do_predict=True, per_device_eval_batch_size=4,
        **{**files, "max_seq_length": 16, **changes},
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    args = _own(tmp_path_factory.mktemp("long") / "run", 60, doc_stride=4, num_train_epochs=3.0)
    assert pipeline.run(args) == 0
    return args


def _mean_logits(folder: str, texts: list[str]) -> np.ndarray:
    """By transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    found = []
    for text in texts:
        batch = tokenizer(
            text, truncation=True, max_length=16, stride=4, return_overflowing_tokens=True, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        batch.pop("overflow_to_sample_mapping")
        with torch.no_grad():
            found.append(model.eval()(**batch).logits.mean(0).numpy())
    return np.stack(found)


def test_scores_and_labels_are_those_of_the_mean_logits(trained, tmp_path):
    folder, results = trained.output_dir, results_of(trained)
    table = read_table(Path(trained.validation_file)).columns
    logits = _mean_logits(folder, table["text"])
    names = list(json.loads((Path(folder) / "config.json").read_text())["label2id"])
    labels = np.array([names.index(label) for label in table["label"]])
    assert results["eval_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).mean()))
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item()
    assert results["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert predict.main([
        "--model", folder, "--input", trained.test_file, "--output", str(tmp_path / "out.csv"), "--device", "cpu",
    ]) == 0  # fmt: skip
    out = read_table(tmp_path / "out.csv").columns
    shares = np.exp(_mean_logits(folder, out["text"]))
    shares /= shares.sum(1, keepdims=True)
    told = np.stack([np.array(out[f"probability_{name}"], float) for name in names], 1)
    assert np.abs(told - shares).max() < 1e-5
    lines = (Path(folder) / "predict_results_own.txt").read_text().split("\n")[1:-1]
    assert [line.split("\t")[1] for line in lines] == out["prediction"]


def test_weights_of_classes_count_rows_and_not_windows(tmp_path):
    """The loss of the first step is torch's weighted mean of the mean logits of all rows."""
    weights = {"dog": 3.0, "cat": 0.5}
    (tmp_path / "weights.json").write_text(json.dumps(weights))
    args = _own(
        tmp_path, 60, doc_stride=4, class_weights=str(tmp_path / "weights.json"), learning_rate=0.0, num_train_epochs=1,
        per_device_train_batch_size=30, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    assert pipeline.run(args) == 0
    table = read_table(Path(args.train_file)).columns
    names = list(json.loads((Path(args.output_dir) / "config.json").read_text())["label2id"])
    logits = torch.tensor(_mean_logits(args.output_dir, table["text"]))
    labels = torch.tensor([names.index(label) for label in table["label"]])
    wanted = torch.nn.functional.cross_entropy(logits, labels, torch.tensor([weights[name] for name in names]))
    assert results_of(args)["train_windows"] > 60
    assert results_of(args)["train_loss"] == pytest.approx(wanted.item(), rel=1e-4)


def test_a_calibration_is_chosen_on_mean_logits_and_applied_to_them(tmp_path):
    args = _own(tmp_path, 60, doc_stride=4, calibrate=True, num_train_epochs=2.0)
    validation = _write(tmp_path / "more.csv", 40, 60, 7)
    assert pipeline.run(changed(args, validation_file=validation)) == 0
    table = read_table(Path(validation)).columns
    names = list(json.loads((Path(args.output_dir) / "config.json").read_text())["label2id"])
    logits = _mean_logits(args.output_dir, table["text"])
    task = own_task("own", ("text",), tuple(names))
    expected = choose_decision(task, logits, np.array([names.index(label) for label in table["label"]]))
    chosen = read_description(Path(args.output_dir))["calibration"]
    assert chosen["temperature"] == pytest.approx(expected.temperature, rel=1e-3)
    assert chosen["threshold"] == pytest.approx(expected.threshold, abs=1e-4)
    words = ["--model", args.output_dir, "--input", args.test_file, "--output", str(tmp_path / "out.csv")]
    assert predict.main([*words, "--device", "cpu"]) == 0
    out = read_table(tmp_path / "out.csv").columns
    odds = np.exp(_mean_logits(args.output_dir, out["text"]) / chosen["temperature"])
    shares = (odds / odds.sum(1, keepdims=True))[:, 1]
    assert np.abs(np.array(out[f"probability_{names[1]}"], float) - shares).max() < 1e-5
    assert out["prediction"] == [names[int(share > chosen["threshold"])] for share in shares]


def test_samples_are_rows_and_windows_are_told_apart(trained):
    results = results_of(trained)
    assert (results["train_samples"], results["eval_samples"], results["predict_samples_own"]) == (30, 14, 9)
    assert results["train_samples_consumed"] == 90 and results["train_windowed_rows"] > 10
    assert results["train_windows"] > 60 and results["eval_windows"] > results["eval_samples"]
    assert results["train_windows_per_second"] > results["train_samples_per_second"]
    assert results["predict_windowed_rows_own"] > 0 and (results["doc_stride"], results["max_windows"]) == (4, 64)
    card = (Path(trained.output_dir) / "README.md").read_text()
    assert "at most 64 windows, which overlap by 4 tokens" in card
    assert f"{results['train_windowed_rows']} rows of training" in card and "were cut" not in card
    assert "windows, which overlap by 4 tokens" in (Path(trained.output_dir) / "report.html").read_text()


def test_a_later_evaluation_reads_the_stride_beside_the_weights(trained, tmp_path, capsys):
    stored = read_description(Path(trained.output_dir))
    assert (stored["doc_stride"], stored["max_windows"], stored["max_seq_length"]) == (4, 64, 16)
    words = [
        "--model_name_or_path", trained.output_dir, "--validation_file", trained.validation_file, "--do_eval",
        "--use_cpu", "--report_to", "none",
    ]  # fmt: skip
    scores = []
    for number, more in enumerate(([], ["--doc_stride", "-1"], ["--doc_stride", "9", "--padding", "longest"])):
        args = parse([*words, *more, "--output_dir", str(tmp_path / f"again{number}")])
        assert pipeline.run(args) == 0
        scores.append(results_of(args))
    told = capsys.readouterr().out
    assert scores[0]["eval_loss"] == pytest.approx(results_of(trained)["eval_loss"], rel=1e-5)
    assert scores[0]["eval_windows"] == results_of(trained)["eval_windows"] < scores[2]["eval_windows"]
    assert "--doc_stride 4, as the model was trained" in told
    assert scores[1]["eval_cut_rows"] == scores[0]["eval_windowed_rows"] and "doc_stride" not in scores[1]
    assert (
        f"{scores[1]['eval_cut_rows']} of 14 rows are truncated to 16 tokens (--max_seq_length); --doc_stride N" in told
    )


@pytest.mark.parametrize("changes", [{"task": "labels"}, {"do_regression": True}], ids=["classes", "scores"])
def test_texts_that_fit_give_the_same_bits_as_without_the_flag(tmp_path, changes):
    hashes, scores = [], []
    for stride in (None, 5):
        args = _own(tmp_path / "data", 9, doc_stride=stride, output_dir=str(tmp_path / f"out{stride}"))
        if "do_regression" in changes:
            for file in (args.train_file, args.validation_file):
                text = Path(file).read_text().replace(",dog", ",1.5").replace(",cat", ",0.5")
                Path(file).write_text(text)
        assert pipeline.run(args) == 0
        record = json.loads((Path(args.output_dir) / "run.json").read_text())
        hashes.append(record["weights_sha256"])
        scores.append(results_of(args)["eval_loss"])
    assert hashes[0] == hashes[1] and scores[0] == scores[1]


def test_packed_and_padded_train_the_same_rows_alike(tmp_path):
    runs = [
        fit(arguments(tmp_path, padding=padding, output_dir=str(tmp_path / padding), adam_epsilon=1e-4, **WINDOWED))
        for padding in ("packed", "max_length")
    ]
    assert runs[0].data.split.table.windowed_rows > 2
    assert np.abs(np.subtract(*map(losses, runs))).max() < 1e-4
    assert_close(*map(weights, runs), 1e-3)


def test_the_loss_is_that_of_the_mean_logits(tmp_path):
    run = fit(arguments(tmp_path, learning_rate=0.0, max_steps=1, per_device_train_batch_size=29, **WINDOWED))
    split, module = run.data.split, run.learner.model.module
    batch = run.data.collate(split, np.arange(len(split)))
    with torch.no_grad():
        logits = module.eval()(**batch.inputs)
    means = torch.stack([logits[a:b].mean(0) for a, b in zip(split.table.first, split.table.first[1:], strict=False)])
    expected = torch.nn.functional.cross_entropy(means, torch.tensor(split.labels)).item()
    assert losses(run) == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 3}, {"rdrop_alpha": 1.0}, {"fgm_epsilon": 0.5}])
def test_a_resumed_run_is_bit_for_bit_the_same(tmp_path, more):
    check_resume(tmp_path, {**WINDOWED, "do_eval": True, **more})


def test_a_checkpoint_of_another_stride_is_refused(tmp_path):
    args = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=2, **WINDOWED)
    fit(args)
    other = changed(args, doc_stride=0, output_dir=str(tmp_path / "b"),
                    resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))  # fmt: skip
    with pytest.raises(Exception, match="--doc_stride"):
        fit(other)


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path):
    (alone,), pair = (on_ranks(world, "windowed_run", tmp_path / str(world)) for world in (1, 2))
    assert pair[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert pair[0]["weight"] == pytest.approx(alone["weight"], rel=1e-4)


def test_an_ensemble_gives_each_member_its_own_windows(trained, tmp_path, capsys):
    args = _own(tmp_path / "cut", 60, num_train_epochs=1.0, output_dir=str(tmp_path / "cut/out"))
    assert pipeline.run(args) == 0
    alone = []
    for models in ([trained.output_dir], [args.output_dir], [trained.output_dir, args.output_dir]):
        out = tmp_path / f"{len(alone)}.jsonl"
        words = ["--input", trained.test_file, "--output", str(out), "--device", "cpu"]
        assert predict.main(["--model", *models, *words]) == 0
        alone.append([json.loads(line)["probability_dog"] for line in out.read_text().splitlines()])
    assert np.abs(np.mean(alone[:2], axis=0) - alone[2]).max() < 2e-6
    told = capsys.readouterr().out
    assert (
        "rows are longer than 16 tokens and were read in windows" in told and "rows were truncated to 16 tokens" in told
    )


def test_a_prediction_of_other_windows_does_not_go_on(trained, tmp_path, capsys):
    words = ["--model", trained.output_dir, "--input", trained.test_file, "--output", str(tmp_path / "o.csv")]
    assert predict.main([*words, "--device", "cpu", "--doc_stride", "14"]) == 2
    assert "--doc_stride 14: a window of 16 tokens (--max_seq_length) has room for 14" in capsys.readouterr().err
    assert predict.main([*words, "--device", "cpu", "--max_windows", "1"]) == 0
    assert "rows were truncated after 1 windows (--max_windows)" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["3", -2, True, 1.5])
def test_a_stride_beside_the_weights_that_is_none_is_refused(tmp_path, value):
    (tmp_path / "bert_glue.json").write_text(json.dumps({"doc_stride": value}))
    with pytest.raises(MachineError, match="doc_stride is .*, not an integer of at least -1"):
        read_description(tmp_path)


def test_recorded_steps_and_windows_are_refused_together():
    words = ["--model_name_or_path", "m", "--task_name", "rte", "--output_dir", "o", "--do_train", "--bf16"]
    with pytest.raises(UsageError, match="--cuda_graph with --doc_stride 0"):
        parse([*words, "--cuda_graph", "--doc_stride", "0"])
    assert parse([*words, "--cuda_graph", "--doc_stride", "-1"]).doc_stride == -1
