"""Nothing after training costs the model: each failure is one line, its exit code, and its own output missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_run import arguments, results_of

from bert_glue.errors import CheckpointError, DivergedError, FollowUpError, exit_code_of
from bert_glue.evaluation import analysis as analysis_module
from bert_glue.pipeline import outputs, run, score

# What fails -> (where, name, the exception), the exit code, a word of the line, files that are missing.
FAILURES = {
    "logits": (score, "evaluate", DivergedError("logits are not finite"), 5, "evaluation", {"analysis.json"}),
    "metric": (score, "evaluate", MemoryError("no memory"), 4, "evaluation", {"analysis.json"}),
    "analysis": (score, "analyse_splits", MemoryError(), 4, "analysis", {"analysis.json"}),
    "hardest rows": (analysis_module, "_hardest", IndexError("row 7"), 1, "analysis", {"analysis.json"}),
    "prediction": (score, "predict_splits", RuntimeError("device"), 1, "prediction", {"predict_results_own.txt"}),
    "disk": (outputs, "write_predictions", CheckpointError("disk full"), 6, "prediction", {"predict_results_own.txt"}),
    "drawing": (outputs, "curves", RuntimeError("no font"), 1, "curves", {"curves.png"}),
    "card": (outputs, "model_card", KeyError("train_loss"), 1, "card", {"README.md"}),
    "report": (outputs, "run_page", RecursionError("deep"), 1, "report", {"report.html"}),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_the_model_and_all_other_results_are_there(tmp_path, monkeypatch, capsys, kind):
    place, name, error, code, word, missing = FAILURES[kind]

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(place, name, fail)
    args = arguments(tmp_path, do_eval=True, do_predict=True, num_train_epochs=1.0)
    assert exit_code_of(lambda: run.run(args)) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and word in lines[0] and "model was saved" in lines[0]
    there = {path.name for path in Path(args.output_dir).iterdir()}
    wanted = {"model.safetensors", "all_results.json", "run.json", "train_results.json", "train_loss.tsv", "README.md"}
    wanted |= {"report.html", "curves.png", "analysis.json", "predict_results_own.txt"}
    assert there >= wanted - missing and not there & missing
    assert results_of(args)["train_loss"] > 0
    assert results_of(args, "run.json")["weights_sha256"]


def test_two_failures_are_two_lines_and_the_first_one_s_code(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("large")

    monkeypatch.setattr(score, "evaluate", fail)
    monkeypatch.setattr(outputs, "run_page", fail)
    with pytest.raises(FollowUpError) as found:
        run.run(arguments(tmp_path, do_eval=True, num_train_epochs=1.0))
    assert len(str(found.value).splitlines()) == 2 and found.value.exit_code == 4


def test_without_training_there_is_nothing_to_go_on_for(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise DivergedError("not finite")

    monkeypatch.setattr(score, "evaluate", fail)
    args = arguments(tmp_path, do_train=False, do_eval=True)
    with pytest.raises(DivergedError):
        run.run(args)
    assert not (Path(args.output_dir) / "all_results.json").exists()


@pytest.mark.parametrize("label", ["a\tb", "c\nd", "e\rf"])
def test_a_class_name_that_no_prediction_file_holds_is_refused_before_training(tmp_path, label):
    data = tmp_path / "train.jsonl"
    rows = [{"sentence": f"a dog runs {n}", "label": (label, "no")[n % 2]} for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = arguments(tmp_path, train_file=str(data), test_file=str(data), do_predict=True)
    assert exit_code_of(lambda: run.run(args)) == 3
    assert not (Path(args.output_dir) / "model.safetensors").exists()


def test_a_device_without_memory_is_one_line_with_the_flags_that_need_less(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total capacity")

    monkeypatch.setattr(run, "fine_tune", fail)
    assert exit_code_of(lambda: run.run(arguments(tmp_path))) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no memory left: CUDA out of memory. Tried to allocate 20.00 GiB; lower --per_device" in line
    assert "--global_batch_size" in line and "--gradient_checkpointing" in line
