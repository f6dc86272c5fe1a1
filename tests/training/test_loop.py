"""The loop: what is averaged, in which order, when it stops, and that a resumed run is the same run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
from resume_checks import assert_close, check_resume, fit_until, weights
from safetensors.torch import load_file
from tiny_run import arguments, bert_tensors, changed, fit, losses, make_data, make_model

from bert_glue.data.batching import TrainingSampler
from bert_glue.errors import CheckpointError, DivergedError, UsageError
from bert_glue.evaluation.evaluator import Evaluator, evaluate
from bert_glue.storage import checkpoint
from bert_glue.tasks import get_task
from bert_glue.training import resume, setup
from bert_glue.training.losses import sample_losses

# ---- what is averaged ----


@pytest.mark.parametrize("drop_last", [False, True])
def test_accumulation_is_the_large_batch(tmp_path, drop_last):
    """29 rows: the last batch of an epoch has 5 rows, in passes of 4 and 1; or is dropped."""
    settings = {"num_train_epochs": 3.0, "max_grad_norm": 0.5, "weight_decay": 0.1, "adam_epsilon": 1e-4}
    rows = 24 if drop_last else 29
    large = fit(arguments(tmp_path, per_device_train_batch_size=8, max_train_samples=rows, **settings))
    small = fit(
        arguments(
            tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_train_samples=rows,
            dataloader_drop_last=drop_last, **settings,
        )
    )  # fmt: skip
    assert large.progress.step == small.progress.step == 3 * math.ceil(rows / 8)
    assert small.progress.forward_passes > large.progress.forward_passes
    assert losses(small) == pytest.approx(losses(large), rel=1e-5)
    assert_close(weights(small), weights(large), 1e-6)


def test_logged_losses_are_means_of_steps_and_their_sum_is_the_train_loss(tmp_path):
    """Without learning, every epoch's loss is the mean over its samples, whatever the batches are."""
    each = fit(arguments(tmp_path, learning_rate=0.0, num_train_epochs=1.0))
    split, module = each.data.split, each.learner.model.module.eval()
    batch = each.data.collate(split, np.arange(len(split)))
    with torch.no_grad():
        per_row = torch.nn.functional.cross_entropy(module(**batch.inputs), batch.labels, reduction="none")
    order = each.data.sampler.permutation(0)
    expected = [per_row[order[i : i + 8]].mean().item() for i in range(0, 29, 8)]  # the last batch has 5 rows
    assert losses(each) == pytest.approx(expected, rel=1e-5)
    assert each.progress.loss_sum == pytest.approx(sum(expected), rel=1e-5)
    pairs = fit(arguments(tmp_path, learning_rate=0.0, num_train_epochs=1.0, logging_steps=3))
    assert losses(pairs) == pytest.approx([np.mean(expected[:3]), expected[3]], rel=1e-5)
    assert pairs.progress.loss_sum == pytest.approx(sum(expected), rel=1e-5)


def test_label_smoothing_is_transformers():
    from transformers.trainer_pt_utils import LabelSmoother

    torch.manual_seed(0)
    logits, labels = torch.randn(7, 3), torch.randint(0, 3, (7,))
    expected = LabelSmoother(epsilon=0.2)({"logits": logits}, labels)
    ours = sample_losses(get_task("mnli"), logits, labels, 0.2) / 7
    torch.testing.assert_close(ours, expected)
    assert not torch.isclose(ours, sample_losses(get_task("mnli"), logits, labels, 0.0) / 7)


def test_regression_is_the_squared_error():
    logits, labels = torch.tensor([[1.0], [4.0]]), torch.tensor([3.0, 4.5])
    assert sample_losses(get_task("stsb"), logits, labels, 0.0).item() == pytest.approx(4.25)


# ---- how long, at which rate ----


