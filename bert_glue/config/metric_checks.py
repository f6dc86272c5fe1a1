"""Checks the metrics that flags name, and applies `--metric_name` to own data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bert_glue import result_keys as keys
from bert_glue.config.arguments import Arguments
from bert_glue.config.data_checks import named_task
from bert_glue.config.expectations import read_expectations
from bert_glue.errors import Problem, UsageError, did_you_mean
from bert_glue.tasks import COMBINED_SCORE, GlueTask, own_task

_FLAGS = ("metric_name", "metric_for_best_model")
# Names in the `evaluate` library -> our names: for a regression, and for several labels per row.
_REGRESSION_NAMES = {"mse": keys.LOSS, "pearsonr": "pearson"}
_SEVERAL_NAMES = {"f1": "f1_micro", "accuracy": "subset_accuracy"}
# Metrics of own classes that are computed only if a flag names them.
_OF_CLASSES = ("f1_macro", "matthews_correlation")


def metric_names(task: GlueTask | None) -> list[str]:
    """The figures of every evaluation. None stands for own data whose problem type is not known yet."""
    names = [keys.LOSS]
    for row in [task] if task else _own_tasks():
        combined = (COMBINED_SCORE,) if row.has_combined_score else ()
        suffixes = [split.key_suffix for split in row.evaluation]
        names += [metric + suffix for suffix in suffixes for metric in (*row.metrics, *combined)]
        names += [keys.LOSS + suffix for suffix in suffixes if suffix]
    return list(dict.fromkeys(names))


def _own_tasks() -> list[GlueTask]:
    classes = ("0", "1")
    return [own_task("own", (), classes), own_task("own", (), ()), own_task("own", (), classes, is_multi_label=True)]


def choices_of(task: GlueTask | None) -> list[str]:
    """The choices of `--metric_name` and `--metric_for_best_model`. Without a task: those of any own data."""
    if task is None:
        return list(dict.fromkeys(name for own in _own_tasks() for name in choices_of(own)))
    names = metric_names(task)
    if task.is_official:
        return names
    if task.is_multi_label or task.is_regression:
        return [*names, *(_SEVERAL_NAMES if task.is_multi_label else _REGRESSION_NAMES)]
    # "f1" is the F1 of the second of two classes, as in scikit-learn. With three classes it has no meaning.
    return list(dict.fromkeys([*names, *_OF_CLASSES, *(("f1",) if task.num_labels == 2 else ())]))


def metric_problems(args: Arguments) -> Iterator[Problem]:
    """Problems with metrics that neither the task nor any own data has."""
    for flag in _FLAGS:
        value = getattr(args, flag)
        known = choices_of(named_task(args))
        if value is not None and keys.without_eval(value) not in known:
            yield Problem((flag, "task_name"), f"--{flag}: {did_you_mean('metric', keys.without_eval(value), known)}")


def expectation_problems(args: Arguments) -> Iterator[Problem]:
    """Problems with `--expect`: texts that are not bounds, and bounds for figures that this run does not compute."""
    if args.expect is None:
        return
    task = named_task(args)
    known = metric_names(task) if task else choices_of(None)
    try:
        bounds = read_expectations(args.expect, task.name if task else None, known)
    except ValueError as error:
        yield Problem(("expect", "task_name"), f"--expect: {error}")
        return
    evaluates = args.do_eval or (args.do_train and args.eval_strategy != "no")
    for bound in bounds:
        if keys.is_of_evaluation(bound.key) and not evaluates:
            yield Problem(("expect", "do_eval"), f"--expect {bound.text} needs --do_eval")
        if keys.is_of_training(bound.key) and not args.do_train:
            yield Problem(("expect", "do_train"), f"--expect {bound.text} needs --do_train")


def with_metric(args: Arguments, task: GlueTask) -> GlueTask:
    """The task with the metrics that flags name. For own data `--metric_name` becomes the headline.

    Raises:
        UsageError: a flag names a metric that the data does not have.
    """
    chosen = {flag: _metric_of(args, flag, task) for flag in _FLAGS}
    if not task.is_official:
        added = [name for name in chosen.values() if name not in (None, keys.LOSS, *task.metrics)]
        headline = chosen["metric_name"] if chosen["metric_name"] not in (None, keys.LOSS) else task.headline
        task = replace(task, metrics=tuple(dict.fromkeys([*task.metrics, *added])), headline=headline)
    try:
        if args.expect:
            read_expectations(args.expect, args.task_name, metric_names(task))
    except ValueError as error:
        raise UsageError(f"--expect: the labels of this data are {_kind(task)}: {error}") from None
    return task


def headline_notes(args: Arguments, task: GlueTask) -> list[str]:
    """A note if `--metric_name` chooses the best checkpoint but is not the headline: the loss, or a GLUE task."""
    if args.metric_name is None or _own_name(keys.without_eval(args.metric_name), task) == task.headline:
        return []
    return [
        f"--metric_name {args.metric_name} chooses the best checkpoint if --metric_for_best_model does not; the "
        f"headline metric is still {task.headline}"
    ]


def metric_for_best(args: Arguments, task: GlueTask) -> str:
    """The metric that chooses the best checkpoint: of `--metric_for_best_model`, `--metric_name`, or the headline."""
    given = next(filter(None, [args.metric_for_best_model, args.metric_name]), task.headline)
    return _own_name(keys.without_eval(given), task)


def _metric_of(args: Arguments, flag: str, task: GlueTask) -> str | None:
    """Our name of the metric that a flag names."""
    if getattr(args, flag) is None:
        return None
    value = keys.without_eval(getattr(args, flag))
    known = choices_of(task)
    if value not in known:
        raise UsageError(f"--{flag} {value}: the labels of this data are {_kind(task)}; choices: {', '.join(known)}")
    return _own_name(value, task)


def _own_name(value: str, task: GlueTask) -> str:
    if task.is_official:
        return value
    if task.is_multi_label:
        return _SEVERAL_NAMES.get(value, value)
    if task.is_regression:
        return _REGRESSION_NAMES.get(value, value)
    return value


def _kind(task: GlueTask) -> str:
    kind = "scores, a regression" if task.is_regression else f"{task.num_labels} classes"
    return f"{kind}, several per row" if task.is_multi_label else kind
