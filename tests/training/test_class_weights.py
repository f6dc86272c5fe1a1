"""`--class_weights`: scikit-learn's and torch's numbers, one mean over passes and ranks, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forked_ranks import on_ranks
from sklearn.utils.class_weight import compute_class_weight
from tiny_run import arguments, changed, fit, losses, make_model, results_of

from bert_glue.config.parser import parse
from bert_glue.errors import DataError, UsageError
from bert_glue.evaluation.collapse import constant_loss
from bert_glue.pipeline.run import run
from bert_glue.storage.files import json_object
from bert_glue.tasks import get_task, own_task
from bert_glue.training.class_weights import class_weights
from bert_glue.training.losses import disagreement, sample_losses

THREE = own_task("own", ("text",), ("a", "b", "c"))
SETS = own_task("own", ("text",), ("a", "b", "c"), is_multi_label=True)


def weights_file(folder: Path, text: str = '{"yes": 0.25, "no": 3}') -> str:
    path = folder / "weights.json"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_balanced_is_scikit_learns() -> None:
    labels = np.random.default_rng(5).choice(3, 211, p=[0.7, 0.1, 0.2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(class_weights("balanced", THREE, labels), expected, rtol=1e-12)
    with pytest.raises(DataError, match="no training row has class 'b', so"):
        class_weights("balanced", THREE, np.array([0, 2, 2]))


def test_several_labels_are_weighed_by_torchs_pos_weight() -> None:
    labels = np.random.default_rng(2).random((40, 3)) < [0.1, 0.4, 0.8]
    weights = class_weights("balanced", SETS, labels)
    np.testing.assert_allclose(weights, (~labels).sum(0) / labels.sum(0))
    torch.manual_seed(1)
    logits, given = torch.randn(40, 3), torch.tensor(weights, dtype=torch.float32)
    targets = torch.tensor(labels)
    expected = F.binary_cross_entropy_with_logits(logits, targets.float(), pos_weight=given)
    torch.testing.assert_close(sample_losses(SETS, logits, targets, 0.0, given) / 40, expected)
    constant = constant_loss(SETS, labels, 0.1, weights)
    best = torch.tensor(0.9 * labels.mean(0) + 0.05).logit() + given.log()
    at_best = sample_losses(SETS, best.float().expand(40, 3), targets, 0.1, given) / 40
    assert constant == pytest.approx(at_best.item(), rel=1e-5)
    labels[:, 1] = True
    with pytest.raises(DataError, match="every training row has class 'b'"):
        class_weights("balanced", SETS, labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_weighted_loss_is_torchs_mean(smoothing: float) -> None:
    torch.manual_seed(3)
    logits, labels, weights = 3 * torch.randn(17, 3), torch.randint(0, 3, (17,)), torch.tensor([0.2, 4.0, 1.1])
    expected = F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)
    ours = sample_losses(get_task("mnli"), logits, labels, smoothing, weights) / weights[labels].sum()
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("padding", ["packed", "longest", "max_length"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_step_is_one_weighted_mean_whatever_it_is_split_into(tmp_path: Path, padding: str, smoothing: float) -> None:
    args = arguments(
        tmp_path, class_weights=weights_file(tmp_path), learning_rate=0.0, num_train_epochs=1.0, padding=padding,
        label_smoothing_factor=smoothing, per_device_train_batch_size=3, gradient_accumulation_steps=4,
    )  # fmt: skip
    found = fit(args)
    split, module = found.data.split, found.learner.model.module.eval()
    weights = torch.tensor([{"yes": 0.25, "no": 3.0}[name] for name in found.task.labels])
    order, expected = found.data.sampler.permutation(0), []
    for at in range(0, len(split), 12):
        batch = found.data.collate(split, order[at : at + 12])
        with torch.no_grad():
            logits = module(**batch.inputs)
        expected.append(F.cross_entropy(logits, batch.labels, weight=weights, label_smoothing=smoothing).item())
    assert losses(found) == pytest.approx(expected, rel=1e-5)
    assert losses(found) != pytest.approx(losses(fit(replace(args, class_weights=None))), rel=1e-3)


def test_gradients_are_those_of_one_pass(tmp_path: Path) -> None:
    args = arguments(tmp_path, class_weights="balanced", adam_epsilon=1e-4, per_device_train_batch_size=12)
    parts = replace(args, per_device_train_batch_size=2, gradient_accumulation_steps=6)
    whole, split = fit(args), fit(parts)
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)
    for one, other in zip(whole.learner.precision.masters, split.learner.precision.masters, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    arguments(tmp_path / "parts")
    weights_file(tmp_path)
    alone = on_ranks(1, "weighted", tmp_path / "one")[0]
    for rank in on_ranks(2, "weighted", tmp_path / "two"):
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert rank["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert rank["weight"] == pytest.approx(alone["weight"], rel=1e-6)


@pytest.mark.parametrize("technique", [{"rdrop_alpha": 0.7}, {"fgm_epsilon": 0.5}])
def test_equal_weights_are_none_with_techniques(tmp_path: Path, technique: dict) -> None:
    model = str(make_model(tmp_path / "model", dropout=0.1))
    equal = weights_file(tmp_path, '{"yes": 4, "no": 4}')
    args = arguments(tmp_path, model_name_or_path=model, **technique)
    plain = losses(fit(args))
    assert losses(fit(replace(args, class_weights=equal))) == pytest.approx(plain, rel=1e-5)
    assert losses(fit(replace(args, class_weights=weights_file(tmp_path)))) != pytest.approx(plain, rel=1e-3)


def test_r_drop_weighs_the_losses_and_not_what_two_passes_differ_by(tmp_path: Path) -> None:
    args = arguments(
        tmp_path, model_name_or_path=str(make_model(tmp_path / "wide", dropout=0.2)), rdrop_alpha=2.0,
        class_weights=weights_file(tmp_path), max_steps=1, learning_rate=0.0,
    )  # fmt: skip
    found = fit(args)
    objective, batch = found.learner.objective, found.data.collate(found.data.split, np.arange(9))
    objective.begin(0)
    total = objective.weights[batch.labels].sum()
    ((loss, _),) = objective.losses(replace(batch, step_weight=total), 9, found.learner.precision.autocast)
    objective.begin(0)
    module = found.learner.model.module.train()
    one, other = (module(**batch.inputs, dropout_masks=m) for m in (objective.dropout_masks, objective.second))
    means = [F.cross_entropy(logits, batch.labels, weight=objective.weights) for logits in (one, other)]
    torch.testing.assert_close(loss, sum(means) / 2 + 2.0 * disagreement(found.task, one, other) / 9)


def test_a_class_of_weight_0_alone_in_a_step_changes_nothing(tmp_path: Path) -> None:
    only_no = weights_file(tmp_path, '{"yes": 0, "no": 1}')
    found = fit(arguments(tmp_path, class_weights=only_no, per_device_train_batch_size=1, num_train_epochs=1.0))
    assert losses(found).count(0.0) == 14 and all(map(np.isfinite, losses(found)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"yes": 1}', "no weight for class 'no'"),
        ('{"yes": 1, "no": 2, "nope": 1}', "unknown class 'nope'. Did you mean no?"),
        ('{"yes": 1, "no": -0.5}', "class 'no' has weight -0.5, not a finite"),
        ('{"yes": NaN, "no": 1}', "class 'yes' has weight nan"),
        ('{"yes": 1, "no": Infinity}', "class 'no' has weight inf"),
        ('{"yes": true, "no": 1}', "class 'yes' has weight True"),
        ('{"yes": "2", "no": 1}', "class 'yes' has weight 2, not"),
        ('{"yes": 0, "no": 0.0}', "every class with training rows has weight 0"),
        ('{"yes": 1, "no": 2, "yes": 3}', "class 'yes' is listed twice"),
        ("[1, 2]", "not a JSON object"),
        ("{yes: 1}", "it is not JSON"),
    ],
)
def test_a_file_that_is_not_a_weight_for_each_class_is_refused(tmp_path: Path, text: str, words: str) -> None:
    args = arguments(tmp_path, class_weights=weights_file(tmp_path, text))
    with pytest.raises(DataError) as error:
        run(args)
    assert words in str(error.value) and "weights.json" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_and_a_regression_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--class_weights balance: no such file; give balanced, or a json file"):
        run(arguments(tmp_path, class_weights="balance"))
    scores = tmp_path / "scores.csv"
    scores.write_text("text,label\na dog runs here,0.5\na cat eats here,1.25\na fish rests today,3\n")
    with pytest.raises(UsageError, match="are scores, which have no classes"):
        run(arguments(tmp_path, class_weights="balanced", train_file=str(scores), text_column_names="text"))
    stsb = ["--task_name", "stsb", "--sample", "--do_train", "--output_dir", "out", "--class_weights", "balanced"]
    with pytest.raises(UsageError, match="--class_weights 'balanced': a regression has no classes"):
        parse(stsb)


def test_the_weights_are_told_compared_and_belong_to_the_model(tmp_path: Path) -> None:
    args = arguments(
        tmp_path, class_weights=weights_file(tmp_path), max_steps=4, save_strategy="steps", save_steps=2, do_eval=True
    )
    assert run(args) == 0
    given, out = {"yes": 0.25, "no": 3.0}, Path(args.output_dir)
    assert results_of(args)["class_weights"] == results_of(args, "run.json")["class_weights"] == given
    assert json_object(out / "bert_glue.json")["recipe"]["class_weights"] == given
    assert str(tmp_path) not in (out / "bert_glue.json").read_text()
    report = (out / "report.html").read_text()
    assert "Weights of the classes in the loss" in report and "no 3, yes 0.25" in report
    weights_file(tmp_path, '{"yes": 1, "no": 3}')
    resumed = fit(changed(args, resume_from_checkpoint=str(out / "checkpoint-2")))
    assert "--class_weights {'no': 3.0, 'yes': 1.0} (was {'no': 3.0, 'yes': 0.25})" in resumed.progress.changes[0]
    with pytest.raises(DataError, match="--repeat: --class_weights gives other weights"):
        run(parse(["--repeat", str(out / "run.json")]))


def test_a_loss_that_a_constant_reaches_counts_the_weights() -> None:
    weights, labels = np.array([3.0, 0.5]), np.array([0, 0, 1, 1, 1])
    for smoothing in (0.0, 0.2):
        found = constant_loss(get_task("sst2"), labels, smoothing, weights)
        tries = [
            F.cross_entropy(
                torch.tensor([[0.0, float(bias)]]).expand(5, 2), torch.tensor(labels),
                weight=torch.tensor(weights, dtype=torch.float32), label_smoothing=smoothing,
            ).item()
            for bias in np.linspace(-4, 4, 801)
        ]  # fmt: skip
        assert found == pytest.approx(min(tries), abs=1e-4)
