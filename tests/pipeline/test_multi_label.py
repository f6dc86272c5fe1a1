"""Several labels a row, from training to the files a run leaves, and what other commands make of the model."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forked_ranks import on_ranks
from tiny_run import REPOSITORY, SUBJECTS, arguments, fit, label_sets, losses, make_label_sets, make_model, results_of

from bert_glue.__main__ import main
from bert_glue.config.parser import parse
from bert_glue.data.own.label_sets import part_labels
from bert_glue.errors import MachineError
from bert_glue.model.description import read_description
from bert_glue.pipeline.run import run
from bert_glue.predict import __main__ as predict

CLASSES = sorted(SUBJECTS[:3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("several")
    make_model(found / "model")
    return found


@pytest.fixture(scope="module")
def done(folder):
    """A finished run that has learned, and its arguments."""
    args = arguments(
        folder, **make_label_sets(folder / "data", train=120), do_eval=True, do_predict=True, num_train_epochs=25.0,
        explain=2, metric_for_best_model="f1_macro", eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True, save_total_limit=1, early_stopping_patience=8, logging_steps=20,
    )  # fmt: skip
    assert run(args) == 0
    return args


def scores_of_transformers(model: Path, texts: list[str]) -> np.ndarray:
    from transformers import pipeline

    answers = pipeline("text-classification", model=str(model), device="cpu")(texts, top_k=None)
    return np.array([[next(a["score"] for a in row if a["label"] == name) for name in CLASSES] for row in answers])


def label(models: list[Path], source: Path, target: Path, *more: str) -> None:
    words = ["--model", *map(str, models), "--input", str(source), "--output", str(target), "--device", "cpu"]
    assert predict.main([*words, "--overwrite", *more]) == 0


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def shares(rows: list[dict]) -> np.ndarray:
    return np.array([[float(row[f"probability_{name}"]) for name in CLASSES] for row in rows])


def test_the_files_of_a_run_say_what_it_is(done):
    from sklearn.metrics import f1_score

    out, results = Path(done.output_dir), results_of(done)
    config = json.loads((out / "config.json").read_text())
    assert config["problem_type"] == results["problem_type"] == "multi_label_classification"
    assert [config["id2label"][str(n)] for n in range(3)] == CLASSES
    assert read_description(out)["label_threshold"] == results["label_threshold"] == 0.5
    truth = label_sets(23, 1)
    labels = np.array([[name in row["label"] for name in CLASSES] for row in truth])
    given = scores_of_transformers(out, [row["text"] for row in truth]) > 0.5
    for average in ("micro", "macro", "samples"):
        wanted = f1_score(labels, given, average=average, zero_division=0.0)
        assert results[f"eval_f1_{average}"] == pytest.approx(wanted, abs=1e-9)
    assert (
        results["headline_metric"] == "f1_micro" and results["eval_f1_micro"] > 0.9 > results["eval_majority_baseline"]
    )
    assert set(results["eval_classes"]) == set(CLASSES) and results["eval_collapsed"] is None
    lines = (out / "predict_results_own.txt").read_text().splitlines()
    texts = [row["text"] for row in label_sets(9, 2)]
    wanted = [";".join(np.array(CLASSES)[row]) for row in scores_of_transformers(out, texts) > 0.5]
    assert lines == ["index\tprediction", *(f"{n}\t{text}" for n, text in enumerate(wanted))]


def test_report_and_card_have_no_confusions(done):
    out = Path(done.output_dir)
    analysis = json.loads((out / "analysis.json").read_text())["splits"]["validation"]
    assert not {"confusion", "confused"} & set(analysis) and len(analysis["explained"]) == 2
    report, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert ">Confusion matrix" not in report and "Micro F1" in report and "Rows predicted" in report
    assert "Always predicting the same labels" in report and "most frequent class" not in report
    assert "any number of: " + ", ".join(CLASSES) in card and "top_k=None" in card and "above 0.5" in card


def test_probabilities_are_those_of_transformers_in_every_format(done, tmp_path):
    out, rows = Path(done.output_dir), label_sets(20, 7)
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
    wanted = scores_of_transformers(out, [row["text"] for row in rows])
    sets = [list(np.array(CLASSES)[row]) for row in wanted > 0.5]
    label([out], source, tmp_path / "out.csv")
    label([out], source, tmp_path / "out.jsonl")
    label([out], source, tmp_path / "out.parquet")
    found = csv_rows(tmp_path / "out.csv")
    np.testing.assert_allclose(shares(found), wanted, atol=1e-5)
    assert [part_labels(row["prediction"], ";") for row in found] == sets
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in lines] == sets
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").column("prediction").to_pylist() == sets
    label([out], source, tmp_path / "low.csv", "--label_threshold", "0.001", "--label_delimiter", "+")
    low = [part_labels(row["prediction"], "+") for row in csv_rows(tmp_path / "low.csv")]
    assert low == [list(np.array(CLASSES)[row]) for row in wanted > 0.001] != sets


def test_parquet_of_which_the_first_rows_have_no_label(done, tmp_path):
    import pyarrow.parquet

    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in ["mill", "old mill"] * 40 + ["dog cat bird"]))
    label([Path(done.output_dir)], source, tmp_path / "o.parquet", "--per_device_eval_batch_size", "1")
    found = pyarrow.parquet.read_table(tmp_path / "o.parquet").column("prediction").to_pylist()
    assert found[0] == [] and len(found) == 81 and found[-1]


def test_an_ensemble_is_the_mean_of_probabilities_in_any_order_of_classes(done, tmp_path):
    out = Path(done.output_dir)
    other = shutil.copytree(out, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    names = [CLASSES[2], CLASSES[0], CLASSES[1]]  # another model: its outputs mean other classes
    config["id2label"] = {str(n): name for n, name in enumerate(names)}
    config["label2id"] = {name: n for n, name in enumerate(names)}
    (other / "config.json").write_text(json.dumps(config))
    source, rows = tmp_path / "in.csv", label_sets(12, 8)
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([row["text"]] for row in rows)])
    texts = [row["text"] for row in rows]
    wanted = (scores_of_transformers(out, texts) + scores_of_transformers(other, texts)) / 2
    label([out, other], source, tmp_path / "out.csv")
    np.testing.assert_allclose(shares(csv_rows(tmp_path / "out.csv")), wanted, atol=1e-5)
    description = json.loads((other / "bert_glue.json").read_text()) | {"label_threshold": 0.1}
    (other / "bert_glue.json").write_text(json.dumps(description))
    label([out, other], source, tmp_path / "mean.csv")
    sets = [part_labels(row["prediction"], ";") for row in csv_rows(tmp_path / "mean.csv")]
    assert sets == [list(np.array(CLASSES)[row]) for row in wanted > 0.3]


@pytest.mark.parametrize("how", ["stored", "flag"])
def test_the_threshold_lies_with_the_weights_and_a_flag_overrules_it(done, tmp_path, how):
    model = shutil.copytree(done.output_dir, tmp_path / "model")
    if how == "stored":
        description = json.loads((model / "bert_glue.json").read_text()) | {"label_threshold": 0.97}
        (model / "bert_glue.json").write_text(json.dumps(description))
    args = replace(
        done, do_train=False, do_predict=False, train_file=None, test_file=None, model_name_or_path=str(model),
        output_dir=str(tmp_path / "out"), label_threshold=None if how == "stored" else 0.97,
    )  # fmt: skip
    assert run(args) == 0
    rows = label_sets(23, 1)
    given = scores_of_transformers(model, [row["text"] for row in rows]) > 0.97
    labels = np.array([[name in row["label"] for name in CLASSES] for row in rows])
    right = (given == labels).all(1).mean()
    results = results_of(args)
    assert results["eval_subset_accuracy"] == pytest.approx(right) and results["label_threshold"] == 0.97


@pytest.mark.parametrize("value", ["0.5", 0, 1.0, None, True])
def test_a_damaged_threshold_is_refused(done, tmp_path, value):
    model = shutil.copytree(done.output_dir, tmp_path / "model")
    description = json.loads((model / "bert_glue.json").read_text()) | {"label_threshold": value}
    (model / "bert_glue.json").write_text(json.dumps(description))
    with pytest.raises(MachineError, match="label_threshold"):
        read_description(model)


def test_a_model_of_the_hub_is_scored_without_training_data(done, tmp_path):
    model = tmp_path / "hub"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (Path(done.output_dir) / name).is_file():
            shutil.copy(Path(done.output_dir) / name, model)
    config = json.loads((model / "config.json").read_text())
    del config["finetuning_task"]
    (model / "config.json").write_text(json.dumps(config))
    source = tmp_path / "dev.csv"
    rows = label_sets(15, 4)
    with source.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", *reversed(CLASSES)])
        writer.writerows([row["text"], *(int(name in row["label"]) for name in reversed(CLASSES))] for row in rows)
    args = arguments(
        tmp_path, model_name_or_path=str(model), train_file=None, validation_file=str(source), do_train=False,
        do_eval=True,
    )  # fmt: skip
    assert run(args) == 0
    given = scores_of_transformers(model, [row["text"] for row in rows]) > 0.5
    labels = np.array([[name in row["label"] for name in CLASSES] for row in rows])
    assert results_of(args)["eval_subset_accuracy"] == pytest.approx((given == labels).all(1).mean())


@pytest.mark.parametrize(
    "changes",
    [
        {"padding": "longest"}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
        {"rdrop_alpha": 0.5}, {"rdrop_alpha": 0.5, "padding": "longest"}, {"fgm_epsilon": 0.2},
        {"label_smoothing_factor": 0.2}, {"ema_decay": 0.9}, {"lora_rank": 2},
        {"bf16": True, "fp16_opt_level": "O2"}, {"bf16": True, "fp16_opt_level": "O1"},
    ],
    ids=str,
)  # fmt: skip
def test_every_way_of_training_runs_and_equal_ones_agree(folder, tmp_path, changes):
    args = arguments(folder, **make_label_sets(folder / "few", train=32), output_dir=str(tmp_path), max_steps=6)
    found = losses(fit(replace(args, **changes)))
    assert len(found) == 6 and np.isfinite(found).all() and found[0] == pytest.approx(0.7, abs=0.15)
    if set(changes) <= {"padding", "gradient_accumulation_steps", "per_device_train_batch_size"}:
        assert found == pytest.approx(losses(fit(args)), rel=1e-4)
    if set(changes) == {"rdrop_alpha", "padding"}:
        assert found == pytest.approx(losses(fit(replace(args, rdrop_alpha=0.5))), rel=1e-4)


@pytest.mark.slow
def test_ranks_give_what_one_process_gives(tmp_path):
    arguments(tmp_path / "parts")
    alone = on_ranks(1, "several", tmp_path / "one")[0]
    for rank in on_ranks(2, "several", tmp_path / "two"):
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert rank["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert rank["scores"] == alone["scores"] and len(rank["scores"]) == 2


@pytest.mark.slow
def test_a_whole_run_of_two_ranks_gives_what_one_process_gives(tmp_path):
    """Windows, weights of classes and the calibration among it."""
    arguments(tmp_path / "parts")
    alone = on_ranks(1, "several_to_the_end", tmp_path / "one")[0]
    both = on_ranks(2, "several_to_the_end", tmp_path / "two")
    for name in ("eval_loss", "eval_f1_micro", "eval_f1_macro", "eval_calibrated_f1_micro", "eval_calibrated_ece"):
        assert both[0][name] == pytest.approx(alone[name], rel=1e-3), name
    assert both[0]["calibration"]["temperature"] == pytest.approx(alone["calibration"]["temperature"], rel=1e-3)
    assert (both[0]["world_size"], both[0]["eval_windows"]) == (2, alone["eval_windows"])
    assert alone["eval_windows"] > alone["eval_samples"] == 40
    assert both[0]["class_weights"] == alone["class_weights"] and both[0]["predicted"] == alone["predicted"]


def test_a_run_resumes_bit_for_bit(folder, tmp_path):
    args = arguments(
        folder, **make_label_sets(folder / "few", train=32), output_dir=str(tmp_path / "a"), max_steps=8, save_steps=4,
        save_strategy="steps",
    )  # fmt: skip
    whole = fit(args)
    rest = fit(replace(args, output_dir=str(tmp_path / "b"), resume_from_checkpoint=str(tmp_path / "a/checkpoint-4")))
    for one, other in zip(whole.learner.precision.masters, rest.learner.precision.masters, strict=True):
        assert (one == other).all()


def test_what_does_not_go_together_is_refused(done, tmp_path, capsys):
    out = Path(done.output_dir)
    single = shutil.copytree(out, tmp_path / "single")
    config = json.loads((single / "config.json").read_text()) | {"problem_type": "single_label_classification"}
    (single / "config.json").write_text(json.dumps(config))
    source = tmp_path / "in.csv"
    source.write_text("text\na dog runs\n")
    words = ["--input", str(source), "--output", str(tmp_path / "o.csv"), "--device", "cpu"]
    assert predict.main(["--model", str(out), str(single), *words]) == 2
    assert "problem_type single_label_classification" in capsys.readouterr().err
    assert predict.main(["--model", str(single), *words, "--label_threshold", "0.4"]) == 2
    assert predict.main(["--model", str(single), *words, "--label_delimiter", "|"]) == 2
    # One weight differs, so that the two are not the same model.
    from safetensors.torch import load_file, save_file

    tensors = load_file(single / "model.safetensors")
    tensors["classifier.bias"] += 1
    save_file(tensors, single / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert main(["soup", str(out), str(single), "--output_dir", str(tmp_path / "soup")]) == 2
    assert "problem_type" in capsys.readouterr().err
    with pytest.raises(MachineError, match="multi_label_classification, but sst2 is single_label_classification"):
        run(
            arguments(
                tmp_path, model_name_or_path=str(out), task_name="sst2", sample=True, do_train=False, do_eval=True
            )
        )


@pytest.mark.slow
def test_an_exported_graph_gives_the_same_logits(done, tmp_path):
    pytest.importorskip("onnxruntime")
    from bert_glue.export import export

    lines = export(done.output_dir, tmp_path / "m.onnx", 1)
    assert "logits equal torch's" in lines[0] and any("sigmoid" in line for line in lines)


def test_the_pages_commands_run(folder, tmp_path, monkeypatch):
    """Those of docs/own-data.md as they stand, but for the model, which is a tiny one."""
    page = (REPOSITORY / "docs" / "own-data.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "--label_delimiter" in b)
    first, second, third = (shlex.split(line) for line in block.replace("\\\n", " ").strip().splitlines())
    monkeypatch.chdir(tmp_path)
    for name, seed in (("topics.csv", 1), ("later.csv", 2), ("unlabelled.csv", 3)):
        rows = [[row["text"], ";".join(row["label"])] for row in label_sets(30, seed)]
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([["text", "topics"], *rows])
    quick = ["--report_to", "none", "--disable_tqdm", "--use_cpu"]
    first[first.index("google-bert/bert-base-cased")] = str(folder / "model")
    assert run(parse([*first[2:], *quick, "--max_steps", "2"])) == 0 and run(parse([*second[2:], *quick])) == 0
    results = json.loads((tmp_path / "output" / "later-topics" / "all_results.json").read_text())
    assert results["eval_samples"] == 30 and results["label_threshold"] == 0.3
    assert predict.main(third[3:]) == 0
    assert all(
        set(part_labels(row["prediction"], ";")) <= set(CLASSES) for row in csv_rows(tmp_path / "topics-found.csv")
    )
