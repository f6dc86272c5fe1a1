"""`--executor slurm` with submitit: its local cluster, and a Slurm of shell scripts for arrays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from sweep_stubs import REPOSITORY, Sweep, is_alive, outcome, real_command, wait_until

pytest.importorskip("submitit")
pytestmark = pytest.mark.slow

JOBS = ("--devices", "cpu", "--executor", "slurm", "--slurm_cluster", "local")
WNLI = ("--tasks", "wnli", "--seeds")


def children_of(pid: int) -> list[int]:
    """The processes whose parent is `pid`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(file.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


def preempt(folder: Path) -> None:
    """What Slurm does to a job: SIGUSR1 for submitit's process, and for the run."""
    controller = int(json.loads((folder / "slurm_job.json").read_text())["job"])
    for task in children_of(controller):
        for child in children_of(task):
            os.kill(child, signal.SIGUSR1)
        os.kill(task, signal.SIGUSR1)


def state(folder: Path) -> str:
    try:
        return json.loads((folder / "slurm_state.json").read_text())["state"]
    except (OSError, ValueError):
        return ""


def test_six_jobs_and_one_is_preempted(sweep: Sweep) -> None:
    sweep.stub = {"mrpc-2": {"steps": 60}}
    child = sweep.start("--tasks=mrpc", "--seeds=1-6", *JOBS)
    step = sweep.folder("mrpc", 2) / "step"
    wait_until(lambda: step.exists() and int(step.read_text() or 0) >= 5, 60)
    preempt(sweep.folder("mrpc", 2))
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, out + err
    assert "preempted mrpc seed 2: it has saved" in out and out.count("done mrpc") == 6
    assert "continue mrpc seed 2 on " in out.partition("preempted")[2]
    assert sweep.results("mrpc", 2)["resumed_at"] > 5 and len(sweep.attempts("mrpc", 2)) == 2
    assert sweep.group("mrpc")["runs"] == 6 and not list(sweep.output.glob("mrpc/*/slurm_job.json"))


def test_a_killed_driver_finds_its_jobs_again(sweep: Sweep) -> None:
    sweep.stub = {f"mrpc-{seed}": {"steps": 100} for seed in (1, 2)}
    child = sweep.start("--tasks=mrpc", "--seeds=1-3", *JOBS)
    wait_until(lambda: all((sweep.folder("mrpc", seed) / "step").exists() for seed in (1, 2)), 60)
    child.kill()
    child.wait()
    done = sweep.run("--tasks=mrpc", "--seeds=1-3", *JOBS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [len(sweep.attempts("mrpc", seed)) for seed in (1, 2, 3)] == [1, 1, 1]


def test_a_signal_leaves_the_jobs(sweep: Sweep) -> None:
    sweep.stub = {"mrpc-1": {"steps": 100}}
    child = sweep.start("--tasks=mrpc", "--seeds=1", *JOBS)
    wait_until(lambda: (sweep.folder("mrpc", 1) / "step").exists(), 60)
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=30) == 130
    assert is_alive(sweep.attempts("mrpc", 1)[0]["pid"])
    out, err = child.communicate(timeout=60)  # submitit's process has these pipes, too
    assert "leaves 1 runs, which go on" in out and "Traceback" not in err
    wait_until(lambda: state(sweep.folder("mrpc", 1)) == "ended", 60)
    done = sweep.run("--tasks=mrpc", "--seeds=1", *JOBS)
    assert done.returncode == 0 and "1 runs are already done; 0 to do" in done.stdout


def test_a_killed_search_goes_on_with_its_jobs(sweep: Sweep) -> None:
    pytest.importorskip("optuna")
    sweep.stub = {"mrpc-1": {"steps": 60}}
    flags = ("--tasks=mrpc", "--seeds=1", "--search", "3", *JOBS, "--max_runs", "2")
    child = sweep.start(*flags)
    wait_until(lambda: len(list(sweep.output.glob("mrpc/*/seed1/step"))) == 2, 90)
    child.kill()
    child.wait()
    done = sweep.run(*flags)
    assert done.returncode == 0 and "best of 3 trials, mrpc" in done.stdout, done.stdout + done.stderr
    attempts = [file.read_text().splitlines() for file in sweep.output.glob("mrpc/*/seed1/attempts")]
    assert [len(lines) for lines in attempts] == [1, 1, 1]


def test_a_failed_job_is_retried_once(sweep: Sweep) -> None:
    sweep.stub = {"mrpc-1": {"exit": [5]}, "mrpc-2": {"exit": [3, 3]}}
    done = sweep.run("--tasks=mrpc", "--seeds=1,2", *JOBS)
    assert done.returncode == 3 and "exit code 3: error: the stub failed as told, attempt 2" in done.stderr
    assert len(sweep.attempts("mrpc", 1)) == 2


def test_results_are_those_of_the_local_queue(tmp_path: Path) -> None:
    """Real runs; one of the jobs is preempted in mid-run."""
    more = (*WNLI, "1-6", "--", "--num_train_epochs", "6", "--max_train_samples", "200", "--logging_steps", "1")
    settings = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "cwd": REPOSITORY, "text": True}
    here, jobs = tmp_path / "here", tmp_path / "jobs"
    subprocess.run(
        real_command(here, "--devices", "cpu", "--jobs", "2", *more), check=True, capture_output=True, **settings
    )
    child = subprocess.Popen(
        real_command(jobs, *JOBS, "--max_runs", "2", *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings
    )
    log = jobs / "wnli/seed1/run.log"
    wait_until(lambda: log.is_file() and "epoch=2." in log.read_text(), 120)
    preempt(jobs / "wnli/seed1")
    out, err = child.communicate(timeout=1200)
    assert child.returncode == 0, out + err
    assert "preempted wnli seed 1" in out and "resumed after step" in log.read_text()
    assert len(outcome(here)) == 6 and outcome(jobs) == outcome(here)


# Slurm's own commands, as far as submitit and the sweep call them

SBATCH = """#!/usr/bin/env bash
# Starts the tasks of an array as background processes; the id of the job is that of this process.
set -euo pipefail
cp "$1" "$SLURM_TEST/script"
if grep -q -- '--partition=closed' "$1"; then
  echo "sbatch: error: Batch job submission failed: Requested node configuration is not available" >&2
  exit 1
fi
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
for at in $(seq 0 "${last:-0}"); do
  array=()
  [[ -z $last ]] || array=(SLURM_ARRAY_JOB_ID=$$ SLURM_ARRAY_TASK_ID="$at")
  echo "$$_$at" >>"$SLURM_TEST/queue"
  (env "${array[@]}" SLURM_JOB_ID=$$ SLURM_CPUS_PER_TASK=3 bash "$1" >/dev/null 2>&1
   sed -i "/^$$_$at\\$/d" "$SLURM_TEST/queue") >/dev/null 2>&1 &
done
echo "Submitted batch job $$"
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do case $1 in --output | --error) shift 2 ;; *) shift ;; esac; done
exec "$@"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "queue").touch()
    scripts = {"sbatch": SBATCH, "srun": SRUN, "sacct": "#!/bin/sh\nexit 1\n"}
    scripts["squeue"] = '#!/bin/sh\nwhile read -r name; do echo "$name ${name%_*}"; done <"$SLURM_TEST/queue"\n'
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_TEST", str(tools))
    return tools


ARRAY = ("--devices", "auto", "--executor", "slurm", "--slurm_gres", "npu:1", "--slurm_time", "1:00:00")


def test_runs_are_one_array_with_the_settings_of_the_user(sweep: Sweep, slurm: Path) -> None:
    done = sweep.run("--tasks=mrpc", "--seeds=1-4", *ARRAY, "--slurm_comment", "a b", "--slurm_qos=low")
    assert done.returncode == 0, done.stdout + done.stderr
    script = (slurm / "script").read_text()
    expected = ("array=0-3%4", "gres=npu:1", "time=60", "signal=USR1@120", "requeue", "comment='a b'", "qos=low")
    assert all(f"#SBATCH --{line}\n" in script for line in expected), script
    assert "at most 1000 runs at once" in done.stdout and sweep.group("mrpc")["runs"] == 4
    assert sweep.attempts("mrpc", 1)[0]["threads"] == "3"  # the cores of the task
    assert "--device=auto" in sweep.attempts("mrpc", 1)[0]["argv"]


def test_jobs_that_still_run_are_taken_over_from_an_array(sweep: Sweep, slurm: Path) -> None:
    sweep.stub = {f"mrpc-{seed}": {"steps": 160} for seed in (1, 2)}
    child = sweep.start("--tasks=mrpc", "--seeds=1-2", *ARRAY)
    wait_until(lambda: all((sweep.folder("mrpc", seed) / "step").exists() for seed in (1, 2)), 60)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=30) == 143
    done = sweep.run("--tasks=mrpc", "--seeds=1-3", *ARRAY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [len(sweep.attempts("mrpc", seed)) for seed in (1, 2, 3)] == [1, 1, 1]


def test_jobs_that_slurm_refuses_are_one_line(sweep: Sweep, slurm: Path) -> None:
    done = sweep.run("--tasks=mrpc", "--seeds=1-2", *ARRAY, "--slurm_partition", "closed")
    assert done.returncode == 4 and not list(sweep.output.glob("mrpc/*/attempts")), done.stderr
    assert "the jobs were refused: sbatch: error: Batch job submission failed: Requested node" in done.stderr


def test_a_host_without_slurm_is_named(sweep: Sweep) -> None:
    done = sweep.run("--tasks=mrpc", "--seeds=1", *ARRAY)
    assert done.returncode == 4 and "start the sweep on a host of the cluster" in done.stderr
