"""Trackers never ask a batch job for a login, and nothing here calls home."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
from tiny_run import REPOSITORY, arguments, flags_of

from bert_glue.training import console

# No connection but to files and this machine's own sockets; names are not looked up either.
WATCHED = """
import json, sys
seen = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        seen.append([event, repr(arguments[1:])])
sys.addaudithook(watch)
import run_glue
code = run_glue.main(json.loads(sys.argv[1]))
print("SEEN", json.dumps(seen))
sys.exit(code)
"""


def test_a_run_with_local_files_opens_no_connection(tmp_path):
    args = arguments(tmp_path, max_steps=2, do_eval=True, do_predict=True)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(flags_of(args))], cwd=REPOSITORY, capture_output=True, text=True,
        timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.rpartition("SEEN ")[2]) == []


def test_the_libraries_are_told_to_report_nothing():
    import bert_glue

    assert bert_glue.__version__
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY"):
        assert os.environ[name] == "1"


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """An environment without any login."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "SWANLAB_API_KEY", "SWANLAB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("name", "mode"), [("wandb", "WANDB_MODE"), ("swanlab", "SWANLAB_MODE")])
def test_without_a_login_a_tracker_records_to_files_and_says_so(nobody, monkeypatch, name, mode):
    monkeypatch.setenv(mode, "")
    (note,) = console._stay_offline_without_login(name)
    assert os.environ[mode] == "offline"
    assert note.startswith(f"--report_to {name}: no login here") and f"{mode}=offline" in note


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "trackio"])
def test_trackers_without_logins_are_left_alone(nobody, name):
    assert console._stay_offline_without_login(name) == []


def test_a_key_a_mode_or_a_saved_login_is_respected(nobody, monkeypatch):
    with monkeypatch.context() as here:
        here.setenv("WANDB_API_KEY", "k")
        assert console._stay_offline_without_login("wandb") == [] and "WANDB_MODE" not in os.environ
    with monkeypatch.context() as here:
        here.setenv("WANDB_MODE", "disabled")
        assert console._stay_offline_without_login("wandb") == [] and os.environ["WANDB_MODE"] == "disabled"
    (nobody / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (nobody / ".netrc").chmod(0o600)
    assert console._stay_offline_without_login("wandb") == [] and "WANDB_MODE" not in os.environ


class Asking:
    """Stands in for accelerate's wandb tracker: an online start would wait for a key on stdin."""

    requires_logging_directory = False

    def __init__(self, name: str):
        assert os.environ["WANDB_MODE"] == "offline", "would ask for a login and wait"

    def store_init_configuration(self, values: dict) -> None:
        assert "token" not in values

    def log(self, values: dict, step: int) -> None:
        pass

    def finish(self) -> None:
        pass


def test_a_run_that_reports_to_wandb_without_login_does_not_block(nobody, tmp_path, monkeypatch, capsys):
    import accelerate.tracking

    import run_glue

    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["wandb"])
    monkeypatch.setattr(accelerate.tracking, "LOGGER_TYPE_TO_CLASS", {"wandb": Asking})
    monkeypatch.setenv("WANDB_MODE", "")
    args = arguments(tmp_path, max_steps=1, report_to="wandb")
    assert run_glue.main(flags_of(args)) == 0
    assert "note: --report_to wandb: no login here" in capsys.readouterr().out


# ---- a tracker that hangs or fails ----

# A package as accelerate's tracker calls it; what it does is in FAKE_TRACKER: `start`, `log` or `finish`, and how.
FAKE_WANDB = """
import json, os, threading, time
where, _, how = os.environ.get("FAKE_TRACKER", "").partition(":")
def act(now, text=""):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(json.dumps([now, text, threading.current_thread().name]) + "\\n")
    if now == where and how == "hang":
        time.sleep(3600)
    if now == where and how == "raise":
        raise ValueError("no space left at the service\\nand more")
    if now == where and how == "exit":
        raise SystemExit(1)
class Config(dict):
    def update(self, values, allow_val_change=None):
        act("config", values)
class Run:
    config = Config()
    def log(self, values, step=None, **more):
        act("log", [step, sorted(values)])
    def finish(self):
        act("finish")
run = None
config = Run.config
def init(project=None, **more):
    global run
    act("start", [project, os.environ.get("WANDB_MODE")])
    run = Run()
    return run
"""


