"""The suite runner as a black box: resuming after every kind of end, failures, signals, figures."""

from __future__ import annotations

import csv
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launch_stubs import clean_environment
from sweep_stubs import REPOSITORY, Sweep, is_alive, wait_until

from bert_glue.errors import UsageError
from bert_glue.evaluation.analysis import standard_errors
from bert_glue.sweep.executors.local import slots_of
from bert_glue.sweep.plan import Suite, plan, seeds_of, tasks_of
from bert_glue.sweep.summary import lines, summarise, write
from bert_glue.tasks import TASKS, TRAINABLE

MRPC = ("--tasks", "mrpc", "--seeds")


# What runs, and how


def test_every_run_gets_the_published_recipe_and_its_own_folder(sweep: Sweep) -> None:
    done = sweep.run("--tasks=rte,mrpc", "--seeds", "1,2", "--", "--weight_decay", "0.01")
    assert done.returncode == 0, done.stderr
    argv = sweep.attempts("mrpc", 2)[0]["argv"]
    assert {"--task_name=mrpc", "--seed=2", "--num_train_epochs=5.0", "--learning_rate=2e-05", "--fp16=true"} <= set(
        argv
    )
    assert "--weight_decay" in argv and "--device=cpu" in argv
    assert len(sweep.summary()["runs"]) == 4
    assert done.stdout.index("start mrpc") < done.stdout.index("start rte")  # longest first
    assert "--resume_from_checkpoint=auto" not in argv


def test_flags_behind_the_dashes_replace_the_recipes(sweep: Sweep) -> None:
    config = sweep.root / "recipe.json"
    config.write_text('{"learning_rate": 1e-4, "per_device_train_batch_size": 16}')
    assert sweep.run(*MRPC, "1", "--", str(config), "--bf16", "--no_use_combine_grad").returncode == 0
    argv = sweep.attempts("mrpc", 1)[0]["argv"]
    assert argv[0] == str(config) and "--bf16" in argv
    assert not [
        word for word in argv if word.startswith(("--fp16=", "--learning_rate", "--per_device_train", "--use_"))
    ]


def test_the_stable_recipe_by_name_and_the_tiny_berts_own_settings(sweep: Sweep) -> None:
    done = sweep.run("--dry_run", *MRPC, "1", "--recipe", "stable")
    assert "--num_train_epochs=20.0" in done.stdout and "--early_stopping_patience=5" in done.stdout
    runs = plan(Suite(sweep.output, None, ("--sample",)), [TASKS["mrpc"]], [1], [])
    assert not [flag for flag in runs[0].flags if flag.startswith(("--learning_rate", "--num_train_epochs"))]
    assert runs[0].settings["learning_rate"] == 5e-4
    done = sweep.run(*MRPC, "1", "--recipe", "stabel")
    assert done.returncode == 2 and "Did you mean stable?" in done.stderr


def test_the_words_of_the_other_launchers_are_understood(sweep: Sweep) -> None:
    words = ["--TASK=mrpc", "--seeds=1", "--device=cpu", "--train_epochs=2"]
    assert sweep.run(*words).returncode == 0
    (attempt,) = sweep.attempts("mrpc", 1)
    assert {"--num_train_epochs=2", "--device=cpu"} <= set(attempt["argv"])
    assert sweep.run(*words[:-1], "--train_epochs=many").returncode == 2


def test_runs_are_alone_in_a_step_of_several_tasks(sweep: Sweep) -> None:
    sweep.run(*MRPC, "1", SLURM_STEP_NUM_TASKS="2", WORLD_SIZE="2")
    assert sweep.attempts("mrpc", 1)[0]["world"] == "1"


