"""What a resumed run must repeat, shared by the tests of every way to train."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_run import arguments, changed, fit, make_model

from bert_glue.config.arguments import Arguments
from bert_glue.training.console import ConsoleLog, StopSignals
from bert_glue.training.resume import whole_weights
from bert_glue.training.state import TrainState


def weights(run) -> dict[str, torch.Tensor]:
    return whole_weights(run)


def assert_close(ours: dict, theirs: dict, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= tolerance


def check_resume(tmp_path: Path, settings: dict) -> None:
    model = str(make_model(tmp_path / "noisy", dropout=0.3))
    batch = 2 if "gradient_accumulation_steps" in settings else 8
    args = arguments(
        tmp_path, model_name_or_path=model, per_device_train_batch_size=batch, weight_decay=0.1, max_steps=11,
        save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=5, **settings,
    )  # fmt: skip
    whole = fit(args)
    assert whole.data.sampler.steps_per_epoch in (4, 5)  # step 6 is in mid-epoch
    half = changed(
        args, output_dir=str(tmp_path / "half"), resume_from_checkpoint=str(whole.output_dir / "checkpoint-6")
    )
    torch.manual_seed(123456)  # the state of the generators comes from the checkpoint, not from here
    resumed = fit(half)
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = (run.output_dir / "checkpoint-9" / name for run in (whole, resumed))
        assert one.read_bytes() == two.read_bytes(), name
    final, again = weights(whole), weights(resumed)
    assert all(torch.equal(final[name], again[name]) for name in final)
    for number, state in whole.learner.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            other = resumed.learner.optimizer.state_dict()["state"][number][name]
            assert torch.equal(torch.as_tensor(value).float(), torch.as_tensor(other).float()), name
    timeless = [
        [{k: v for k, v in entry.items() if "runtime" not in k and "second" not in k} for entry in run.progress.history]
        for run in (whole, resumed)
    ]
    assert timeless[0] == timeless[1]
    assert whole.progress.loss_sum == resumed.progress.loss_sum
    assert resumed.progress.samples == whole.progress.samples


class StopsAt(ConsoleLog):
    """Asks for an end after some steps, as a signal does."""

    def __init__(self, step: int):
        super().__init__(False, False)
        self.signals, self.last = StopSignals(is_watching=False), step

    def advance(self, step: int, total: int, epoch: float) -> None:
        if step == self.last - 1:
            self.signals.number = 15


def fit_until(args: Arguments, step: int) -> TrainState:
    """A run that a signal stops in the step with this number."""
    stops = StopsAt(step)
    return fit(args, stops, stops.signals)
