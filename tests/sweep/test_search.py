"""Search: ranges, a shared study, trials that survive a kill, and the error without Optuna."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sweep_stubs import Sweep, wait_until

from bert_glue.config.arguments import without_login
from bert_glue.errors import UsageError
from bert_glue.sweep.search import BoundedCalls, read_space

SEARCH = ("--tasks", "mrpc", "--seeds", "1")


@pytest.fixture
def optuna():
    return pytest.importorskip("optuna")


def trials_of(optuna, storage: str):
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


def value_of(argv: list[str], flag: str) -> str:
    return next(word.partition("=")[2] for word in argv if word.startswith(f"--{flag}="))


# Without Optuna


def test_without_optuna_one_line_and_the_way_to_get_it(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "optuna.py").write_text("raise ImportError('No module named optuna')")
    done = subprocess.run(
        sweep.command(*SEARCH, "--search", "2"),
        env=sweep.environment(PYTHONPATH=f"{tmp_path}:{sweep.root}"), cwd=sweep.root,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 4 and "pip install optuna" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["learning_rate"], "FLAG=LOW:HIGH"),
        (["no_flag=1:2"], "FLAG=LOW:HIGH"),
        (["bf16=0:1"], "FLAG=LOW:HIGH"),
        (["learning_rate=a:b"], "'a' is not a number"),
        (["learning_rate=2:1"], "LOW must be below HIGH"),
        (["learning_rate=1:2:3"], "LOW must be below HIGH"),
        (["per_device_train_batch_size=0,8"], "out of range"),
        (["lr_scheduler_type=linear,fast"], "'fast'"),
    ],
)
def test_ranges_that_are_none(words: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_space(words, False)


def test_ranges_are_stated_and_changed_by_name() -> None:
    space = read_space(["num_train_epochs=1:4", "lr_scheduler_type=linear,cosine"], False)
    assert space["num_train_epochs"] == "1:4" and space["learning_rate"] == "1e-5:1e-4"
    assert set(space) >= {"learning_rate", "num_train_epochs", "warmup_steps", "per_device_train_batch_size"}
    assert read_space([], True)["learning_rate"] == "1e-4:1e-3"


def test_no_login_is_shown() -> None:
    assert without_login("mysql://me:" + "secret@host.example/study") == "mysql://host.example/study"
    assert without_login("sqlite:////tmp/study.db") == "sqlite:////tmp/study.db"


# With Optuna


def test_trials_lie_in_their_ranges_and_the_best_becomes_a_config(optuna, sweep: Sweep) -> None:
    done = sweep.run(*SEARCH, "--search", "4", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    study = sweep.summary()["search"]["mrpc"]
    assert (study["COMPLETE"], study["FAIL"], study["RUNNING"]) == (4, 0, 0)
    for number in range(4):
        argv = json.loads((sweep.output / f"mrpc/trial{number:04d}/seed1/attempts").read_text())["argv"]
        assert 1e-5 <= float(value_of(argv, "learning_rate")) <= 1e-4
        assert int(value_of(argv, "num_train_epochs")) in range(2, 11)
        assert 0.0 <= float(value_of(argv, "warmup_steps")) <= 0.2
        assert value_of(argv, "per_device_train_batch_size") in ("16", "32")
    best = json.loads((sweep.output / "best_mrpc.json").read_text())
    assert best["learning_rate"] == float(study["best"]["learning_rate"]) and "seed" not in best
    from bert_glue.config.parser import parse

    assert parse([str(sweep.output / "best_mrpc.json"), "--output_dir=x"]).task_name == "mrpc"
    assert "best of 4 trials, mrpc" in done.stdout


def test_a_value_is_the_mean_over_seeds_and_a_finished_study_asks_no_more(optuna, sweep: Sweep) -> None:
    sweep.stub = {"mrpc-1": {"score": 0.8}, "mrpc-2": {"score": 0.9}}
    flags = ("--tasks", "mrpc", "--seeds", "1,2", "--search", "2")
    assert sweep.run(*flags).returncode == 0
    assert sweep.summary()["search"]["mrpc"]["best_value"] == pytest.approx(0.85)
    before = sorted(sweep.output.glob("mrpc/*"))
    assert sweep.run(*flags).returncode == 0
    assert sorted(sweep.output.glob("mrpc/*")) == before


def test_a_killed_search_continues_its_trial(optuna, sweep: Sweep) -> None:
    sweep.stub = {"mrpc-1": {"steps": 60}}
    child = sweep.start(*SEARCH, "--search", "2")
    folder = sweep.output / "mrpc/trial0000/seed1"
    wait_until(lambda: (folder / "step").exists() and int((folder / "step").read_text() or 0) > 3, 40)
    child.kill()
    child.wait()
    sweep.stub = {}
    done = sweep.run(*SEARCH, "--search", "2")
    assert done.returncode == 0, done.stderr
    trials = trials_of(optuna, f"sqlite:///{sweep.output}/search.db")
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert len((folder / "attempts").read_text().splitlines()) == 2


def test_a_failing_trial_is_told_and_the_search_goes_on(optuna, sweep: Sweep) -> None:
    sweep.stub = {"mrpc-1": {"exit": [5, 5]}}
    done = sweep.run(*SEARCH, "--search", "2")
    assert done.returncode == 5
    trials = trials_of(optuna, f"sqlite:///{sweep.output}/search.db")
    assert [trial.state.name for trial in trials] == ["FAIL", "FAIL"]


def test_two_machines_share_one_study(optuna, sweep: Sweep, tmp_path: Path) -> None:
    """Two folders, as two machines have them, one storage; a third joins late and finds nothing to do."""
    storage = f"sqlite:///{tmp_path}/study.db"
    flags = (*SEARCH, "--search", "6", "--storage", storage)
    machines = [Sweep(sweep.root) for _ in range(2)]
    for number, machine in enumerate(machines):
        machine.output, machine.stub = tmp_path / f"machine{number}", {"mrpc-1": {"steps": 20}}
    assert machines[0].run(*SEARCH, "--search", "1", "--storage", storage).returncode == 0  # makes the tables
    children = [machine.start(*flags) for machine in machines]
    for child in children:
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors
    trials = trials_of(optuna, storage)
    assert {trial.state.name for trial in trials} == {"COMPLETE"} and 6 <= len(trials) <= 7
    assert all(list(machine.output.glob("mrpc/trial*")) for machine in machines)
    study = machines[1].summary()["search"]["mrpc"]  # as of its own end: the other's last trial may still run
    assert study["COMPLETE"] + study["RUNNING"] >= 6


@pytest.mark.parametrize(
    "storage", ["sqlite:////proc/none/study.db", "nosuchdb://me:secret@host.example/x", "study.db"]
)
def test_a_storage_that_does_not_open(optuna, sweep: Sweep, storage: str) -> None:
    done = sweep.run(*SEARCH, "--search", "1", "--storage", storage)
    assert done.returncode in (2, 4) and "--storage" in done.stderr and "secret" not in done.stderr


@pytest.mark.parametrize(("at", "limit"), [("open", "1"), ("later", "15")])
def test_a_storage_that_does_not_answer_ends_the_search_in_time(
    optuna, sweep: Sweep, tmp_path: Path, at: str, limit: str
) -> None:
    """The driver would wait for 1,000 s: another program holds the database."""
    file = tmp_path / "study.db"
    flags = (*SEARCH, "--search", "2", "--storage", f"sqlite:///{file}?timeout=1000", "--storage_timeout", limit)
    sweep.stub = {"mrpc-1": {"steps": 60}}
    if at == "later":
        child = sweep.start(*flags)
        folder = sweep.output / "mrpc/trial0000/seed1"
        wait_until(lambda: (folder / "step").exists(), 60)
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    if at == "open":
        child = sweep.start(*flags)
    _, errors = child.communicate(timeout=120)
    other.close()
    assert child.returncode == 4, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert f"no answer within {limit} s (--storage_timeout)" in line and "Traceback" not in errors
    assert str(file) in line
    sweep.stub = {}
    assert sweep.run(*flags, "--storage_timeout", "60").returncode == 0


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e300", "soon", ""])
def test_a_time_limit_is_a_number_of_seconds(sweep: Sweep, text: str) -> None:
    for flag in ("--grace", "--storage_timeout"):
        done = sweep.run(*SEARCH, "--search", "1", f"{flag}={text}")
        assert done.returncode == 2 and flag in done.stderr and "Traceback" not in done.stderr


def test_a_call_has_its_own_errors_and_results() -> None:
    asked = BoundedCalls(5, "it")
    assert asked(lambda: 3) == 3
    with pytest.raises(TimeoutError, match="of the driver"):
        asked(lambda: (_ for _ in ()).throw(TimeoutError("of the driver")))
    assert asked(lambda: 4) == 4


def test_modules_of_the_search_need_no_optuna() -> None:
    code = "import sys; sys.modules['optuna'] = None; import bert_glue.sweep, bert_glue.sweep.search"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