@pytest.mark.parametrize(
    ("flags", "steps", "epoch"),
    [
        ({"num_train_epochs": 2.0}, 8, 2.0),
        ({"num_train_epochs": 0.6}, 3, 0.75),
        ({"num_train_epochs": 1.3}, 6, 1.5),
        ({"num_train_epochs": 2.0, "dataloader_drop_last": True}, 6, 2.0),
        ({"max_steps": 5}, 5, 1.25),
        ({"num_train_epochs": 0.01}, 1, 0.25),
        ({"gradient_accumulation_steps": 3, "num_train_epochs": 2.0}, 4, 2.0),
    ],
)
def test_steps_and_epochs(tmp_path, flags, steps, epoch):
    run = fit(arguments(tmp_path, **flags))
    assert run.progress.step == steps and run.epoch == epoch
    per_step = [24, 5] if "gradient_accumulation_steps" in flags else [8, 8, 8, 5]
    if "dataloader_drop_last" in flags:
        per_step = [8, 8, 8]
    assert run.progress.samples == sum(per_step[at % len(per_step)] for at in range(steps))


def test_drop_last_of_too_few_rows_is_refused(tmp_path):
    with pytest.raises(UsageError, match="29 training rows do not fill one batch of 32"):
        fit(arguments(tmp_path, per_device_train_batch_size=32, dataloader_drop_last=True))


def test_every_row_once_an_epoch_in_an_order_of_seed_and_epoch():
    order = TrainingSampler(29, 8, 2, seed=1, drop_last=False)
    epochs = [
        np.concatenate([np.concatenate(order.step(order.permutation(e), s)) for s in range(order.steps_per_epoch)])
        for e in (0, 1)
    ]
    assert all(sorted(rows) == list(range(29)) for rows in epochs)
    assert list(epochs[0]) != list(epochs[1])
    assert list(order.permutation(0)) != list(TrainingSampler(29, 8, 2, 2, False).permutation(0))


def test_rate_warms_up_and_decays(tmp_path):
    run = fit(arguments(tmp_path, max_steps=8, warmup_steps=0.25, learning_rate=0.01))
    rates = [entry["learning_rate"] for entry in run.progress.history]
    assert rates == pytest.approx([0.01 * f for f in (0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])


def test_logging_steps_and_first_step(tmp_path):
    run = fit(arguments(tmp_path, max_steps=7, logging_steps=3, logging_first_step=True))
    assert [entry["step"] for entry in run.progress.history] == [1, 3, 6, 7]


# ---- the same numbers on every path ----


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_packed_is_the_padded_run(tmp_path, padding):
    settings = {"max_steps": 10, "weight_decay": 0.1, "adam_epsilon": 1e-4}
    head = {"classifier.weight": np.linspace(-0.2, 0.2, 32, dtype=np.float32).reshape(2, 16)}
    head["classifier.bias"] = np.zeros(2, np.float32)
    settings["model_name_or_path"] = str(make_model(tmp_path / "headed", changes=head))
    packed = fit(arguments(tmp_path, padding="packed", **settings))
    padded = fit(arguments(tmp_path, padding=padding, **settings))
    assert packed.learner.model.is_packed and not padded.learner.model.is_packed
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-5)
    assert packed.observers.meter.computed_tokens < padded.observers.meter.computed_tokens
    meter = packed.observers.meter
    assert meter.real_tokens == padded.observers.meter.real_tokens
    assert meter.real_tokens < meter.computed_tokens <= meter.real_tokens + 16 * meter.steps  # filler is not real
    assert_close(weights(packed), weights(padded), 1e-5)


def test_gradient_checkpointing_changes_no_number(tmp_path):
    model = str(make_model(tmp_path / "noisy", dropout=0.2))
    plain = fit(arguments(tmp_path, model_name_or_path=model, max_steps=4))
    recomputed = fit(arguments(tmp_path, model_name_or_path=model, max_steps=4, gradient_checkpointing=True))
    assert losses(plain) == pytest.approx(losses(recomputed), rel=1e-6)


