"""Stubs for the launchers: a copy of the repository, a run_glue.py and a python that follow a script."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

# Records how it was called, then does what STUB_* says.
STUB_RUN_GLUE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
argv = sys.argv[1:]
output = Path(argv[argv.index("--output_dir") + 1])
rank = os.environ.get("RANK")
def note(name, text):
    (output / (name if rank is None else f"{name}.{rank}")).write_text(text)
for number in (signal.SIGINT, signal.SIGTERM):
    def stop(number, frame):
        note("got_signal", str(number)); print("saved a checkpoint")
        sys.exit(int(os.environ.get("STUB_STOP", 0)))
    signal.signal(number, stop)
note("called.json", json.dumps({"argv": argv, "cwd": os.getcwd(), "env": dict(os.environ)}))
sys.stdout.write("to stdout\\n"); sys.stderr.write("to stderr\\n")
if "STUB_ORPHAN" in os.environ:
    note("orphan", str(subprocess.Popen(["sleep", "60"]).pid))
if "STUB_SLEEP" in os.environ:
    note("sleeping", ""); time.sleep(float(os.environ["STUB_SLEEP"]))
if "STUB_MEET" in os.environ:  # ask the other ranks, over the store that they were told of, where they write
    from datetime import timedelta
    from torch.distributed import TCPStore
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=60))
    store.set(f"place {rank}", str(output))
    note("met", store.get(f"place {1 - int(rank)}").decode())
actions = json.loads(os.environ.get("STUB_RANKS", "{}"))
if actions:
    action, _, number = actions.get(rank, "wait").partition(" ")
    time.sleep(0.5)
    if action == "crash":
        raise RuntimeError("a bug on purpose")
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "hang":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    if action == "exit":
        sys.exit(int(number))
    if action == "done":
        sys.exit(0)
    time.sleep(60)
if "STUB_EXIT" in os.environ:
    sys.exit(int(os.environ["STUB_EXIT"]))
results = {"task_name": argv[argv.index("--task_name") + 1], "model_name_or_path": "x/bert-stub",
    "device": "cpu",
    "train_samples_per_second": 200.0, "train_loss": 0.25, "train_runtime": 10.0, "e2e_runtime": 61.04,
    "eval_f1": 0.9029, "headline_metric": "f1", "world_size": int(os.environ.get("WORLD_SIZE", 1)),
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1, "global_batch_size": 32 * int(os.environ.get("WORLD_SIZE", 1)),
    "train_timed_steps": 10, "train_timed_seconds": 1.6, "train_step_ms_median": 159.0, "train_step_ms_p10": 150.0,
    "train_step_ms_p90": 171.0, "max_seq_length": 128, "precision": "O2 fp16", "batches": "packed",
    "device_name": "stub", "peak_memory_bytes": 5,
    "seconds": {"import": 1.0, "compile": None, "data": 1.0, "tokenize": 2.0, "model": 1.0, "train": 9.0,
    "evaluate": 1.0, "save": 0.5}, "sample_data": "--sample" in argv}
results.update(json.loads(os.environ.get("STUB_RESULTS", "{}")))
if rank in (None, "0"):
    (output / "all_results.json").write_text(json.dumps(results))
"""

# A python without the requirements. Everything but these two calls is the real one's business.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
  *"launch.requirements --command"*) echo "pip install X"; exit ;;
  *launch.requirements*) echo "torch, datasets"; exit "${FAKE_LACKS:-1}" ;;
  *"sys.exit(sys.prefix == sys.base_prefix)"*) [[ -n ${FAKE_VIRTUAL:-} ]]; exit ;;
  *"-m venv --clear"*)
    echo "$*" >>"${PIP_CALLS%pip_calls}venv_calls"
    rm -rf "${@: -1}"
    mkdir -p "${@: -1}/bin" && cp "$(dirname "$0")/venv_python" "${@: -1}/bin/python" && exit ;;
esac
exec REAL "$@"
"""
FAKE_VENV_PYTHON = """#!/bin/bash
venv=$(dirname "$0")/..
case "$*" in
  *"launch.requirements --specs"*) printf '%s\n' 'datasets>=3.0' torch==2.7.1; exit ;;
  *launch.requirements*) [[ -e $venv/installed ]] && exit; echo torch; exit 1 ;;
  "-m pip --version" | "-m ensurepip") exit ;;
  *"-m pip install"*)
    echo "$*" >>"$PIP_CALLS"
    sleep "${FAKE_PIP_SLEEP:-0}"
    [[ -z ${FAKE_PIP_FAILS:-} ]] || { echo "No matching distribution for torch"; exit 1; }
    touch "$venv/installed"; exit ;;
esac
exec REAL "$@"
"""


def write_script(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text.replace("REAL", sys.executable), encoding="utf-8")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def copy_repository(tmp_path: Path) -> Path:
    """A copy of what launchers need, in a folder with a blank in its name; run_glue.py is the stub."""
    root = tmp_path / "a clone"
    shutil.copytree(REPOSITORY / "test", root / "test", ignore=shutil.ignore_patterns("output"))
    shutil.copytree(REPOSITORY / "bert_glue", root / "bert_glue", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "configs", root / "configs")
    shutil.copy(REPOSITORY / "requirements.txt", root)
    shutil.copytree(REPOSITORY / "requirements", root / "requirements")
    (root / "run_glue.py").write_text(STUB_RUN_GLUE, encoding="utf-8")
    return root


def clean_environment(**settings: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, "BERT_GLUE_PYTHON": sys.executable, "PYTHONDONTWRITEBYTECODE": "1", **settings}


def launch(
    repo: Path, *flags: str, launcher: str = "train_full_1p.sh", **settings: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(repo / "test" / launcher), *flags],
        env=clean_environment(**settings),
        cwd=repo.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )


def called(repo: Path, output: str = "test/output/0") -> dict:
    return json.loads((repo / output / "called.json").read_text())


def wait_for(file: Path, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < until, f"no {file} within {seconds} s"
        time.sleep(0.02)
