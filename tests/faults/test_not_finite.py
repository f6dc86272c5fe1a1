"""NaN or Inf in the loss, a gradient or the weights: no update with it, exit code 5, no poisoned checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import argv_of
from safetensors.torch import load_file
from tiny_run import arguments, bert_tensors, changed, fit, make_model

from bert_glue.errors import DivergedError
from bert_glue.storage import checkpoint
from bert_glue.training import loop, losses

LEVELS = {
    "O0": {},
    "O1": {"bf16": True},
    "O2": {"bf16": True, "fp16_opt_level": "O2"},
    "O3": {"bf16": True, "fp16_opt_level": "O3"},
    "accumulated": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "unfused": {"optim": "adamw_torch"},
    "lamb": {"optim": "lamb"},
}
BAD_STEP = 3


class Poison(torch.autograd.Function):
    """Passes a loss on and gives a gradient that is not finite."""

    @staticmethod
    def forward(context, loss: torch.Tensor, value: float) -> torch.Tensor:
        context.value = value
        return loss.clone()

    @staticmethod
    def backward(context, gradient: torch.Tensor):
        return gradient * context.value, None


KINDS = {
    "loss NaN": lambda loss: loss * float("nan"),
    "loss Inf, gradient finite": lambda loss: loss + float("inf"),
    "loss -Inf, gradient finite": lambda loss: loss - float("inf"),
    "gradient NaN": lambda loss: Poison.apply(loss, float("nan")),
    "gradient Inf": lambda loss: Poison.apply(loss, float("inf")),
}


def everything_is_finite(output: Path) -> bool:
    """Every tensor of every file that a run left."""
    files = list(output.rglob("*.safetensors"))
    assert files
    return all(torch.isfinite(value.float()).all() for file in files for value in load_file(file).values())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_step_changes_no_weight_and_no_checkpoint(tmp_path, monkeypatch, level, kind):
    """The last checkpoint is that of the step before; what the run holds is that too."""
    args = arguments(
        tmp_path, max_steps=6, num_train_epochs=3.0, save_strategy="steps", save_steps=1, logging_steps=500,
        **LEVELS[level],
    )  # fmt: skip
    original, passes = losses.sample_losses, [0]

    def poisoned(*parts) -> torch.Tensor:
        passes[0] += 1
        loss = original(*parts)
        return KINDS[kind](loss) if passes[0] == (BAD_STEP - 1) * args.gradient_accumulation_steps + 1 else loss

    monkeypatch.setattr(losses, "sample_losses", poisoned)
    with pytest.raises(DivergedError, match="not finite") as caught:
        fit(args)
    assert caught.value.exit_code == 5
    newest, rejected = checkpoint.newest_sound(tmp_path / "out")
    assert newest.name == f"checkpoint-{BAD_STEP - 1}" and rejected == []
    assert everything_is_finite(tmp_path / "out")


def test_the_update_is_not_made_even_where_nobody_looks_for_long(tmp_path, monkeypatch):
    """Nothing is logged or saved until the end: the weights then are those before the bad step."""
    held = {}
    args = arguments(tmp_path, max_steps=6, num_train_epochs=3.0, logging_steps=500)
    good = fit(changed(args, lr_scheduler_type="constant", max_steps=BAD_STEP - 1, output_dir=str(tmp_path / "good")))
    original, train, passes = losses.sample_losses, loop.train, [0]

    def poisoned(*parts) -> torch.Tensor:
        passes[0] += 1
        return original(*parts) * (float("nan") if passes[0] == BAD_STEP else 1.0)

    def keep(run, *rest) -> None:
        held["run"] = run
        train(run, *rest)

    monkeypatch.setattr(losses, "sample_losses", poisoned)
    monkeypatch.setattr("bert_glue.training.setup.train", keep)
    with pytest.raises(DivergedError):
        fit(changed(args, lr_scheduler_type="constant"))
    for ours, theirs in zip(held["run"].learner.precision.masters, good.learner.precision.masters, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["bert.pooler.dense.bias", "bert.embeddings.word_embeddings.weight"])
def test_weights_that_come_in_so_are_refused(server, tmp_path, value, where):
    """Also in a row of the table that no text reads: it would be saved again."""
    bad = bert_tensors()[where]
    bad.flat[-1] = value
    model = make_model(tmp_path / "bad", changes={where: bad})
    args = arguments(tmp_path, model_name_or_path=str(model), max_steps=2, save_strategy="steps", save_steps=1)
    job = server.start(argv_of(args), tmp_path)
    assert job.wait() == 5, job.text()
    assert f"the weights {where} are not finite" in job.text() and "Traceback" not in job.text()
    assert not list((tmp_path / "out").rglob("*.safetensors"))
