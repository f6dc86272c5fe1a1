"""Checkpoints written by a thread: what training waits for, where an error shows, what a resume may change."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import arguments, changed, fit, losses

from bert_glue.errors import CheckpointError, DivergedError
from bert_glue.evaluation import evaluator as evaluation_evaluator
from bert_glue.storage import checkpoint, files
from bert_glue.storage.checkpoint import Saver
from bert_glue.training import losses as training_losses
from bert_glue.training.console import ConsoleLog, StopSignals
from bert_glue.training.resume import whole_weights


def slowly(monkeypatch, seconds: float) -> list[float]:
    """Each checkpoint takes `seconds` to write; returns when each was begun."""
    publish, begun = checkpoint.publish, []

    def slow(*arguments) -> None:
        begun.append(time.perf_counter())
        time.sleep(seconds)
        publish(*arguments)

    monkeypatch.setattr(checkpoint, "publish", slow)
    return begun


class Steps(ConsoleLog):
    """Tells when a step was reached."""

    def __init__(self, awaited: int = 0) -> None:
        super().__init__(False, False)
        self.awaited, self.reached, self.last = awaited, threading.Event(), 0

    def advance(self, step: int, total: int, epoch: float) -> None:
        self.last = step
        if step == self.awaited:
            self.reached.set()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The first checkpoint is not written before step 4 is done; two are never written at once."""
    publish, steps, at_once, most = checkpoint.publish, Steps(4), [], []

    def held(*parts) -> None:
        at_once.append(1)
        most.append(len(at_once))
        assert steps.reached.wait(60), "training waits for the checkpoint of step 2"
        publish(*parts)
        at_once.pop()

    monkeypatch.setattr(checkpoint, "publish", held)
    args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=2, num_train_epochs=3.0)
    run = fit(args, steps)
    assert most == [1, 1, 1]
    assert [checkpoint.verify(folder) for folder in checkpoint.list_checkpoints(run.output_dir)] == [""] * 3


@pytest.mark.parametrize("padding", ["packed", "longest"])
@pytest.mark.parametrize("precision", [{}, {"bf16": True, "fp16_opt_level": "O2"}])
def test_what_is_written_late_is_the_step_it_is_named_for(tmp_path, monkeypatch, padding, precision):
    """The copy is apart from the model, which has learned on when it is written."""
    settings = {"padding": padding, "save_strategy": "steps", "save_steps": 2, **precision}
    exact = fit(
        arguments(tmp_path, output_dir=str(tmp_path / "short"), max_steps=2, lr_scheduler_type="constant", **settings)
    )
    slowly(monkeypatch, 0.3)
    run = fit(arguments(tmp_path, max_steps=5, lr_scheduler_type="constant", **settings))
    for name in ("model", "optimizer"):
        late, soon = (load_file(r.output_dir / "checkpoint-2" / f"{name}.safetensors") for r in (run, exact))
        assert late.keys() == soon.keys() and all(torch.equal(late[key], soon[key]) for key in soon)
    assert not torch.equal(*(next(iter(whole_weights(r).values())) for r in (run, exact)))


def test_an_error_of_the_thread_ends_the_run_by_the_next_step(tmp_path, monkeypatch):
    def full(*arguments) -> None:
        raise CheckpointError("checkpoint-2 cannot be written: No space left on device")

    monkeypatch.setattr(checkpoint, "publish", full)
    steps = Steps()
    with pytest.raises(CheckpointError, match="No space left"):
        fit(arguments(tmp_path, num_train_epochs=9.0, save_strategy="steps", save_steps=2), steps)
    assert steps.last <= 4


def test_an_error_in_the_last_one_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "publish", lambda *arguments: (_ for _ in ()).throw(CheckpointError("full")))
    with pytest.raises(CheckpointError, match="full"):
        fit(arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2))