@pytest.mark.parametrize("precision", [{}, {"bf16": True, "fp16_opt_level": "O2"}])
def test_narrowed_embeddings_give_the_same_weights(tmp_path, monkeypatch, precision):
    settings = {"weight_decay": 0.5, "adam_epsilon": 1e-4, **precision}
    narrowed = fit(arguments(tmp_path, **settings))
    monkeypatch.setattr(tiny_run, "narrow", lambda *_: None)
    whole = fit(arguments(tmp_path, **settings))
    assert whole.learner.narrowed is None
    assert narrowed.learner.model.module.words.weight.shape < whole.learner.model.module.words.weight.shape
    assert losses(narrowed) == pytest.approx(losses(whole), rel=1e-6)
    assert_close(weights(narrowed), weights(whole), 1e-6)
    table = weights(narrowed)["bert.embeddings.word_embeddings.weight"]
    start = torch.from_numpy(bert_tensors()["bert.embeddings.word_embeddings.weight"])
    assert (table[-1] / start[-1]).mean() == pytest.approx(np.prod([1 - 5e-3 * 0.5 * (1 - s / 8) for s in range(8)]))


# ---- evaluation while training, best weights, early stopping ----


def evaluations(run) -> list[dict]:
    return [entry for entry in run.progress.history if "eval_loss" in entry]


def test_evaluation_and_checkpoints_come_when_they_are_due(tmp_path):
    by_epoch = fit(arguments(tmp_path, num_train_epochs=1.5, eval_strategy="epoch", save_strategy="epoch"))
    assert [entry["step"] for entry in evaluations(by_epoch)] == [4, 6]
    assert [f.name for f in checkpoint.list_checkpoints(by_epoch.output_dir)] == ["checkpoint-4", "checkpoint-6"]
    by_step = fit(
        arguments(
            tmp_path, max_steps=7, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=2,
            output_dir=str(tmp_path / "by_step"),
        )
    )  # fmt: skip
    assert [entry["step"] for entry in evaluations(by_step)] == [3, 6]
    assert [checkpoint.step_of(f) for f in checkpoint.list_checkpoints(by_step.output_dir)] == [2, 4, 6]


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_the_best_weights_are_really_loaded(tmp_path, metric):
    """A rate that ruins the weights late: the best evaluation is an early one, between two saves."""
    args = arguments(
        tmp_path, max_steps=12, learning_rate=0.05, eval_strategy="steps", eval_steps=1, weight_decay=0.5,
        lr_scheduler_type="constant", save_strategy="steps", save_steps=12, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model=metric,
    )  # fmt: skip
    run = fit(args)
    scores = {entry["step"]: entry[f"eval_{metric}"] for entry in evaluations(run)}
    best = (min if metric == "loss" else max)(scores.values())
    first_best = next(step for step, score in scores.items() if score == best)
    assert run.progress.best_metric == best and run.progress.best_step == first_best
    assert first_best % 12, "the test wants a best step that --save_steps alone would not have kept"
    evaluator = Evaluator(run.learner.model.module, run.data.collate, 8, run.ranks, run.learner.precision)
    split = tiny_run.arguments(tmp_path, do_train=False, do_eval=True)
    again = evaluate(evaluator, run.task, tokenized(split, run))
    assert again[f"eval_{metric}"] == pytest.approx(best, abs=1e-7)
    stored = load_file(run.output_dir / f"checkpoint-{first_best}" / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in weights(run).items())


def tokenized(args, run):
    from bert_glue.data.sources import load_task_data
    from bert_glue.pipeline.inputs import tokenize_splits

    data = load_task_data(args, frozenset({"evaluation"}))
    return tokenize_splits(args, data, run.learner.model, run.observers.log)


