"""The accuracy gate: what a bound may be, when it is met, and how a run ends that misses one."""

from __future__ import annotations

import pytest
from tiny_run import arguments, results_of, start

from bert_glue.config.expectations import missed, read_expectations
from bert_glue.config.metric_checks import metric_names
from bert_glue.config.parser import parse
from bert_glue.errors import UsageError
from bert_glue.tasks import TASKS

MRPC = ["--model_name_or_path=m", "--task_name=mrpc", "--output_dir=o", "--do_eval"]


def bounds(text: str, task: str = "mrpc"):
    return read_expectations(text, task, metric_names(TASKS[task]))


@pytest.mark.parametrize(
    ("text", "value", "is_met"),
    [
        ("f1>=0.88", 0.88, True),
        ("mrpc.f1>=0.88", 0.8799, False),
        ("f1>0.88", 0.88, False),
        ("f1<=0.5", 0.5, True),
        ("f1<0.5", 0.5, False),
        ("eval_f1>=1e-1", 0.1, True),
    ],
)
def test_each_sign(text: str, value: float, is_met: bool) -> None:
    (bound,) = bounds(text)
    judged = bound.judge({"eval_f1": value})
    assert judged == {"expect": text, "value": value, "is_met": is_met}
    assert (missed([judged]) == []) is is_met


def test_mnli_and_figures() -> None:
    first, second, third = bounds("mnli.accuracy_mm>=0.8, loss<2, train_samples_per_second>=100", "mnli")
    assert (first.key, second.key, third.key) == ("eval_accuracy_mm", "eval_loss", "train_samples_per_second")


def test_a_figure_that_is_null_or_absent_misses_with_the_reason() -> None:
    (bound,) = bounds("spearmanr>=-1", "stsb")
    judged = [bound.judge({"eval_spearmanr": None, "eval_spearmanr_reason": "constant scores"}), bound.judge({})]
    assert missed(judged) == [
        "--expect spearmanr>=-1: missed, it is null: constant scores",
        "--expect spearmanr>=-1: missed, it is null: this run does not have this figure",
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mrpc.f1"], "put it in quotes, because the shell reads > as a redirection"),
        (["mrpc.f1=0.88"], "is not a bound such as"),
        (["mrpc.f1>=high"], "'high' is not a number"),
        (["mrpc.f1>=nan"], "'nan' is not a number"),
        (["mrpc.f1>=88"], "write 88 % as 0.88"),
        (["mrpc.acuracy>=0.8"], "Did you mean accuracy?"),
        (["rte.accuracy>=0.6"], "is for rte, but this run's task is mrpc"),
        (["mrcp.f1>=0.8"], "Did you mean mrpc?"),
        (["mrpc.f1>=0.8", "f2>=0.8"], "unknown metric 'f2'"),
        (["train_loss<=1"], "needs --do_train"),
    ],
)
def test_a_wrong_bound_is_told_before_the_run(words: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse([*MRPC, "--expect", *words])
    assert says in str(caught.value)


def test_a_metric_needs_an_evaluation() -> None:
    with pytest.raises(UsageError, match="needs --do_eval"):
        parse([*MRPC[:3], "--do_train", "--expect", "f1>=0.5"])
    assert parse([*MRPC[:3], "--do_train", "--eval_strategy=epoch", "--expect", "f1>=0.5"]).expect == "f1>=0.5"
    assert parse([*MRPC, "--expect", "f1>=0.5", "accuracy>0"]).expect == "f1>=0.5,accuracy>0"


def test_a_missed_bound_ends_with_8_after_all_results(tmp_path) -> None:
    args = arguments(tmp_path, do_eval=True, expect="accuracy>=0.0,accuracy>1.0,train_runtime<0")
    child = start(args)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 8, err
    assert err.count("error: ") == 2 and "--expect accuracy>1.0: missed" in err and "train_runtime<0: missed" in err
    assert "Traceback" not in err and "eval_accuracy" in out
    assert [one["is_met"] for one in results_of(args)["expectations"]] == [True, False, False]
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_met_bound_ends_with_0(tmp_path) -> None:
    args = arguments(tmp_path, do_eval=True, expect="accuracy>=0.0,loss<100")
    child = start(args)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