def test_a_sound_checkpoint_is_finished_though_the_run_diverges(tmp_path, monkeypatch):
    slowly(monkeypatch, 0.5)
    original = training_losses.sample_losses
    calls = []

    def bad(*arguments):
        calls.append(1)
        return original(*arguments) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(training_losses, "sample_losses", bad)
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    with pytest.raises(DivergedError):
        fit(args)
    folder, rejected = checkpoint.newest_sound(tmp_path / "out")
    assert folder.name == "checkpoint-2" and rejected == []


def test_both_errors_are_told():
    saver = Saver()

    def fail() -> None:
        raise CheckpointError("the disk is full")

    with pytest.raises(DivergedError, match="loss is nan\nthe disk is full"), saver:
        saver.start(fail)
        raise DivergedError("loss is nan")


def test_a_second_signal_does_not_wait():
    saver, go = Saver(), threading.Event()
    began = time.perf_counter()
    with pytest.raises(SystemExit), saver:
        saver.start(lambda: go.wait(10))
        raise SystemExit(143)
    assert time.perf_counter() - began < 5
    go.set()


# ---- what a resume may change ----


class Lines(ConsoleLog):
    """Keeps its lines."""

    def __init__(self) -> None:
        super().__init__(False, False)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Settings of a run that saved after its third step of four."""
    args = arguments(
        tmp_path_factory.mktemp("saved"), max_steps=4, save_strategy="steps", save_steps=3, save_total_limit=9
    )
    return args, fit(args)


def resumed(saved, tmp_path, **changes):
    args, _ = saved
    log = Lines()
    folder = f"{args.output_dir}/checkpoint-3"
    run = fit(changed(args, resume_from_checkpoint=folder, output_dir=str(tmp_path / "out"), **changes), log)
    return run, [line for line in log.lines if line.startswith("note:")]


def test_an_unchanged_resume_says_nothing(saved, tmp_path):
    run, notes = resumed(saved, tmp_path)
    assert notes == [] and run.progress.changes == []
    assert losses(run) == losses(saved[1])


# The keys that versions up to 0.1 stored, by those of today.
FORMER = {
    "same": {
        "model_shapes": "model",
        "optimizer": "optimizer",
        "amp_backend": "--amp_backend",
        "layerwise_lr_decay": "--layerwise_lr_decay",
        "training_rows": "training rows",
        "samples_per_step": "samples a step (batch size x ranks x --gradient_accumulation_steps)",
        "seed": "--seed",
        "order_seed": "seed of the order",
        "epoch_multiple_of": "samples an epoch is cut to a multiple of (--dataloader_drop_last)",
        "is_grouped_by_length": "grouping by length",
        "words_sha256": "data (words in use; --do_eval, --do_predict and --max_*_samples count)",
    },
    "settings": {"total_steps": "steps in all", "world_size": "ranks", "precision": "precision", "device": "device"},
}


def with_former_keys(folder: Path) -> None:
    """Make a checkpoint what an earlier version would have written."""
    file = folder / "trainer_state.json"
    state = json.loads(file.read_text())
    for part, names in FORMER.items():
        state[part] = {names.get(key, f"--{key}"): value for key, value in state[part].items()}
    file.write_text(json.dumps(state))
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": files.file_hash(file)}
    text = checkpoint._manifest_text(manifest["files"], manifest["written"])
    (folder / checkpoint.MANIFEST).write_text(text)


def test_a_checkpoint_of_an_earlier_version_resumes_and_is_compared(saved, tmp_path):
    args, _ = saved
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(Path(args.output_dir) / "checkpoint-3", folder)
    with_former_keys(folder)
    back = changed(args, resume_from_checkpoint=str(folder), output_dir=str(tmp_path / "out"))
    assert losses(fit(back)) == losses(saved[1])
    log = Lines()
    fit(changed(back, learning_rate=1e-3), log)
    assert any("--learning_rate 0.001 (was 0.005)" in line for line in log.lines)
    with pytest.raises(CheckpointError, match=r"another seed of the order \(--data_seed\) \(.*, now 7\)"):
        fit(changed(back, data_seed=7))


def test_changed_settings_are_said_in_one_line_and_kept(saved, tmp_path):
    run, notes = resumed(saved, tmp_path, learning_rate=1e-3, max_steps=6, save_steps=5)
    said = "--learning_rate 0.001 (was 0.005), steps in all 6 (was 4)"
    assert notes == [f"note: resumed with other settings, so not bit for bit: {said}"]
    state = json.loads((tmp_path / "out" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["changes"] == run.progress.changes == [f"after step 3: {said}"]


def test_another_precision_starts_its_own_loss_scale(saved, tmp_path):
    run, notes = resumed(saved, tmp_path, bf16=True, fp16_opt_level="O2")
    assert "precision O2 bf16 (was O0 fp32)" in "\n".join(notes)
    assert run.progress.step == 4


def test_the_same_rows_in_more_passes_are_the_same_steps(saved, tmp_path):
    """As when a job comes back with half the ranks: 8 rows a step are 2 passes of 4."""
    run, notes = resumed(saved, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert "--per_device_train_batch_size 4 (was 8), --gradient_accumulation_steps 2 (was 1)" in notes[0]
    assert losses(run) == pytest.approx(losses(saved[1]), rel=1e-5)


def test_another_number_of_rows_a_step_is_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"samples a step .* \(8, now 4\)|samples a step"):
        resumed(saved, tmp_path, per_device_train_batch_size=4)


# ---- evaluations that a signal cuts off ----


class Stopping(StopSignals):
    """Asks to stop from the nth call on."""

    def __init__(self, after: int) -> None:
        super().__init__(is_watching=False)
        self.left = after

    def is_requested(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("after", range(1, 24, 2))
def test_a_run_stopped_anywhere_and_resumed_is_the_undisturbed_one(tmp_path, monkeypatch, after):
    """Before, during and after steps and evaluations; each batch of an evaluation checks for a signal too."""
    settings = {
        "max_steps": 6, "num_train_epochs": 3.0, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps",
        "save_steps": 2, "load_best_model_at_end": True, "per_device_eval_batch_size": 4,
        "early_stopping_patience": 9,
    }  # fmt: skip
    whole = fit(arguments(tmp_path, output_dir=str(tmp_path / "whole"), **settings))
    args = arguments(tmp_path, **settings)
    # pipeline/run.py hands the signals' question to the evaluator; here it is asked for the same way.
    signals = Stopping(after)
    evaluator = evaluation_evaluator.Evaluator
    monkeypatch.setattr(
        "tiny_run.Evaluator", lambda *parts: evaluator(*parts, stop_requested=signals.is_requested)
    )  # fmt: skip
    stopped = fit(args, signals=signals)
    monkeypatch.undo()
    newest, _ = checkpoint.newest_sound(tmp_path / "out")
    assert checkpoint.step_of(newest) == stopped.progress.step
    again = fit(changed(args, resume_from_checkpoint="auto"))
    assert [e["step"] for e in again.progress.history] == [e["step"] for e in whole.progress.history]
    assert losses(again) == losses(whole)
    assert (again.progress.best_metric, again.progress.best_step) == (
        whole.progress.best_metric,
        whole.progress.best_step,
    )
    for name, value in whole_weights(whole).items():
        assert torch.equal(whole_weights(again)[name], value)


def test_a_run_that_stopped_early_does_not_go_on_when_resumed(tmp_path, monkeypatch):
    args = arguments(
        tmp_path, max_steps=8, num_train_epochs=9.0, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, early_stopping_patience=1, learning_rate=0.0,
    )  # fmt: skip
    first = fit(args)
    assert first.progress.step == 4
    again = fit(changed(args, resume_from_checkpoint="auto"))
    assert again.progress.step == 4 and again.progress.history == first.progress.history
