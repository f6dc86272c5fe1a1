"""SIGTERM at any time: exit code 143, a checkpoint at most one step old, and the same bits after a resume."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import Job, argv_of, last_state
from tiny_run import arguments, changed, make_data, make_model, results_of

from bert_glue.storage import checkpoint

STEPS = 24
ATTEMPTS = 6  # on a busy machine a signal may come after what it was meant to hit


def wait_for(job: Job, pattern: str, seconds: float = 60.0) -> None:
    """Until a line of the log begins with `pattern`."""
    end = time.monotonic() + seconds
    while not re.search(f"(?m)^{pattern}", job.text()):
        assert time.monotonic() < end, job.text()[-2000:]
        time.sleep(0.002)


def wait_for_save(job: Job, output: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not any(output.glob(".writing-checkpoint-*")):
        assert time.monotonic() < end, job.text()[-2000:]
        time.sleep(0.0005)


def last_logged_step(job: Job) -> int:
    return max((int(n) for n in re.findall(r"(?m)^step=(\d+) epoch=\S+ loss=", job.text())), default=0)


# when -> (what the run does, when the signal comes)
PHASES = {
    "training": ({}, lambda job, output: wait_for(job, "step=5 ")),
    "a save": ({"save_steps": 1}, wait_for_save),
    "evaluation while training": (
        {"eval_strategy": "steps", "eval_steps": 4},
        lambda job, output: wait_for(job, "step=4 epoch=\\S+ loss"),
    ),
    "the final evaluation": ({"do_eval": True}, lambda job, output: wait_for(job, f"step={STEPS} ")),
    "prediction": ({"do_predict": True}, lambda job, output: wait_for(job, f"step={STEPS} ")),
}


def stopped(server, args, folder: Path, moment: Callable[[Job, Path], None], delay: float, **environment: str) -> Job:
    """A run that SIGTERM ends with 143 within seconds; it is started again if it has finished before the signal."""
    for _ in range(ATTEMPTS):
        job = server.start(argv_of(args), folder, **environment)
        moment(job, Path(args.output_dir))
        time.sleep(delay)
        job.kill(signal.SIGTERM)
        sent = time.monotonic()
        code = job.wait()
        assert "Traceback" not in job.text()
        if code:
            break
        shutil.rmtree(args.output_dir)
    assert code == 143, job.text()[-2000:]
    assert time.monotonic() - sent < 30
    return job


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Enough to evaluate and predict that a signal comes in the middle."""
    return make_data(tmp_path_factory.mktemp("data"), train=60, validation=1000, test=1000)


@pytest.mark.parametrize("trials", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in(server, tmp_path, data, report, phase, trials):
    flags, moment = PHASES[phase]
    model = make_model(tmp_path / "model", dropout=0.1)
    args = arguments(
        tmp_path, model_name_or_path=str(model), max_steps=STEPS, num_train_epochs=9.0, save_strategy="steps",
        **{"save_steps": 5, **flags, **data},
    )  # fmt: skip
    whole = changed(args, output_dir=str(tmp_path / "whole"))
    assert server.start(argv_of(whole), tmp_path).wait() == 0
    draw = random.Random(phase)
    ages = []
    for at in range(trials):
        output = tmp_path / f"run-{at}"
        here = changed(args, output_dir=str(output))
        job = stopped(server, here, tmp_path, moment, draw.uniform(0, 0.02))
        newest, rejected = checkpoint.newest_sound(output)
        ages.append(last_logged_step(job) - checkpoint.step_of(newest))
        assert ages[-1] <= 1 and rejected == []
        again = server.start(argv_of(changed(here, resume_from_checkpoint="auto")), tmp_path)
        assert again.wait() == 0, again.text()[-2000:]
        assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
        steps = [
            [entry["step"] for entry in results_of(each, "trainer_state.json")["log_history"]] for each in (here, whole)
        ]
        assert steps[0] == steps[1]
    report(
        f"{trials} signals in {phase}: exit 143, checkpoint {max(ages)} steps old at most, same weights after resume"
    )


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1], ids=lambda number: number.name)
def test_other_signals_save_as_well(server, tmp_path, number):
    args = arguments(tmp_path, max_steps=400, num_train_epochs=99.0)
    job = server.start(argv_of(args), tmp_path)
    wait_for(job, "step=5 ")
    job.kill(number)
    assert job.wait() == 128 + number
    newest, rejected = checkpoint.newest_sound(tmp_path / "out")
    assert last_logged_step(job) - checkpoint.step_of(newest) <= 1 and rejected == []


@pytest.mark.parametrize("ranks", [2])
def test_a_signal_to_one_rank_stops_all_of_them(server, tmp_path, data, ranks):
    args = arguments(
        tmp_path, max_steps=STEPS, num_train_epochs=9.0, eval_strategy="steps", eval_steps=4,
        per_device_train_batch_size=4, **data,
    )  # fmt: skip
    jobs = server.start_ranks(argv_of(args), tmp_path, ranks)
    wait_for(jobs[0], "step=4 epoch=\\S+ loss")
    jobs[1].kill(signal.SIGTERM)  # the other rank learns it from this one
    assert [job.wait() for job in jobs] == [143, 143], jobs[1].text()[-2000:]
    newest, rejected = checkpoint.newest_sound(tmp_path / "out")
    assert last_logged_step(jobs[0]) - checkpoint.step_of(newest) <= 1 and rejected == []


@pytest.mark.parametrize("moment", ["data: ", "train: "])
def test_a_signal_before_training_ends_at_once(server, tmp_path, moment):
    """While data are read or tokenized there is nothing to save; what was half cached is not left behind."""
    many = make_data(tmp_path / "data", train=6000, validation=2000, test=10)
    args = arguments(tmp_path, max_steps=2, do_eval=True, do_predict=True, **many)
    for attempt in range(ATTEMPTS):
        cache = str(tmp_path / f"cache-{attempt}")
        job = stopped(server, args, tmp_path, lambda job, output: wait_for(job, moment), 0.0, BERT_GLUE_CACHE=cache)
        if "step=" not in job.text():
            break
        shutil.rmtree(args.output_dir)
    assert "step=" not in job.text()
    assert not list(Path(cache).rglob(".making-*"))
    assert not checkpoint.list_checkpoints(tmp_path / "out")
    assert server.start(argv_of(args), tmp_path, BERT_GLUE_CACHE=cache).wait() == 0


def test_a_checkpoint_from_before_is_still_there(server, tmp_path):
    args = arguments(tmp_path, max_steps=4, num_train_epochs=3.0, save_strategy="steps", save_steps=2)
    assert server.start(argv_of(args), tmp_path).wait() == 0
    before = last_state(tmp_path / "out")
    again = changed(args, resume_from_checkpoint="auto", max_steps=400)
    job = server.start(argv_of(again), tmp_path)
    wait_for(job, "device: ")
    job.kill(signal.SIGTERM)
    assert job.wait() == 143
    if "step=" not in job.text():  # else training had begun, and what it saved is newer
        assert last_state(tmp_path / "out") == before
    assert checkpoint.verify(tmp_path / "out" / "checkpoint-4") == ""
