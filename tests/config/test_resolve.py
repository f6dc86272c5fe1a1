"""A global batch is dealt out evenly or refused; the learning rate follows its rule; the samples stay the same."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_run import arguments, results_of

from bert_glue.config.arguments import Arguments
from bert_glue.config.checks import find_problems
from bert_glue.config.resolve import for_ranks, samples_per_step
from bert_glue.data.batching import TrainingSampler
from bert_glue.errors import UsageError
from bert_glue.pipeline import run as pipeline


@pytest.mark.parametrize(
    ("total", "ranks", "most", "batch", "passes"),
    [
        (32, 8, 32, 4, 1),
        (256, 8, 32, 32, 1),
        (256, 1, 32, 32, 8),
        (8, 8, 32, 1, 1),
        (48, 2, 12, 12, 2),
        (7, 1, 8, 7, 1),
    ],
)
def test_dealt_out(total, ranks, most, batch, passes):
    args, lines = for_ranks(Arguments(global_batch_size=total, per_device_train_batch_size=most), ranks)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (batch, passes)
    assert samples_per_step(args, ranks) == total
    assert lines == [f"batch: --global_batch_size {total} = {batch} x {ranks} rank(s) x {passes} accumulated"]


@pytest.mark.parametrize(
    ("total", "ranks", "most", "says"),
    [
        (36, 8, 32, "--global_batch_size 36 cannot be divided evenly over 8 ranks"),
        (4, 8, 32, "--global_batch_size 4 cannot be divided evenly over 8 ranks"),
        (96, 2, 32, "48 samples a rank (of 2) are not a number of whole forward passes of"),
    ],
)
def test_what_does_not_divide_is_refused_in_one_line(total, ranks, most, says):
    with pytest.raises(UsageError) as caught:
        for_ranks(Arguments(global_batch_size=total, per_device_train_batch_size=most), ranks)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_accumulation_of_ones_own_is_refused():
    args = Arguments(global_batch_size=64, gradient_accumulation_steps=2)
    assert any("sets the accumulation itself" in problem.text for problem in find_problems(args))


@pytest.mark.parametrize(("rule", "rate"), [("none", 2e-5), ("linear", 16e-5), ("sqrt", 2e-5 * 8**0.5)])
def test_learning_rate_follows_the_rule(rule, rate):
    args = Arguments(learning_rate=2e-5, lr_scaling=rule, per_device_train_batch_size=32)
    scaled, lines = for_ranks(args, 8)
    assert scaled.learning_rate == pytest.approx(rate)
    assert len(lines) == (rule != "none") and all("to 256 samples per step" in line for line in lines)
    halved, _ = for_ranks(Arguments(learning_rate=1.0, lr_scaling="linear", per_device_train_batch_size=4), 4)
    assert halved.learning_rate == 0.5  # 16 of 32
    other, _ = for_ranks(Arguments(learning_rate=1.0, lr_scaling="sqrt", lr_base_batch_size=2), 1)
    assert other.learning_rate == 2.0  # 8 of 2


@pytest.mark.parametrize("lengths", [None, np.arange(701) % 37])
@pytest.mark.parametrize("drop_last", [False, True])
def test_samples_of_a_step_do_not_depend_on_how_it_is_dealt_out(drop_last, lengths):
    steps = []
    for micro, passes in ((64, 1), (16, 4), (8, 8)):
        order = TrainingSampler(701, micro, passes, 3, drop_last, lengths, whole_steps=True)
        permutation = order.permutation(1)
        steps.append([np.concatenate(order.step(permutation, s)).tolist() for s in range(order.steps_per_epoch)])
    assert steps[0] == steps[1] == steps[2]
    assert [len(step) for step in steps[0]] == [64] * 10 + ([] if drop_last else [61])


def test_derived_numbers_are_in_the_results(tmp_path, capsys):
    args = arguments(
        tmp_path, global_batch_size=16, per_device_train_batch_size=4, lr_scaling="linear", lr_base_batch_size=8,
        learning_rate=1e-3, max_steps=2,
    )  # fmt: skip
    assert pipeline.run(args) == 0
    results = results_of(args)
    assert (results["global_batch_size"], results["gradient_accumulation_steps"]) == (16, 4)
    assert results["learning_rate"] == 2e-3 and results["train_samples_consumed"] == 29
    printed = capsys.readouterr().out
    assert "batch: --global_batch_size 16 = 4 x 1 rank(s) x 4 accumulated" in printed
    assert "learning rate: 0.002 = 0.001 scaled by --lr_scaling linear from --lr_base_batch_size 8 to 16" in printed
