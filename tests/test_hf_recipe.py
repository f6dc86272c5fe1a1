"""The recipe we are measured against runs, counts what it computes, and is really stock."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
WORDS = ["the", "a", "red", "blue", "dog", "cat", "bird", "runs", "sleeps", "sings", "fast", "now", "here"]
ROWS = 24


@pytest.fixture(scope="module")
def recipe():
    return importlib.import_module("benchmarks.hf_recipe")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A vocabulary and `ROWS` rows of MRPC's files, of 2 to 13 words."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    (tmp_path / "MRPC").mkdir()
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    rows = [f"{i % 2}\t{i}\t{i}\t{WORDS[i % 13]}\t{' '.join(WORDS[: 1 + i % 12])}" for i in range(ROWS)]
    for split in ("train", "dev"):
        (tmp_path / "MRPC" / f"{split}.tsv").write_text("\n".join([header, *rows]) + "\n")
    return tmp_path


def run(recipe, monkeypatch, folder: Path, *flags: str) -> dict:
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    monkeypatch.setitem(recipe.MODEL_SHAPES, "bert-base", shape)
    argv = [
        "hf_recipe.py", "--model_shape", "bert-base", "--vocab", str(folder / "vocab.txt"),
        "--lower_case", "--task", "mrpc", "--data_path", str(folder), "--max_seq_length", "16",
        "--batch_size", "4", "--use_cpu", "--json", str(folder / "out.json"), *flags,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    assert recipe.main() == 0
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("padding", ["max_length", "grouped"])
def test_counts_and_scores(recipe, monkeypatch, folder, padding):
    report = run(recipe, monkeypatch, folder, "--padding", padding, "--epochs", "1", "--eval")
    words = sum(min(16, 3 + 1 + 1 + i % 12) for i in range(ROWS))  # [CLS] a [SEP] b [SEP]
    steps = report["steps"]
    assert [step["samples"] for step in steps] == [4] * (ROWS // 4)
    assert sum(step["real_tokens"] for step in steps) == words
    computed = sum(step["computed_tokens"] for step in steps)
    assert computed == ROWS * 16 if padding == "max_length" else words <= computed < ROWS * 16
    assert steps[0]["seconds"] is None and all(step["seconds"] > 0 for step in steps[1:])
    assert report["window_samples"] == ROWS - 3 * 4
    assert report["samples_per_second"] == report["window_samples"] / report["window_seconds"]
    result = report["evaluation"]["validation"]
    assert set(result["metrics"]) == {"loss", "accuracy", "f1", "combined_score"}
    assert result["real_tokens"] == words and result["samples"] == ROWS
    assert report["process_start_to_first_step_s"] < report["process_start_to_trained_s"]
    assert report["process_start_to_trained_s"] < report["process_start_to_end_s"]
    assert report["peak_rss_bytes"] > 50e6


def test_no_rate_where_no_step_was_left_to_time(recipe, monkeypatch, folder):
    report = run(recipe, monkeypatch, folder, "--train_steps", "2")
    assert len(report["steps"]) == 2 and report["evaluation"] == {}
    assert report["window_seconds"] is None and report["samples_per_second"] is None


def test_a_second_run_takes_the_token_cache(recipe, monkeypatch, folder):
    flags = ("--train_steps", "1", "--token_cache", str(folder))
    first = run(recipe, monkeypatch, folder, *flags)
    written = {file: file.stat().st_mtime_ns for file in folder.glob("*.arrow")}
    assert run(recipe, monkeypatch, folder, *flags)["steps"][0]["real_tokens"] == first["steps"][0]["real_tokens"]
    assert written == {file: file.stat().st_mtime_ns for file in folder.glob("*.arrow")} != {}


def test_settings_are_trainers_defaults(recipe, tmp_path):
    from transformers import TrainingArguments

    argv = ["--model", "m", "--task", "mrpc", "--json", "o", "--padding", "grouped", "--use_cpu"]
    ours = recipe.training_arguments(recipe.parse(argv), str(tmp_path)).to_dict()
    stock = TrainingArguments(output_dir=str(tmp_path), use_cpu=True).to_dict()
    changed = {name for name in stock if ours[name] != stock[name]}
    assert changed <= {
        "per_device_train_batch_size", "per_device_eval_batch_size", "train_sampling_strategy",
        "save_strategy", "report_to", "disable_tqdm", "logging_steps", "logging_dir",
    }  # fmt: skip


def test_the_vocabulary_is_really_read(recipe, folder):
    from bert_glue.tasks import TASKS

    argv = [
        "--model_shape",
        "bert-base",
        "--vocab",
        str(folder / "vocab.txt"),
        "--task",
        "mnli",
        "--json",
        "o",
    ]
    recipe.MODEL_SHAPES["bert-base"] = {"num_hidden_layers": 1, "hidden_size": 12}
    try:
        tokenizer, model = recipe.load_model(recipe.parse(argv), TASKS["mnli"])
    finally:
        recipe.MODEL_SHAPES["bert-base"] = {}
    assert tokenizer("the dog")["input_ids"] == [2, 5, 9, 3]
    assert model.config.vocab_size == 5 + len(WORDS) and model.config.num_labels == 3


@pytest.mark.parametrize("flags", [["--model_shape", "bert-base"], ["--model", "m", "--vocab", "v"], []])
def test_a_model_without_its_vocabulary_is_refused(recipe, flags):
    with pytest.raises(SystemExit) as stopped:
        recipe.parse(["--task", "mrpc", "--json", "o", *flags])
    assert stopped.value.code == 2