def test_the_best_weights_survive_the_limit_and_a_resume_elsewhere(tmp_path):
    args = arguments(
        tmp_path, max_steps=3, learning_rate=0.05, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    first = fit(args)
    best = first.progress.best_step
    at = str(first.output_dir / "checkpoint-3")
    moved = fit(changed(args, resume_from_checkpoint=at, output_dir=str(tmp_path / "other"), learning_rate=0.0))
    assert moved.progress.best_step == best
    assert_close(weights(moved), weights(first), 0.0)


@pytest.mark.parametrize(
    ("metric", "values", "flags", "stops_after", "best"),
    [
        ("accuracy", [0.5, 0.6, 0.6, 0.55, 0.7, 0.7], {}, 4, 2),
        ("loss", [0.5, 0.6, 0.4, 0.5, 0.5, 0.3], {}, 5, 3),
        ("loss", [0.5, 0.6, 0.4, 0.5, 0.5, 0.3], {"greater_is_better": True}, 4, 2),
        ("accuracy", [0.5, 0.51, 0.52, 0.9, 0.9, 0.9], {"early_stopping_threshold": 0.1}, 3, 3),
        ("accuracy", [0.5, 0.4, 0.6, 0.5, 0.7, 0.6], {}, 6, 5),
        ("accuracy", [None, 0.4, None, None, 0.7, 0.6], {}, 4, 2),
        ("loss_mm", [0.5, 0.4, 0.3, 0.2, 0.1, 0.0], {}, 6, 6),
    ],
)
def test_early_stopping(tmp_path, monkeypatch, metric, values, flags, stops_after, best):
    script = iter(values)
    monkeypatch.setattr(setup, "evaluate", lambda *_: {f"eval_{metric}": next(script)})
    args = arguments(
        tmp_path, max_steps=6, eval_strategy="steps", eval_steps=1, early_stopping_patience=2,
        metric_for_best_model=metric, **flags,
    )  # fmt: skip
    run = fit(args)
    assert run.progress.step == stops_after
    assert (run.progress.best_step, run.progress.best_metric) == (best, values[best - 1])


# ---- runs that end otherwise ----


def test_a_run_resumed_in_mid_epoch_is_bit_for_bit_the_same(tmp_path):
    check_resume(tmp_path, {})


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 3},
        {"bf16": True, "fp16_opt_level": "O2"},
        {"bf16": True, "fp16_opt_level": "O2", "gradient_accumulation_steps": 3},
        {"bf16": True, "fp16_opt_level": "O3"},
        {"padding": "longest"},
        {"optim": "adamw_torch"},
        {"optim": "lamb"},
        {"optim": "adafactor"},
        {"optim": "adafactor", "bf16": True, "fp16_opt_level": "O3"},
        {"optim": "lamb", "bf16": True, "fp16_opt_level": "O2"},
        {"logging_steps": 4},
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_resume_with(tmp_path, settings):
    check_resume(tmp_path, settings)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    first = fit(args)
    again = fit(changed(args, resume_from_checkpoint="auto"))
    assert again.progress.step == 4 and again.progress.history == first.progress.history
    assert_close(weights(again), weights(first), 0.0)


def test_a_signal_saves_a_checkpoint_from_which_the_run_goes_on(tmp_path):
    args = arguments(tmp_path, max_steps=7, logging_steps=3)
    whole = fit(args)
    stopped = fit_until(args, 5)
    assert stopped.progress.step == 5
    assert [f.name for f in checkpoint.list_checkpoints(stopped.output_dir)] == ["checkpoint-5"]
    resumed = fit(changed(args, resume_from_checkpoint="auto"))
    assert losses(resumed) == losses(whole)
    assert_close(weights(resumed), weights(whole), 0.0)


def test_a_rerun_does_not_end_with_the_earlier_runs_best(tmp_path):
    """The same steps were saved by an earlier run with another rate."""
    args = arguments(
        tmp_path, max_steps=2, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True
    )  # fmt: skip
    first = weights(fit(args))
    second = fit(changed(args, learning_rate=1e-4))
    alone = fit(changed(args, learning_rate=1e-4, output_dir=str(tmp_path / "fresh")))
    assert_close(weights(second), weights(alone), 0.0)
    assert any(not torch.equal(first[name], value) for name, value in weights(second).items())


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_numbers_that_are_not_finite_end_the_run_before_anything_is_saved(tmp_path, value):
    bad = {"bert.encoder.layer.1.output.dense.bias": np.full(tiny_run.WIDTH, value, np.float32)}
    model = str(make_model(tmp_path / "bad", changes=bad))
    with pytest.raises(DivergedError) as caught:
        fit(arguments(tmp_path, model_name_or_path=model, logging_steps=100, save_strategy="steps", save_steps=2))
    assert caught.value.exit_code == 5
    assert checkpoint.list_checkpoints(tmp_path / "out") == []


