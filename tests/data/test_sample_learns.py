"""The sample's promise: a tiny BERT learns each of the nine tasks from scratch, in a minute of two cores."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from bert_glue.tasks import TASKS, TRAINABLE

REPOSITORY = Path(__file__).parents[2]
LEAST = {
    "cola": 0.6, "sst2": 0.80, "mrpc": 0.85, "stsb": 0.7, "qqp": 0.85, "mnli": 0.80, "qnli": 0.80, "rte": 0.75,
    "wnli": 0.75,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("task", TRAINABLE)
def test_a_task_is_learnt(task, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "run_glue.py", "--sample", "--task_name", task, "--do_train", "--do_eval"]
    command += ["--per_device_train_batch_size", "32", "--per_device_eval_batch_size", "32", "--save_strategy", "no"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    results = json.loads((tmp_path / "all_results.json").read_text())
    for _, suffix, _ in TASKS[task].evaluation:
        assert results[f"eval_{TASKS[task].headline}{suffix}"] >= LEAST[task]
    assert "sample data, not GLUE" in done.stdout and results["sample_data"] is True
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 120  # processor seconds: a minute of two cores
