"""A sweep over a stub run_glue.py that trains in milliseconds and fails, hangs or dies on demand.

The stub keeps to the contract the sweep builds on: results in all_results.json, a checkpoint and exit
code 128 + signal when asked to stop, and it goes on from that checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

# BERT_GLUE_STUB holds {"<task>-<seed>": {...}}: steps, exit (a list, one an attempt; -9 kills), hang, results, stop.
STUB_RUN_GLUE = """
import fcntl, json, os, signal, sys, time
from pathlib import Path
flags = dict(word[2:].partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
folder = Path(flags["output_dir"])
lock = (folder / ".lock").open("a+")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit("error: another run is writing there")
task, seed = flags.get("task_name", "own"), int(flags["seed"])
plan = json.loads(os.environ.get("BERT_GLUE_STUB", "{}")).get(f"{task}-{seed}", {})
attempts = folder / "attempts"
with attempts.open("a") as file:
    about = {"argv": sys.argv[1:], "threads": os.environ.get("OMP_NUM_THREADS"), "pid": os.getpid()}
    about["world"] = os.environ.get("WORLD_SIZE")
    about["raylet"] = os.environ.get("RAY_RAYLET_PID")
    file.write(json.dumps(about) + "\\n")
tries = len(attempts.read_text().splitlines())
asked = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: None if plan.get("hang") else asked.append(number))
checkpoint, done = folder / "checkpoint-stub", 0
if flags.get("resume_from_checkpoint") == "auto" and checkpoint.exists():
    done = int(checkpoint.read_text())
for step in range(done, plan.get("steps", 2)):
    (folder / "step").write_text(str(step))
    time.sleep(0.05)
    if asked:
        checkpoint.write_text(str(step + 1))
        (folder / "all_results.json").write_text(json.dumps({"seed": seed, "stopped_by_signal": True}))
        sys.exit(128 + asked[0])
code = plan.get("exit", [])[tries - 1:tries] or [0]
if code[0] < 0:
    os.kill(os.getpid(), -code[0])
if code[0]:
    error = f"the stub failed as told, attempt {tries}"
    Path(os.environ["BERT_GLUE_ERROR_FILE"]).write_text(json.dumps({"exit_code": code[0], "error": error}))
    print(f"error: {error}\\nwhat a library prints when python ends")
    sys.exit(code[0])
score = plan.get("score", 0.5 + 0.01 * seed)
results = {"seed": seed, "task_name": task, "resumed_at": done, "train_samples_per_second": 100.0, "e2e_runtime": 1.0}
results["headline_metric"] = "accuracy"
for metric in ("accuracy", "f1", "matthews_correlation", "pearson", "spearmanr"):
    for suffix in ("", "_mm"):
        results[f"eval_{metric}{suffix}"] = score
        results[f"eval_majority_baseline{suffix}"] = 0.4
        results[f"eval_{metric}_standard_error{suffix}"] = 0.02
(folder / "all_results.json").write_text(json.dumps({**results, **plan.get("results", {})}))
"""


def stub_repository(tmp_path: Path) -> Path:
    """A copy of the package beside the stub."""
    root = tmp_path / "a clone"
    shutil.copytree(REPOSITORY / "bert_glue", root / "bert_glue", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "configs", root / "configs")
    (root / "run_glue.py").write_text(STUB_RUN_GLUE, encoding="utf-8")
    return root


class Sweep:
    """Calls of one sweep over the stub."""

    def __init__(self, root: Path, **stub: dict):
        self.root, self.output, self.stub = root, root.parent / "out", stub

    def command(self, *flags: str) -> list[str]:
        own = ["--output_dir", str(self.output), "--devices", "cpu", "--model", "stub"]
        return [sys.executable, "-m", "bert_glue.sweep", *own, *flags]

    def environment(self, **settings: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "BERT_GLUE_STUB")}
        path = os.pathsep.join(filter(None, (str(self.root), os.environ.get("PYTHONPATH"))))
        return {**kept, "PYTHONPATH": path, "BERT_GLUE_STUB": json.dumps(self.stub), **settings}

    def run(self, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*flags), env=self.environment(**settings), cwd=self.root, capture_output=True, text=True,
            timeout=180,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def start(self, *flags: str, **settings: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*flags), env=self.environment(**settings), cwd=self.root,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def folder(self, task: str, seed: int) -> Path:
        return self.output / task / f"seed{seed}"

    def attempts(self, task: str, seed: int) -> list[dict]:
        return [json.loads(line) for line in (self.folder(task, seed) / "attempts").read_text().splitlines()]

    def results(self, task: str, seed: int) -> dict:
        return json.loads((self.folder(task, seed) / "all_results.json").read_text())

    def summary(self) -> dict:
        return json.loads((self.output / "summary.json").read_text())

    def group(self, task: str) -> dict:
        return next(group for group in self.summary()["groups"] if group["task"] == task)


def real_command(output: Path, *flags: str) -> list[str]:
    """A sweep over the sample on CPUs, with the run_glue.py of this repository."""
    own = ["--sample", "--output_dir", str(output), *flags]
    return [sys.executable, "-m", "bert_glue.sweep", *own]


def outcome(output: Path) -> dict[str, tuple]:
    """What each run of a sweep computed, without times: its weights, its scores and its predictions."""
    found = {}
    for file in sorted(output.glob("*/seed*/all_results.json")):
        scores = {k: v for k, v in json.loads(file.read_text()).items() if k.startswith("eval_")}
        scores = {k: v for k, v in scores.items() if not k.endswith(("_runtime", "_per_second"))}
        weights = hashlib.sha256((file.parent / "model.safetensors").read_bytes()).hexdigest()
        found[str(file.parent.relative_to(output))] = (weights, scores)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


def wait_until(condition, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)