def test_threads_are_divided_and_the_users_own_kept(sweep: Sweep) -> None:
    assert sweep.run(*MRPC, "1,2", "--jobs", "2").returncode == 0
    cores = len(os.sched_getaffinity(0))
    assert sweep.attempts("mrpc", 1)[0]["threads"] == str(max(1, cores // 2))
    assert sweep.run(*MRPC, "3", OMP_NUM_THREADS="7").returncode == 0
    assert sweep.attempts("mrpc", 3)[0]["threads"] == "7"


def test_auto_is_every_device_of_the_best_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "tests/support/simulated_npu"))
    assert [slot.device for slot in slots_of("auto", 2)] == ["npu:0", "npu:1", "npu:0", "npu:1"]
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "tests/nowhere"))
    assert "npu:0" not in [slot.device for slot in slots_of("auto", 1)]


def test_jobs_run_at_the_same_time(sweep: Sweep) -> None:
    sweep.stub = {f"mrpc-{seed}": {"steps": 30} for seed in (1, 2, 3)}
    child = sweep.start(*MRPC, "1-3", "--jobs", "3")
    wait_until(lambda: all((sweep.folder("mrpc", seed) / "step").exists() for seed in (1, 2, 3)))
    assert child.poll() is None
    assert child.wait(timeout=30) == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tasks", "mrcp"], "Did you mean mrpc?"),
        (["--tasks", "ax"], "unknown task"),
        (["--seeds", "5-1"], "neither a seed nor a range"),
        (["--seeds", "one"], "neither a seed nor a range"),
        (["--devices", "cpu,cpu"], "--jobs N"),
        (["--devices", "NPU 0"], "--devices:"),
        (["--jobs", "0"], "--jobs 0 is below the minimum of 1"),
        (["--learning_rates", "fast"], "'fast' is not a number"),
        (["--storage", "sqlite:///x"], "need --search"),
        (["--sample", "--data_path", "x"], "exclude each other"),
        (["--", "--seed", "3"], "--seed cannot follow --"),
        (["--", "--no_do_eval"], "--do_eval cannot follow --"),
        (["--", "--no_such_flag"], "--no_such_flag: unknown flag"),
    ],
)
def test_mistakes_are_told_before_anything_starts(sweep: Sweep, flags: list[str], says: str) -> None:
    done = sweep.run(*flags)
    assert done.returncode == 2 and says in done.stderr and done.stderr.startswith("error: ")
    assert not sweep.output.exists()


def test_a_dry_run_starts_nothing(sweep: Sweep) -> None:
    done = sweep.run("--dry_run", *MRPC, "1-2")
    assert done.returncode == 0 and done.stdout.count("to start: mrpc seed") == 2
    assert not sweep.output.exists()


def test_help_says_why_one_run_a_device(sweep: Sweep) -> None:
    text = " ".join(sweep.run("--help").stdout.split())
    assert "3 to 10 points below" in text and "Exit codes: 0 every run is done" in text


# Resuming


def test_finished_runs_are_kept_and_new_ones_added(sweep: Sweep) -> None:
    assert sweep.run(*MRPC, "1,2").returncode == 0
    done = sweep.run(*MRPC, "1-3")
    assert done.returncode == 0 and "2 runs are already done; 1 to do" in done.stdout
    assert [len(sweep.attempts("mrpc", seed)) for seed in (1, 2, 3)] == [1, 1, 1]


def test_other_settings_are_refused_by_name_and_nothing_is_lost(sweep: Sweep) -> None:
    assert sweep.run(*MRPC, "1").returncode == 0
    before = sweep.results("mrpc", 1)
    done = sweep.run(*MRPC, "1", "--", "--learning_rate", "3e-5")
    assert done.returncode == 2 and "--learning_rate 2e-05, now 3e-05" in done.stderr
    assert sweep.results("mrpc", 1) == before
    assert sweep.run(*MRPC, "1", "--", "--log_level", "error").returncode == 0  # not a setting of the result


def test_a_folder_of_something_else_is_refused(sweep: Sweep) -> None:
    sweep.folder("mrpc", 1).mkdir(parents=True)
    (sweep.folder("mrpc", 1) / "all_results.json").write_text("{}")
    done = sweep.run(*MRPC, "1")
    assert done.returncode == 2 and "was not written by a sweep" in done.stderr


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"seed": 1}', '{"seed": 2, "eval_f1": 0.9}'])
def test_results_that_are_not_whole_do_not_count(sweep: Sweep, damage: str) -> None:
    assert sweep.run(*MRPC, "1").returncode == 0
    (sweep.folder("mrpc", 1) / "all_results.json").write_text(damage)
    assert sweep.run(*MRPC, "1").returncode == 0
    assert "--resume_from_checkpoint=auto" in sweep.attempts("mrpc", 1)[1]["argv"]


