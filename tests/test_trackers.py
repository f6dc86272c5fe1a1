"""Trackers never ask a batch job for a login, and nothing here calls home."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from recipe_parts import REPOSITORY, arguments, flags_of

from bert_glue import trackers

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
    (note,) = trackers._stay_offline_without_login(name)
    assert os.environ[mode] == "offline"
    assert note.startswith(f"--report_to {name}: no login here") and f"{mode}=offline" in note


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "trackio"])
def test_trackers_without_logins_are_left_alone(nobody, name):
    assert trackers._stay_offline_without_login(name) == []


def test_a_key_a_mode_or_a_saved_login_is_respected(nobody, monkeypatch):
    with monkeypatch.context() as here:
        here.setenv("WANDB_API_KEY", "k")
        assert trackers._stay_offline_without_login("wandb") == [] and "WANDB_MODE" not in os.environ
    with monkeypatch.context() as here:
        here.setenv("WANDB_MODE", "disabled")
        assert trackers._stay_offline_without_login("wandb") == [] and os.environ["WANDB_MODE"] == "disabled"
    (nobody / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (nobody / ".netrc").chmod(0o600)
    assert trackers._stay_offline_without_login("wandb") == [] and "WANDB_MODE" not in os.environ


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