def _run_with_fake(tmp_path, where: str, **changes):
    """Runs one process that reports to the fake. Returns it, its seconds, and the calls of the fake."""
    import time

    room = tmp_path / "packages"
    (room / "wandb").mkdir(parents=True)
    (room / "wandb/__init__.py").write_text(FAKE_WANDB)
    (room / "wandb-1.0.dist-info").mkdir()
    (room / "wandb-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 1.0\n")
    args = arguments(tmp_path, max_steps=6, report_to="wandb", run_name="trial", token="hf_secret", **changes)
    script = "import sys, json, bert_glue.training.console as t, run_glue; t.CLOSE_SECONDS = float(sys.argv[2]); "
    script += "sys.exit(run_glue.main(json.loads(sys.argv[1])))"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(flags_of(args)), "1" if "hang" in where else "20"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{room}:{REPOSITORY}", "FAKE_TRACKER": where,
            "FAKE_LOG": str(tmp_path / "told"), "HOME": str(tmp_path), "WANDB_MODE": "",
        },
    )  # fmt: skip
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    return done, time.monotonic() - began, told


def test_a_tracker_gets_all_numbers_and_no_secret(tmp_path):
    done, _, told = _run_with_fake(tmp_path, "", do_eval=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [entry[0] for entry in told] == ["start", "config", *["log"] * 7, "finish"], done.stdout
    assert told[0][1] == ["trial", "offline"]
    assert [entry[1][0] for entry in told[2:-1]] == [1, 2, 3, 4, 5, 6, 6]
    assert {"loss", "learning_rate", "grad_norm"} <= set(told[2][1][1]) and "step" not in told[2][1][1]
    assert {"eval_accuracy", "eval_loss", "train_samples_per_second"} <= set(told[-2][1][1])  # the results, once
    assert "hf_secret" not in (tmp_path / "told").read_text() + done.stdout
    assert {entry[2] for entry in told} == {"tracker wandb"}  # one thread, which some packages need


# Each place and each way once; all pairs are slow.
QUICK = {("hang", "finish"), ("raise", "start"), ("exit", "log")}
WAYS = list(itertools.product(("hang", "raise", "exit"), ("start", "log", "finish")))


@pytest.mark.parametrize(
    ("how", "where"), [pytest.param(*way, marks=() if way in QUICK else pytest.mark.slow) for way in WAYS]
)
def test_a_tracker_that_hangs_or_fails_costs_a_line(tmp_path, where, how):
    done, seconds, _ = _run_with_fake(tmp_path, f"{where}:{how}")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert seconds < 60 and (tmp_path / "out/all_results.json").exists()
    notes = [line for line in done.stdout.splitlines() if line.startswith("note: --report_to wandb: ")]
    notes = [note for note in notes if "no login here" not in note]
    says = {
        "hang": "not finished after 1 s; the run waits no longer",
        "raise": "no space left at the service",
        "exit": ": 1",
    }
    assert len(notes) == 1 and says[how] in notes[0] and "and more" not in done.stdout


def test_a_missing_package_is_one_line_before_any_work(tmp_path):
    args = arguments(tmp_path, report_to="mlflow")
    hide = "import sys, accelerate.tracking as t; t.get_available_trackers = lambda: []; "
    hide += "import run_glue; sys.exit(run_glue.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", hide, *flags_of(args)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 4 and "Traceback" not in done.stderr and not (tmp_path / "out/all_results.json").exists()
    assert "--report_to mlflow: its package is not installed (available: " in done.stderr.strip().splitlines()[-1]


def test_the_default_is_tensorboard_where_it_is_installed():
    assert console._names(None, ["wandb", "tensorboard"]) == ["tensorboard"]
    assert console._names(None, ["wandb"]) == []
    assert console._names("all", ["wandb", "clearml", "tensorboard"]) == ["wandb", "tensorboard"]


def test_tensorboard_can_read_what_a_run_wrote(tmp_path):
    """With the real package, by default."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = arguments(tmp_path, max_steps=5, do_eval=True, report_to=None)
    done = subprocess.run(
        [sys.executable, "run_glue.py", *flags_of(args)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (tmp_path / "out/runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_the_real_wandb_records_to_files_without_a_login(tmp_path):
    pytest.importorskip("wandb")
    args = arguments(tmp_path, max_steps=3, report_to="wandb")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "run_glue.py"), *flags_of(args)], cwd=tmp_path, capture_output=True,
        text=True, timeout=120, env={**environment, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "wandb").glob("offline-run-*")) and "not done" not in done.stdout