def test_own_data_of_one_column_and_scores(tmp_path):
    """Regression on a single text: one output, the loss falls."""
    flags = make_data(tmp_path / "data")
    for path in flags.values():
        lines = ["sentence,label", *(f"a dog {'here ' * (n % 5)}runs,{n % 5 / 2}" for n in range(20))]
        Path(path).write_text("\n".join(lines) + "\n")
    run = fit(arguments(tmp_path, num_train_epochs=8.0, **flags))
    assert run.task.is_regression and run.learner.model.module.head_output.weight.shape[0] == 1
    assert losses(run)[-1] < 0.5 * losses(run)[0]


def _mean_late_loss(folder, model: str, padding: str, seed: int) -> float:
    """Over the last 8 of 48 steps; one data set, one set of weights, but dropout and order by seed."""
    run = fit(arguments(folder, model_name_or_path=model, padding=padding, seed=seed, max_steps=48))
    return float(np.mean(losses(run)[-8:]))


def test_with_dropout_packed_and_padded_lose_alike_within_seed_noise(tmp_path):
    """Other masks (ours and torch's), the same distribution: Welch's t over six seeds each."""
    from scipy.stats import ttest_ind

    model = str(make_model(tmp_path / "noisy", dropout=0.3))
    packed, padded = (
        [_mean_late_loss(tmp_path, model, padding, seed) for seed in range(6)] for padding in ("packed", "longest")
    )
    assert ttest_ind(packed, padded, equal_var=False).pvalue > 0.01
    calm = str(make_model(tmp_path / "calm", dropout=0.0))
    without = [_mean_late_loss(tmp_path, calm, "packed", seed) for seed in range(6)]
    # The comparison would see dropout that is missing.
    assert ttest_ind(packed, without, equal_var=False).pvalue < 0.01


def _rewritten(args, change) -> None:
    """The training file with each row's fields changed."""
    path = Path(args.train_file)
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *(",".join(change(line.split(","))) for line in lines)]) + "\n")


CHANGED_DATA = {
    "labels exchanged": (lambda row: [*row[:2], {"yes": "no", "no": "yes"}[row[2]]], "training labels"),
    "classes renamed": (lambda row: [*row[:2], {"yes": "zzz", "no": "aaa"}[row[2]]], "class names"),
    "texts exchanged": (lambda row: [row[1], row[0], row[2]], "training texts"),
    "nothing": (lambda row: row, None),
}


@pytest.mark.parametrize("kind", CHANGED_DATA)
def test_a_resume_on_changed_data_is_refused_and_can_be_allowed(tmp_path, kind):
    change, told = CHANGED_DATA[kind]
    args = arguments(tmp_path, save_strategy="epoch", **make_data(tmp_path / "data"))
    fit(args)
    _rewritten(args, change)
    again = changed(args, resume_from_checkpoint="auto", num_train_epochs=3.0)
    if told is None:
        assert fit(again).progress.step == 12
        return
    with pytest.raises(CheckpointError, match=f"{told}.*--allow_changed_data"):
        fit(again)
    resumed = fit(changed(again, allow_changed_data=True))
    assert resumed.progress.step == 12 and any(told in line for line in resumed.progress.changes)


def test_a_checkpoint_that_does_not_say_its_data_is_resumed(tmp_path, monkeypatch):
    args = arguments(tmp_path, save_strategy="epoch", **make_data(tmp_path / "data"))
    with monkeypatch.context() as patch:
        patch.setattr(resume, "_data", lambda state: {})
        fit(args)
    _rewritten(args, CHANGED_DATA["labels exchanged"][0])
    assert fit(changed(args, resume_from_checkpoint="auto", num_train_epochs=3.0)).progress.step == 12