def test_killed_with_sigkill_its_runs_save_and_the_next_sweep_goes_on(sweep: Sweep) -> None:
    sweep.stub = {f"mrpc-{seed}": {"steps": 60} for seed in (1, 2)}
    child = sweep.start(*MRPC, "1-3", "--jobs", "2")
    steps = [sweep.folder("mrpc", seed) / "step" for seed in (1, 2)]
    wait_until(lambda: all(step.exists() and int(step.read_text() or 0) >= 5 for step in steps))
    child.kill()
    child.wait()
    done = sweep.run(*MRPC, "1-3", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert "continue mrpc seed 1" in done.stdout and "start mrpc seed 3" in done.stdout
    assert all(sweep.results("mrpc", seed)["resumed_at"] > 5 for seed in (1, 2))
    assert not any(is_alive(attempt["pid"]) for seed in (1, 2) for attempt in sweep.attempts("mrpc", seed))
    assert sweep.group("mrpc")["runs"] == 3


def test_two_sweeps_in_one_folder_are_refused(sweep: Sweep) -> None:
    sweep.stub = {"mrpc-1": {"steps": 100}}
    child = sweep.start(*MRPC, "1")
    try:
        wait_until(lambda: (sweep.folder("mrpc", 1) / "step").exists())
        done = sweep.run(*MRPC, "2")
        assert done.returncode == 6 and "another run" in done.stderr
    finally:
        child.terminate()
        child.wait(timeout=20)


# Failures


def test_a_failed_run_is_retried_once_at_the_end_and_goes_on(sweep: Sweep) -> None:
    sweep.stub = {"mrpc-1": {"exit": [-9]}}
    done = sweep.run(*MRPC, "1,2")
    assert done.returncode == 0
    assert "failed mrpc seed 1: ended by SIGKILL (out of memory?); it will be retried once" in done.stdout
    assert done.stdout.index("done mrpc seed 2") < done.stdout.index("done mrpc seed 1")
    assert "--resume_from_checkpoint=auto" in sweep.attempts("mrpc", 1)[1]["argv"]


def test_a_run_that_fails_twice_leaves_the_others_and_its_code(sweep: Sweep) -> None:
    sweep.stub = {"mrpc-2": {"exit": [5, 5, 5]}}
    done = sweep.run(*MRPC, "1-3")
    assert done.returncode == 5
    assert len(sweep.attempts("mrpc", 2)) == 2
    assert "exit code 5: error: the stub failed as told, attempt 2" in done.stderr
    states = {run["seed"]: run["state"] for run in sweep.summary()["runs"]}
    assert states == {1: "done", 2: "failed", 3: "done"}
    assert (sweep.group("mrpc")["runs"], sweep.group("mrpc")["missing"]) == (2, 1)
    sweep.stub = {}
    assert sweep.run(*MRPC, "1-3").returncode == 0  # mended: only the failed one runs
    assert [len(sweep.attempts("mrpc", seed)) for seed in (1, 2, 3)] == [1, 3, 1]


def test_different_failures_end_with_one(sweep: Sweep) -> None:
    sweep.stub = {"mrpc-1": {"exit": [5, 5]}, "mrpc-2": {"exit": [3, 3]}}
    assert sweep.run(*MRPC, "1-3").returncode == 1


def test_success_without_results_is_a_failure(sweep: Sweep) -> None:
    sweep.stub = {"mrpc-1": {"results": {"seed": 9}}}
    done = sweep.run(*MRPC, "1")
    assert done.returncode == 1 and "left no complete results" in done.stderr


def test_a_device_that_never_works_is_left_out(sweep: Sweep) -> None:
    """The real run_glue.py has no npu:9; the stub imitates that with a seed that fails at first."""
    sweep.stub = {"mrpc-1": {"exit": [4]}}
    child = [word if word != "cpu" else "npu:9,cpu" for word in sweep.command(*MRPC, "1-4")]
    done = subprocess.run(child, env=sweep.environment(), cwd=sweep.root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "no more runs on npu:9: error: the stub failed as told" in done.stdout
    assert "--device=cpu" in sweep.attempts("mrpc", 1)[1]["argv"]


def test_a_folder_that_cannot_be_written_is_one_line(sweep: Sweep) -> None:
    sweep.output = Path("/proc/nowhere")
    done = sweep.run(*MRPC, "1")
    assert done.returncode == 6 and "cannot be written" in done.stderr


# Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_lets_every_run_save_and_the_same_command_goes_on(sweep: Sweep, number: int, code: int) -> None:
    sweep.stub = {f"mrpc-{seed}": {"steps": 40} for seed in (1, 2)}
    child = sweep.start(*MRPC, "1-3", "--jobs", "2")
    wait_until(lambda: all((sweep.folder("mrpc", seed) / "step").exists() for seed in (1, 2)))
    child.send_signal(number)
    out, err = child.communicate(timeout=30)
    assert child.returncode == code and "Traceback" not in err
    of_a_run = 143 if number == signal.SIGHUP else code  # run_glue.py knows no SIGHUP
    assert out.count(f"(exit code {of_a_run})") == 2 and "the same command continues" in err
    assert not sweep.folder("mrpc", 3).exists()
    assert {run["state"] for run in sweep.summary()["runs"]} == {"unfinished", "not started"}
    assert sweep.run(*MRPC, "1-3").returncode == 0
    assert sweep.results("mrpc", 1)["resumed_at"] > 0


def test_a_run_that_ignores_the_signal_is_killed_after_the_grace(sweep: Sweep) -> None:
    sweep.stub = {"mrpc-1": {"steps": 2000, "hang": True}}
    child = sweep.start(*MRPC, "1", "--grace", "1")
    wait_until(lambda: (sweep.folder("mrpc", 1) / "step").exists())
    began = time.monotonic()
    child.terminate()
    out, _ = child.communicate(timeout=30)
    assert child.returncode == 143 and time.monotonic() - began < 10
    assert "did not end within 1 s (--grace) and are killed" in out
    assert not is_alive(sweep.attempts("mrpc", 1)[0]["pid"])


# Figures


def test_figures_are_numpys(sweep: Sweep) -> None:
    scores = [0.81, 0.86, 0.40, 0.84]
    sweep.stub = {f"mrpc-{seed}": {"score": score} for seed, score in enumerate(scores, 1)}
    sweep.stub["mrpc-3"]["results"] = {"eval_collapsed": "all 408 predictions are equivalent"}
    done = sweep.run(*MRPC, "1-4")
    group, points = sweep.group("mrpc"), 100 * np.array(scores)
    expected = {
        "mean": points.mean(),
        "std": points.std(ddof=1),
        "standard_error_of_mean": points.std(ddof=1) / 2,
        "best": points.max(),
        "worst": points.min(),
        "mean_without_collapsed": points[[0, 1, 3]].mean(),
        "majority_baseline": 40.0,
        "standard_error_of_dev": 2.0,
    }
    assert {name: group[name] for name in expected} == pytest.approx(expected)
    assert (group["best_seed"], group["collapsed_seeds"], group["metric"]) == (2, [3], "f1")
    with (sweep.output / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["mean"]) == pytest.approx(points.mean()) and row["collapsed_seeds"] == "3"
    assert f"{points.mean():.2f}" in done.stdout and f"{points.std(ddof=1):.2f}" in done.stdout


@pytest.mark.parametrize("name", TRAINABLE)
def test_every_task_has_the_dev_sets_error_of_its_headline_metric(tmp_path: Path, name: str) -> None:
    """Under the keys that a run writes, MNLI's two splits apart; the error of a perfect seed is 0, and counts."""
    task = TASKS[name]
    runs = plan(Suite(tmp_path, "m", ()), [task], [1, 2, 3], [])
    for run, error in zip(runs, (0.03, 0.0, None), strict=True):
        splits = {
            split: {"suffix": suffix, "standard_error": None if error is None else error * (at + 1)}
            for at, (split, suffix, _) in enumerate(task.evaluation)
        }
        scores = {"seed": run.seed} | {f"eval_{task.headline}{suffix}": 0.5 for _, suffix, _ in task.evaluation}
        run.folder.mkdir(parents=True)
        run.note_settings()
        (run.folder / "all_results.json").write_text(json.dumps(scores | standard_errors(task, splits)))
    summary = summarise(runs, {})
    found = [(group["split"], group["standard_error_of_dev"]) for group in summary["groups"]]
    assert found == [(split, pytest.approx(1.5 * (at + 1))) for at, (split, _, _) in enumerate(task.evaluation)]
    write(tmp_path, summary)
    with (tmp_path / "summary.csv").open() as file:
        assert [float(row["standard_error_of_dev"]) for row in csv.DictReader(file)] == [error for _, error in found]
    header, *rows = lines(summary)
    assert "dev error" in header and all("1.50" in row or "3.00" in row for row in rows[: len(found)])


def test_a_constant_prediction_is_not_taken_for_certainty(sweep: Sweep) -> None:
    """Redrawing a constant prediction gives the same f1 or correlation again: a spread of 0, which is no error."""
    lost = {"eval_collapsed": "all predictions are the same", "eval_f1_standard_error": 0.0}
    sweep.stub = {"mrpc-2": {"results": lost}}
    assert sweep.run(*MRPC, "1,2").returncode == 0
    assert sweep.group("mrpc")["standard_error_of_dev"] == pytest.approx(2.0)
    sweep.stub = {"qqp-1": {"results": lost}}
    assert sweep.run("--tasks=qqp", "--seeds=1").returncode == 0
    assert sweep.group("qqp")["standard_error_of_dev"] is None


def test_each_learning_rate_and_each_mnli_split_is_a_group(sweep: Sweep) -> None:
    assert sweep.run("--tasks=mnli", "--seeds=1,2", "--learning_rates", "1e-5,3e-5").returncode == 0
    found = [(g["split"], g["chosen"]["learning_rate"], g["runs"]) for g in sweep.summary()["groups"]]
    splits = ("validation_matched", "validation_mismatched")
    assert found == [(split, rate, 2) for rate in ("1e-5", "3e-5") for split in splits]


def test_one_run_has_no_deviation_and_a_missing_metric_no_mean(sweep: Sweep) -> None:
    sweep.stub = {"stsb-1": {"results": {"eval_spearmanr": None, "eval_collapsed": "scores barely differ"}}}
    assert sweep.run("--tasks=stsb", "--seeds=1,2").returncode == 0
    group = sweep.group("stsb")
    assert (group["runs"], group["missing"], group["std"], group["collapsed_seeds"]) == (1, 1, None, [1])
    assert group["mean"] == pytest.approx(52.0)


def test_nothing_done_is_null_and_no_division(tmp_path: Path) -> None:
    runs = plan(Suite(tmp_path, "m", ()), [TASKS["mrpc"]], [1, 2], [])
    (group,) = summarise(runs, {})["groups"]
    assert (group["mean"], group["best"], group["runs"], group["missing"]) == (None, None, 0, 2)


def test_lists() -> None:
    assert seeds_of("1-3,2,7") == [1, 2, 3, 7]
    assert [task.name for task in tasks_of("all")] == list(TRAINABLE)
    assert [task.name for task in tasks_of("RTE, rte,mrpc")] == ["rte", "mrpc"]
    with pytest.raises(UsageError):
        seeds_of("1-99999")


def test_a_terminal_gets_a_live_table(sweep: Sweep) -> None:
    sweep.stub = {"mrpc-1": {"steps": 40}}
    ours, theirs = pty.openpty()
    environment = sweep.environment(TERM="xterm", COLUMNS="120")
    child = subprocess.Popen(
        sweep.command(*MRPC, "1"), env=environment, cwd=sweep.root, stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    assert child.wait(timeout=20) == 0
    assert b"0 of 1 done" in shown and b"mrpc seed 1" in shown


def test_the_gate_judges_means(sweep: Sweep) -> None:
    sweep.stub = {"mrpc-1": {"score": 0.85}, "mrpc-2": {"score": 0.89}}
    both = ("--tasks=mrpc,rte", "--seeds=1,2", "--expect")
    assert sweep.run(*both, "mrpc.f1>=0.86", "rte.accuracy>0.5").returncode == 0
    done = sweep.run(*both, "mrpc.f1>=0.88", "rte.accuracy>0.5")
    assert done.returncode == 8 and "--expect mrpc.f1>=0.88: missed, it is 0.87" in done.stderr
    for wrong in ("f1>=0.8", "cola.f1>=0.8", "mrpc.f2>=0.8", "mrpc.f1"):
        assert sweep.run(*both, wrong).returncode == 2


# The launcher, and the real run_glue.py


def test_the_launcher_hands_its_flags_on(clone: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(REPOSITORY / "test", clone / "test", ignore=shutil.ignore_patterns("output"), dirs_exist_ok=True)
    for file in REPOSITORY.glob("requirements*.txt"):
        shutil.copy(file, clone)

    def launch(*flags: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(clone / "test/train_all_tasks.sh"), *flags]
        return subprocess.run(
            command, env=clean_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=60
        )

    done = launch(
        "--tasks=rte", "--seeds=4", "--sample", "--devices=cpu", "--output_dir", "here", "--", "--seed_x", "1"
    )
    assert done.returncode == 2 and "--seed_x: unknown flag" in done.stderr
    done = launch("--tasks=rte", "--seeds=4", "--model=my model", "--devices=cpu", "--output_dir", "here")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here/rte/seed4/all_results.json").is_file()
    assert "--model_name_or_path=my model" in json.loads((tmp_path / "here/rte/seed4/attempts").read_text())["argv"]
    assert launch("--help").stdout.startswith("usage: bert_glue.sweep")


def real_sweep(output: Path, *flags: str) -> list[str]:
    own = ["--sample", "--tasks", "wnli", "--devices", "cpu", "--output_dir", str(output)]
    return [sys.executable, "-m", "bert_glue.sweep", *own, *flags]


def test_real_runs_on_the_sample_killed_and_continued(tmp_path: Path) -> None:
    more = ["--seeds", "1", "--", "--num_train_epochs", "12", "--max_train_samples", "400", "--logging_steps", "1"]
    settings = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "cwd": REPOSITORY}
    child = subprocess.Popen(real_sweep(tmp_path, *more), stdout=subprocess.DEVNULL, **settings)
    log = tmp_path / "wnli/seed1/run.log"
    wait_until(lambda: log.is_file() and "epoch=2." in log.read_text(), 120)
    child.kill()
    child.wait()
    done = subprocess.run(real_sweep(tmp_path, *more), capture_output=True, text=True, timeout=200, **settings)
    assert done.returncode == 0, done.stdout + log.read_text()[-2000:]
    assert "resumed after step" in log.read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    (group,) = summary["groups"]
    results = json.loads((tmp_path / "wnli/seed1/all_results.json").read_text())
    assert group["mean"] == pytest.approx(100 * results["eval_accuracy"]) and group["sample_data"]
    assert group["majority_baseline"] == pytest.approx(50.0)
    assert group["standard_error_of_dev"] == pytest.approx(100 * results["eval_accuracy_standard_error"])
    assert not list(tmp_path.glob("wnli/seed1/checkpoint-*"))
    assert (tmp_path / "wnli/seed1/model.safetensors").is_file()


def test_a_folder_that_the_locale_cannot_decode(sweep: Sweep, tmp_path: Path) -> None:
    sweep.output = tmp_path / "\u8f93\u51fa"
    done = sweep.run(*MRPC, "1", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    assert str(sweep.output).encode() in (sweep.folder("mrpc", 1) / "run.log").read_bytes()
