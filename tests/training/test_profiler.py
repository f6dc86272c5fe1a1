"""--profile_steps: which steps are in the trace, that it loads, and that samples/s does without them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_run import arguments, changed, fit, results_of

from bert_glue.config.parser import parse
from bert_glue.devices.device import Device
from bert_glue.errors import CheckpointError, DivergedError, UsageError
from bert_glue.pipeline import run as pipeline
from bert_glue.storage import checkpoint

BASE = ["--model_name_or_path", "m", "--task_name", "mrpc", "--output_dir", "out", "--do_train"]


def traced_steps(folder: Path, rank: int = 0) -> list[int]:
    """Steps marked in a trace, in the order of time."""
    trace = json.loads((folder / f"trace-{rank}.json").read_text())
    marks = [e for e in trace["traceEvents"] if e.get("name", "").startswith("optimizer step ") and e.get("ph") == "X"]
    return [int(mark["name"].split()[-1]) for mark in sorted(marks, key=lambda mark: mark["ts"])]


@pytest.mark.parametrize(
    ("steps", "expected"), [("3:5", [3, 4, 5]), ("1:1", [1]), ("7:20", [7, 8])], ids=lambda value: str(value)
)
def test_the_trace_holds_the_steps_asked_for_and_what_they_did(tmp_path, steps, expected):
    run = fit(arguments(tmp_path, profile_steps=steps, max_steps=8))
    assert traced_steps(run.output_dir) == expected
    names = {e.get("name", "") for e in json.loads((run.output_dir / "trace-0.json").read_text())["traceEvents"]}
    assert any("addmm" in name for name in names) and any("Backward" in name for name in names)
    assert run.observers.meter.steps == 8 and run.observers.meter.timed_steps == 8 - len(expected)


def test_samples_a_second_leave_traced_steps_out(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(pipeline.ConsoleLog, "line", lambda self, text: lines.append(text))
    args = arguments(tmp_path, profile_steps="2:3", max_steps=8, skip_steps=1)
    assert pipeline.run(args) == 0
    results = results_of(args)
    assert results["train_timed_steps"] == 5 and results["train_samples_consumed"] == 8 + 8 + 8 + 5 + 8 + 8 + 8 + 5
    timed = results["train_samples_per_second"] * results["train_timed_seconds"]
    assert timed == pytest.approx(5 + 8 + 8 + 8 + 5)  # steps 4 to 8
    (said,) = [line for line in lines if line.startswith("trace:")]
    assert re.match(r"trace: optimizer steps 2 to 3 in .*trace-0.json, left out of samples/s", said)


def test_training_is_the_same_and_nothing_is_written_without_the_flag(tmp_path):
    traced = fit(arguments(tmp_path, profile_steps="2:4", max_steps=6, eval_strategy="steps", eval_steps=3))
    plain = fit(arguments(tmp_path, max_steps=6, output_dir=str(tmp_path / "plain")))
    losses = [[e["loss"] for e in run.progress.history if "loss" in e] for run in (traced, plain)]
    assert losses[0] == losses[1]
    assert not list(plain.output_dir.glob("trace*"))


def test_a_resumed_run_traces_what_is_left(tmp_path):
    args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=3)
    fit(args)
    at = str(tmp_path / "out" / "checkpoint-3")
    resumed = fit(changed(args, resume_from_checkpoint=at, profile_steps="2:5", output_dir=str(tmp_path / "again")))
    assert traced_steps(resumed.output_dir) == [4, 5]
    with pytest.raises(UsageError, match="--profile_steps 1:3: this run goes from step 4 to 6"):
        fit(changed(args, resume_from_checkpoint=at, profile_steps="1:3", output_dir=str(tmp_path / "third")))


def test_a_run_that_is_too_short_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--profile_steps 9:12: this run goes from step 1 to 8") as caught:
        fit(arguments(tmp_path, profile_steps="9:12"))
    assert caught.value.exit_code == 2


def test_what_was_traced_before_a_failure_is_there(tmp_path):
    with pytest.raises(DivergedError):
        fit(arguments(tmp_path, learning_rate=1e30, profile_steps="1:5", max_steps=6, logging_steps=3))
    assert traced_steps(tmp_path / "out") == [1, 2, 3]


def test_a_trace_that_cannot_be_written_is_exit_code_6(tmp_path, monkeypatch):
    class Silent:
        """The profiler of torch_npu only warns if it cannot write."""

        def start(self): ...
        def stop(self): ...
        def export_chrome_trace(self, path): ...

    monkeypatch.setattr(Device, "profiler", lambda self: Silent())
    with pytest.raises(CheckpointError, match="did not write"):
        fit(arguments(tmp_path, profile_steps="1:2", max_steps=3))

    class Full(Silent):
        def export_chrome_trace(self, path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Device, "profiler", lambda self: Full())
    with pytest.raises(CheckpointError, match="No space left"):
        fit(arguments(tmp_path, profile_steps="1:2", max_steps=3, output_dir=str(tmp_path / "full")))
    assert checkpoint.list_checkpoints(tmp_path / "full") == []


@pytest.mark.parametrize("value", ["10", "5:3", "0:4", "a:b", "-1:3", "1:2:3", "1.5:2"])
def test_a_bad_value_is_one_line(value):
    with pytest.raises(UsageError) as caught:
        parse([*BASE, f"--profile_steps={value}"])
    (line,) = str(caught.value).splitlines()
    assert line.startswith("--profile_steps") and "such as 10:15" in line


def test_values_that_cannot_go_together():
    with pytest.raises(UsageError, match="--profile_steps 10:15: --max_steps 9 ends the run before that"):
        parse([*BASE, "--profile_steps", "10:15", "--max_steps", "9"])
    with pytest.raises(UsageError, match="--profile_steps needs --do_train"):
        parse([*BASE[:-1], "--do_eval", "--profile_steps", "10:15"])
    assert parse([*BASE, "--profile_steps", "10:15"]).profile_steps == "10:15"
