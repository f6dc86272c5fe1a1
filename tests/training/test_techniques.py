"""Layer-wise rates, new layers, averaged weights, R-Drop, FGM: their mathematics, ranks, resume and refusals."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import LAYERS, arguments, fit, losses, make_model, results_of, run_on_two_ranks

from bert_glue.config.parser import parse
from bert_glue.errors import UsageError
from bert_glue.pipeline.run import run
from bert_glue.tasks import TASKS
from bert_glue.training import losses as training_losses
from bert_glue.training.losses import EmbeddingShift, disagreement
from bert_glue.training.optim import rate_factors

TECHNIQUES = {
    "layerwise_lr_decay": {"layerwise_lr_decay": 0.5, "weight_decay": 0.1},
    "ema_decay": {"ema_decay": 0.9, "weight_decay": 0.1},
    "rdrop_alpha": {"rdrop_alpha": 1.0},
    "fgm_epsilon": {"fgm_epsilon": 0.5},
    "all": {"layerwise_lr_decay": 0.7, "ema_decay": 0.9, "fgm_epsilon": 0.5, "reinit_layers": 1},
}
BF16 = {"bf16": True, "fp16_opt_level": "O2"}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def wide(folder: Path, dropout: float = 0.1) -> str:
    return str(make_model(folder / f"model-{dropout}", dropout=dropout))


def masters(run_of) -> list[torch.Tensor]:
    return [master.clone() for master in run_of.learner.precision.masters]


# Layer-wise learning rates


def test_rates_fall_from_the_head_to_the_embeddings() -> None:
    names = ["words.weight", "types.weight", "embedding_norm.bias", "layers.0.qkv.weight", "layers.1.qkv.bias"]
    names += ["head_dense.weight", "head_output.bias"]
    assert list(rate_factors(names, 0.5, False).values()) == [0.25, 0.25, 0.25, 0.5, 1.0, 1.0, 1.0]
    stock = ["stock.bert.embeddings.word_embeddings.weight", "stock.bert.encoder.layer.11.output.dense.weight"]
    stock += [
        "stock.bert.encoder.layer.10.output.dense.weight",
        "stock.bert.pooler.dense.weight",
        "stock.classifier.bias",
    ]
    assert list(rate_factors(stock, 0.9, False).values()) == pytest.approx([0.9**12, 1.0, 0.9, 1.0, 1.0])
    assert set(rate_factors(names, 1.0, True).values()) == {1.0}
    with pytest.raises(UsageError, match=r"--layerwise_lr_decay 0\.5"):
        rate_factors(names, 0.5, True)
    with pytest.raises(UsageError, match="have no numbers"):
        rate_factors(["a.weight"], 0.5, False)


@pytest.mark.parametrize("optim", ["adamw_torch", "lamb"])
@pytest.mark.parametrize("padding", ["auto", "longest"])
def test_the_first_step_moves_each_layer_by_its_rate(tmp_path: Path, optim: str, padding: str) -> None:
    """Adam's first step is the rate, whatever the gradient is; LAMB's is in proportion to it."""
    settings = {
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "optim": optim,
        "padding": padding,
        "lr_scheduler_type": "constant",
    }
    moved = {}
    for decay in (1.0, 0.5):
        before = fit(
            arguments(tmp_path, **settings, layerwise_lr_decay=decay, learning_rate=0.0)
        ).learner.model.tensors()
        after = fit(
            arguments(tmp_path, **settings, layerwise_lr_decay=decay, learning_rate=1e-3)
        ).learner.model.tensors()
        moved[decay] = {name: (after[name] - before[name]).norm() for name in before}
    factors = {
        "bert.encoder.layer.1.": 1.0,
        "bert.encoder.layer.0.": 0.5,
        "bert.embeddings.": 0.5**LAYERS,
        "classifier": 1.0,
    }
    for name, factor in itertools.product(moved[1.0], factors):
        if name.startswith(factor) and moved[1.0][name] > 0:
            assert moved[0.5][name] / moved[1.0][name] == pytest.approx(factors[factor], rel=2e-2), name


def test_unused_rows_decay_at_the_rate_of_the_embeddings(tmp_path: Path) -> None:
    args = arguments(tmp_path, layerwise_lr_decay=0.5, weight_decay=0.5, max_steps=3, lr_scheduler_type="constant")
    run_of = fit(args)
    assert run_of.learner.narrowed.decay == pytest.approx((1 - 0.25 * 5e-3 * 0.5) ** 3)


# New layers


def test_top_layers_and_pooler_start_anew_and_nothing_else(tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=0.0, max_steps=1)
    plain, fresh = fit(args), fit(replace(args, reinit_layers=1))
    old, new = plain.learner.model.tensors(), fresh.learner.model.tensors()
    other = {name for name in old if not torch.equal(old[name], new[name]) and "classifier" not in name}
    assert other == {
        n for n in old if ("layer.1." in n or "pooler" in n) and n.endswith("weight") and "LayerNorm" not in n
    }
    assert 0.01 < new["bert.encoder.layer.1.output.dense.weight"].std() < 0.03
    assert any("layers 2 to 2 are initialised at random" in note for note in fresh.learner.model.notes)
    with pytest.raises(UsageError, match="--reinit_layers 3: the model has 2 layers"):
        fit(replace(args, reinit_layers=3))


# Averaged weights


def test_the_average_is_the_recurrence_and_is_what_is_saved(tmp_path: Path) -> None:
    args = arguments(tmp_path, ema_decay=0.8, max_steps=12, save_strategy="steps", save_steps=1, do_eval=True)
    assert run(args) == 0
    out = Path(args.output_dir)
    steps = [load_file(out / f"checkpoint-{n}/optimizer.safetensors") for n in range(1, 13)]
    start = fit(replace(args, max_steps=1, learning_rate=0.0, ema_decay=0.0, save_strategy="no", do_eval=False))
    for number, average in enumerate(masters(start)):
        for updates, state in enumerate(steps, 1):
            decay = min(0.8, (1 + updates) / (10 + updates))
            average = decay * average + (1 - decay) * state[f"parameters.{number}"]
            torch.testing.assert_close(state[f"average.{number}"], average)
    saved, last = weights_of(out), weights_of(out / "checkpoint-12")
    assert all(torch.equal(saved[name], last[name]) for name in saved)
    raw = fit(replace(args, ema_decay=0.0, save_strategy="no", do_eval=False)).learner.model.tensors()
    key = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(saved[key], raw[key])
    again = replace(args, do_train=False, model_name_or_path=str(out), output_dir=str(tmp_path / "eval"), ema_decay=0.0)
    assert run(again) == 0
    assert results_of(again)["eval_loss"] == pytest.approx(results_of(args)["eval_loss"], rel=1e-5)


def test_an_average_does_not_change_training(tmp_path: Path) -> None:
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2, do_eval=True, **BF16)
    plain, averaged = fit(args), fit(replace(args, ema_decay=0.9))
    assert losses(plain) == losses(averaged)
    assert all(map(torch.equal, masters(plain), masters(averaged)))
    scores = [[e["eval_loss"] for e in r.progress.history if "eval_loss" in e] for r in (plain, averaged)]
    assert scores[0] != scores[1]


def test_the_best_checkpoint_brings_its_own_average(tmp_path: Path) -> None:
    args = arguments(
        tmp_path, ema_decay=0.5, eval_strategy="epoch", save_strategy="epoch", do_eval=True, num_train_epochs=4.0,
        load_best_model_at_end=True, metric_for_best_model="loss", learning_rate=2e-2,
    )  # fmt: skip
    run_of = fit(args)
    best = load_file(Path(args.output_dir) / f"checkpoint-{run_of.progress.best_step}/optimizer.safetensors")
    with run_of.learner.averaged():
        assert all(torch.equal(m, best[f"average.{n}"]) for n, m in enumerate(run_of.learner.precision.masters))
    assert all(torch.equal(m, best[f"parameters.{n}"]) for n, m in enumerate(run_of.learner.precision.masters))


# R-Drop


def test_disagreement_is_the_mean_of_both_divergences() -> None:
    generator = torch.Generator().manual_seed(1)
    one, other = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    p, q = one.softmax(1), other.softmax(1)
    wanted = 0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum())
    assert disagreement(TASKS["mnli"], one, other) == pytest.approx(wanted.item(), rel=1e-5)
    assert disagreement(TASKS["mnli"], one, one) == 0
    assert disagreement(TASKS["stsb"], one[:, :1], other[:, :1]) == pytest.approx(
        ((one - other)[:, 0] ** 2).sum().item()
    )


def test_rdrop_without_dropout_is_the_plain_run(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    said: list[str] = []
    plain, twice = fit(args), fit(replace(args, rdrop_alpha=3.0))
    assert losses(twice) == pytest.approx(losses(plain), rel=1e-6)
    assert not said


def test_rdrop_sees_two_masks_and_its_loss_is_as_written(tmp_path: Path, monkeypatch) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = training_losses.disagreement
    monkeypatch.setattr(training_losses, "disagreement", lambda *a: seen.append(a[1:]) or original(*a))
    run_of = fit(arguments(tmp_path, model_name_or_path=wide(tmp_path), rdrop_alpha=1.0, max_steps=2))
    assert len(seen) == 2 and all(not torch.equal(*pair) for pair in seen)
    assert run_of.progress.forward_passes == 2


# FGM


def test_each_row_is_moved_along_its_gradient_by_epsilon(tmp_path: Path, monkeypatch) -> None:
    moves = []
    original = EmbeddingShift.against

    def watched(self, batch):
        gradient = self.output.grad.clone()
        found = original(self, batch)
        moves.append((gradient, self.move.clone(), batch))
        return found

    monkeypatch.setattr(EmbeddingShift, "against", watched)
    packed = fit(arguments(tmp_path, fgm_epsilon=0.3, max_steps=2))
    padded = fit(arguments(tmp_path, fgm_epsilon=0.3, max_steps=2, padding="longest"))
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-4)
    gradient, move, batch = moves[0]
    layout = batch.inputs["layout"]
    assert layout.tail and (gradient[layout.real_tokens :] == 0).all() and (move[layout.real_tokens :] == 0).all()
    for g, r in zip(*(x[: layout.real_tokens].split(layout.lengths) for x in (gradient, move)), strict=True):
        assert r.norm() == pytest.approx(0.3, rel=1e-5)
        torch.testing.assert_close(r, 0.3 * g / g.norm())
    torch.testing.assert_close(moves[2][1].norm(dim=(1, 2)), torch.full((len(moves[2][1]),), 0.3))


def test_the_adversarial_gradient_is_added_and_raises_the_loss(tmp_path: Path, monkeypatch) -> None:
    found = []
    original = training_losses.sample_losses
    monkeypatch.setattr(training_losses, "sample_losses", lambda *a: found.append(original(*a)) or found[-1])
    run_of = fit(arguments(tmp_path, fgm_epsilon=0.1, max_steps=3))
    clean, moved = found[0::2], found[1::2]
    assert all(m > c for c, m in zip(clean, moved, strict=True))
    assert losses(run_of) == pytest.approx([c.item() / 8 for c in clean], rel=1e-5)  # the adversarial one is not shown
    with torch.enable_grad():
        assert not run_of.learner.model.module.words._forward_hooks


def test_fgm_changes_what_is_learned(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    assert losses(fit(args))[0] == losses(fit(replace(args, fgm_epsilon=0.5)))[0]
    assert losses(fit(args))[1:] != losses(fit(replace(args, fgm_epsilon=0.5)))[1:]


# With everything else


@pytest.mark.parametrize("precision", [{}, BF16], ids=["O0", "O2"])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_resume_is_bit_for_bit(tmp_path: Path, name: str, precision: dict) -> None:
    settings = {**TECHNIQUES[name], **precision, "model_name_or_path": wide(tmp_path), "max_steps": 6}
    settings |= {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    whole = arguments(tmp_path, **settings)
    assert run(whole) == 0
    resumed = replace(
        whole, output_dir=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(Path(whole.output_dir) / "checkpoint-3"),
    )  # fmt: skip
    assert run(resumed) == 0
    first, second = weights_of(Path(whole.output_dir)), weights_of(Path(resumed.output_dir))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert results_of(whole)["train_loss"] == results_of(resumed)["train_loss"]


@pytest.mark.parametrize("name", TECHNIQUES)
def test_accumulation_gives_the_same_as_one_batch(tmp_path: Path, name: str) -> None:
    args = arguments(tmp_path, **TECHNIQUES[name], max_train_samples=24, num_train_epochs=2.0)
    whole = fit(replace(args, per_device_train_batch_size=8))
    parts = fit(replace(args, per_device_train_batch_size=4, gradient_accumulation_steps=2))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", "rdrop_alpha"])
def test_two_ranks_give_the_same_as_one(tmp_path: Path, name: str) -> None:
    args = arguments(tmp_path, **TECHNIQUES[name], per_device_train_batch_size=8)
    one = fit(args)
    two = replace(args, per_device_train_batch_size=4, output_dir=str(tmp_path / "two"))
    run_on_two_ranks(two)
    assert results_of(two)["train_loss"] == pytest.approx(sum(losses(one)) / len(losses(one)), rel=1e-4)


def test_another_decay_of_layers_cannot_be_resumed(tmp_path: Path, capsys) -> None:
    args = arguments(tmp_path, layerwise_lr_decay=0.5, save_strategy="epoch")
    assert run(args) == 0
    from bert_glue.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"--layerwise_lr_decay \(0.5, now 0.9\)"):
        run(replace(args, layerwise_lr_decay=0.9, resume_from_checkpoint="auto"))


NEEDED = ["--model_name_or_path=m", "--task_name=mrpc", "--output_dir=o"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--do_train", "--rdrop_alpha=1", "--fgm_epsilon=1"], "both run each batch twice; give only one"),
        (["--do_train", "--freeze_encoder", "--fgm_epsilon=1"], "--freeze_encoder trains a part of it; give only one"),
        (["--do_train", "--lora_rank=2", "--reinit_layers=1"], "--lora_rank trains a part of it; give only one"),
        (["--do_train", "--fp16", "--amp_backend=apex", "--ema_decay=0.9"], "works only with --amp_backend native"),
        (["--do_eval", "--reinit_layers=1"], "--reinit_layers needs --do_train"),
        (["--do_train", "--layerwise_lr_decay=0"], "(0, 1]"),
        (["--do_train", "--ema_decay=1"], "[0, 1)"),
    ],
)
def test_refusals(flags: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse([*NEEDED, *flags])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_without_training_a_technique_is_noted() -> None:
    args = parse([*NEEDED, "--do_eval", "--ema_decay=0.9"])
    assert args.notices == ("--ema_decay has no effect without --do_train",)
